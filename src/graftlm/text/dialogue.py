"""Turn a conversation into tokens: the only renderer; training, evaluation, chat and server all call it.

Owns Message, Conversation, Rendered, and where an answer begins and ends in a rendered text. Does not know files,
batches or models; the wording around a conversation is `templates`, the jinja bounds are `sandbox`.

How user text stays text: before rendering, every message is put between private-use characters that occur nowhere in
the conversation, and every control-token string inside a message is replaced by one more such character. Whatever the
template does, a control token found in the result is the template's own, an answer is what lies between its own two
characters, and nothing a user writes can move either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from graftlm.errors import UserError
from graftlm.text.sandbox import TemplateRefused, compile_template
from graftlm.text.templates import ALPACA, BUILT_IN, CARD, Template, find_template

if TYPE_CHECKING:
    from rich.text import Text

    from graftlm.text.tokenizer import Tokenizer

__all__ = [
    "ALPACA", "BUILT_IN", "CARD", "Control", "Conversation", "Message", "Rendered", "Segment", "Template",
    "TemplateRefused", "coloured", "control_of", "find_template", "render", "render_many", "render_text", "rows_of",
    "segments_of",
]  # fmt: skip

Role = Literal["system", "user", "assistant", "text"]
Language = Literal["new", "old", ""]

_PRIVATE_USE = re.compile("[\U000f0000-\U0010fffd]")
_PRIVATE_RANGES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_SPACES = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is Alpaca's second field: material the question is about; role "text" is a plain document."""

    role: Role
    content: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, where they came from ("file:line") and which language they are in."""

    messages: tuple[Message, ...]
    source: str = ""
    language: Language = ""

    @property
    def text(self) -> str:
        """All that is said, for comparing and for the objective `text`."""
        return "\n".join(part for message in self.messages for part in (message.content, message.input) if part)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids, which of them are learned, and how many utf-8 bytes of text the learned ones spell."""

    ids: list[int]
    is_target: list[bool]
    num_target_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered conversation: the control token `text` (`token_id` set), or text to be encoded.

    `is_continuation`: encoded as what follows the segment before, not as the beginning of a text.
    """

    text: str
    is_target: bool
    token_id: int | None = None
    is_continuation: bool = False


@dataclass(frozen=True)
class Control:
    """The control tokens of a tokenizer as strings: what a template may write and a user may not."""

    ids: Mapping[str, int]
    names: Mapping[str, str]  # bos_token, eos_token … for the template
    pattern: re.Pattern[str]


_NO_TOKENIZER = (("<s>", 1), ("</s>", 2))


@lru_cache(maxsize=16)
def _control(tokens: tuple[tuple[str, int], ...], names: tuple[tuple[str, str], ...]) -> Control:
    longest_first = sorted((text for text, _ in tokens), key=len, reverse=True)
    return Control(dict(tokens), dict(names), re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def control_of(tokenizer: Tokenizer | None) -> Control:
    """The control tokens of `tokenizer`; without one Llama's `<s>` and `</s>`, enough to show a text."""
    if tokenizer is None:
        return _control(_NO_TOKENIZER, (("bos_token", "<s>"), ("eos_token", "</s>")))
    tokens = tuple(tokenizer.special_tokens.items())
    by_id = {token_id: text for text, token_id in tokens}
    named = {
        "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id, "unk_token": tokenizer.unk_id,
    }  # fmt: skip
    return _control(tokens, tuple((name, by_id[i]) for name, i in named.items() if i is not None and i in by_id))


def rows_of(conversation: Conversation, template: Template) -> list[Conversation]:
    """The training rows of a conversation: itself, or one per answer with what came before it ("last")."""
    if template.answers_per_row == "all":
        return [conversation]
    messages = conversation.messages
    return [
        replace(conversation, messages=messages[: i + 1])
        for i, message in enumerate(messages)
        if message.role == "assistant" and any(earlier.role == "user" for earlier in messages[:i])
    ]


def render(
    conversation: Conversation, tokenizer: Tokenizer, template: Template, *, for_reply: bool = False
) -> Rendered:
    """Tokens of one row. For reply: the prompt up to where the next (or, if there, the last) answer starts.

    The answers' own tokens and the control token ending each are targets; for reply there are none.
    Raises: UserError when a template never ends the answer; TemplateRefused when it does not take this conversation.
    """
    segments = segments_of(conversation, control_of(tokenizer), template, for_reply=for_reply)
    starts, continuations = _texts(segments)
    encoded = dict(zip(starts, tokenizer.encode_batch(starts), strict=True))
    continued = {text: tokenizer.encode_continuation(text) for text in continuations}
    return _assembled(segments, encoded, continued)


def render_many(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: Template
) -> Iterator[Rendered | TemplateRefused]:
    """Each row as `render` makes it, in order, encoded in batches; what the template refused comes as its error."""
    control = control_of(tokenizer)
    batch_rows = 1024
    for start in range(0, len(conversations), batch_rows):
        rows: list[list[Segment] | TemplateRefused] = []
        for conversation in conversations[start : start + batch_rows]:
            try:
                rows.append(segments_of(conversation, control, template))
            except TemplateRefused as refusal:
                rows.append(refusal)
        starts, continuations = _texts(s for row in rows if isinstance(row, list) for s in row)
        encoded = dict(zip(starts, tokenizer.encode_batch(starts), strict=True))
        continued = {text: tokenizer.encode_continuation(text) for text in continuations}
        for row in rows:
            yield _assembled(row, encoded, continued) if isinstance(row, list) else row


def render_text(
    conversation: Conversation, tokenizer: Tokenizer | None, template: Template, *, for_reply: bool = False
) -> str:
    """The rendered text itself, for display and for comparing with other renderers."""
    segments = segments_of(conversation, control_of(tokenizer), template, for_reply=for_reply)
    return "".join(segment.text for segment in segments)


def _texts(segments: Iterable[Segment]) -> tuple[list[str], list[str]]:
    """The different texts to encode as a beginning, and those to encode as a continuation."""
    starts: dict[str, None] = {}
    continuations: dict[str, None] = {}
    for segment in segments:
        if segment.token_id is None:
            (continuations if segment.is_continuation else starts)[segment.text] = None
    return list(starts), list(continuations)


def _assembled(
    segments: Sequence[Segment], encoded: Mapping[str, list[int]], continued: Mapping[str, list[int]]
) -> Rendered:
    ids: list[int] = []
    is_target: list[bool] = []
    num_target_bytes = 0
    for segment in segments:
        if segment.token_id is not None:
            ids.append(segment.token_id)
            is_target.append(segment.is_target)
            continue
        tokens = (continued if segment.is_continuation else encoded)[segment.text]
        ids += tokens
        is_target += [segment.is_target] * len(tokens)
        if segment.is_target:
            num_target_bytes += len(segment.text.encode("utf-8", "surrogatepass"))
    return Rendered(ids, is_target, num_target_bytes)


# ---------------------------------------------------------------------------- finding the answers in a rendered text


def segments_of(
    conversation: Conversation, control: Control, template: Template, *, for_reply: bool = False
) -> list[Segment]:
    """The rendered conversation cut at control tokens and at every answer's start and end. Raises: as `render`."""
    messages = conversation.messages
    if any(message.role == "text" for message in messages):
        raise UserError(
            f"{conversation.source or 'this row'} is a plain text, not a dialogue",
            "train it in a stage with objective: text",
        )
    if for_reply and messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    marked = _Marked(messages, control, template)
    full = marked.render(len(messages), for_reply)
    if template.answers_per_row == "all":
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    else:
        answers = [len(messages) - 1] if messages and messages[-1].role == "assistant" else []
    controls = [(found.start(), found.end()) for found in control.pattern.finditer(full)]
    regions = [_answer_region(marked, full, i, dict(controls), template) for i in answers]
    segments = _cut(full, controls, [region for region in regions if region], marked, control)
    return [replace(segment, is_target=False) for segment in segments] if for_reply else segments


def _answer_region(
    marked: _Marked, full: str, i: int, controls: dict[int, int], template: Template
) -> tuple[int, int] | None:
    """From where the prompt for answer `i` ends to behind the control token ending it; None if it is not shown."""
    is_last = i == len(marked.messages) - 1
    opened = full.find(marked.open[i])
    if opened < 0 or full.find(marked.open[i], opened + 1) >= 0:
        if opened < 0 and not is_last:
            return None  # some templates leave out early turns
        raise TemplateRefused(f"the template {template.name} prints an answer {'twice' if opened >= 0 else 'never'}")
    closed = full.find(marked.close, opened)
    if closed < 0:
        raise TemplateRefused(f"the template {template.name} cuts an answer short")
    start = opened
    if template.name not in BUILT_IN or marked.messages[i].content[:1].isspace():
        try:
            prompt = marked.render(i, True)
        except TemplateRefused:
            prompt = ""  # for instance a template that wants a question first
        if len(prompt) <= opened and full.startswith(prompt):
            start = len(prompt) or opened
    spaces = _SPACES.match(full, closed + 1)
    assert spaces is not None
    end = controls.get(spaces.end())
    if end is None and is_last:
        raise UserError(
            f"the template {template.name} does not end an answer with a control token: a model trained so never "
            "learns to stop",
            "add {{ eos_token }} after the assistant's content, or choose the template card or alpaca",
        )
    return start, end if end is not None else closed + 1


def _cut(
    full: str, controls: list[tuple[int, int]], regions: list[tuple[int, int]], marked: _Marked, control: Control
) -> list[Segment]:
    """Segments of `full` between the control tokens, cut again where an answer's region begins or ends."""
    cuts = sorted({bound for region in regions for bound in region})
    segments: list[Segment] = []

    def is_target(position: int) -> bool:
        return any(start <= position < end for start, end in regions)

    def add_text(start: int, end: int) -> None:
        bounds = [start, *(cut for cut in cuts if start < cut < end), end]
        has_text = False
        for a, b in pairwise(bounds):
            text = marked.plain(full[a:b])
            if text:
                segments.append(Segment(text, is_target(a), is_continuation=has_text))
                has_text = True

    position = 0
    for start, end in controls:
        add_text(position, start)
        text = full[start:end]
        segments.append(Segment(text, is_target(start), control.ids[text]))
        position = end
    add_text(position, len(full))
    return segments


class _Marked:
    """The messages of one conversation with their contents between private-use characters."""

    __slots__ = ("_control", "_data", "_free", "_render", "_restore", "_stand_ins", "close", "messages", "open")

    def __init__(self, messages: Sequence[Message], control: Control, template: Template) -> None:
        self.messages = messages
        self._control = control
        self._render = compile_template(template.jinja)
        used = {c for message in messages for part in (message.content, message.input)
                if not part.isascii() for c in _PRIVATE_USE.findall(part)}  # fmt: skip
        self._free = _free_characters(used)
        self._stand_ins: dict[str, str] = {}
        self.close = next(self._free)
        self.open = [next(self._free) for _ in messages]
        self._restore = dict.fromkeys((self.close, *self.open), "")
        self._data = [self._marked(i, message, template.knows_input) for i, message in enumerate(messages)]

    def render(self, num_messages: int, for_reply: bool) -> str:
        return self._render(
            messages=self._data[:num_messages], add_generation_prompt=for_reply, tools=None, documents=None,
            **self._control.names,
        )  # fmt: skip

    def plain(self, text: str) -> str:
        """`text` without the marks and with the users' control-token strings back in their places."""
        if len(self._restore) > 16:
            return text.translate({ord(mark): original for mark, original in self._restore.items()})
        for mark, original in self._restore.items():
            text = text.replace(mark, original)
        return text

    def _marked(self, i: int, message: Message, knows_input: bool) -> dict[str, str]:
        content = message.content
        if message.input and not knows_input:
            content = f"{content}\n{message.input}" if content else message.input
        data = {"role": message.role, "content": self._wrap(content, self.open[i])}
        if message.input and knows_input:
            data["input"] = self._wrap(message.input, self.open[i] if message.role == "assistant" else self.close)
        return data

    def _wrap(self, content: str, opening: str) -> str:
        """Marks go inside the outer blanks, so that a template's `trim` finds what it would find without them."""
        content = self._control.pattern.sub(self._stand_in, content)
        core = content.strip()
        if not core:
            return opening + self.close + content
        start = content.index(core[0]) if content[0] != core[0] else 0
        end = start + len(core)
        return f"{content[:start]}{opening}{core}{self.close}{content[end:]}"

    def _stand_in(self, found: re.Match[str]) -> str:
        text = found.group()
        if text not in self._stand_ins:
            self._stand_ins[text] = next(self._free)
            self._restore[self._stand_ins[text]] = text
        return self._stand_ins[text]


def _free_characters(used: set[str]) -> Iterator[str]:
    """Private-use characters that occur nowhere in the conversation. Raises: TemplateRefused when none is left."""
    for codes in _PRIVATE_RANGES:
        for code in codes:
            character = chr(code)
            if character not in used:
                yield character
    raise TemplateRefused("the conversation uses every private-use character there is")


# --------------------------------------------------------------------------------------------------- showing the mask


def coloured(conversation: Conversation, template: Template, tokenizer: Tokenizer | None = None) -> Text:
    """One row as rich text: what is learned in bold green, control tokens in magenta, the rest plain.

    With a tokenizer each token is drawn from its own mask and bytes; without one the text's segments are drawn.
    """
    from rich.text import Text

    shown = Text()
    if tokenizer is None:
        for segment in segments_of(conversation, control_of(None), template):
            shown.append(segment.text, style=_style(segment.is_target, segment.token_id is not None))
        return shown
    row = render(conversation, tokenizer, template)
    run, run_style = b"", ""
    for token_id, is_target in zip(row.ids, row.is_target, strict=True):
        is_control = token_id in tokenizer.special_ids
        style = _style(is_target, is_control)
        if style != run_style:
            shown.append(run.decode("utf-8", "replace"), style=run_style)
            run, run_style = b"", style
        run += tokenizer.piece(token_id).encode() if is_control else tokenizer.token_bytes(token_id)
    shown.append(run.decode("utf-8", "replace"), style=run_style)
    return shown


def _style(is_target: bool, is_control: bool) -> str:
    colour = "magenta" if is_control else "green" if is_target else ""
    return " ".join(part for part in ("bold" if is_target else "", colour) if part)
