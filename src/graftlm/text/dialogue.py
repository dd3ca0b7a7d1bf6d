"""Turn a conversation into tokens: the only renderer; training, evaluation, chat and server all call it.

Owns Message, Conversation, Rendered, and where an answer begins and ends in a rendered text. Does not know files,
batches or models; the wording around a conversation is `templates`, the characters put around what is said `marks`,
the jinja bounds are `sandbox`, the length policy is `fit`.

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
from graftlm.text.marks import Control, Marked, control_of
from graftlm.text.sandbox import TemplateRefused
from graftlm.text.templates import ALPACA, BUILT_IN, CARD, Template, find_template

if TYPE_CHECKING:
    from graftlm.text.tokenizer import Tokenizer

__all__ = [
    "ALPACA", "BUILT_IN", "CARD", "Conversation", "Message", "Rendered", "Segment", "Template", "TemplateRefused",
    "find_template", "render", "render_many", "render_or_tell", "render_text", "rows_of", "segments_of",
]  # fmt: skip

Role = Literal["system", "user", "assistant", "text"]
Language = Literal["new", "old", ""]

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
    def num_answers(self) -> int:
        """How many turns are the assistant's."""
        return sum(message.role == "assistant" for message in self.messages)

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


def render_or_tell(
    conversation: Conversation, tokenizer: Tokenizer, template: Template, *, for_reply: bool = False
) -> Rendered:
    """As `render`, where a refusal is its user's to mend and not a row to count. Raises: UserError."""
    try:
        return render(conversation, tokenizer, template, for_reply=for_reply)
    except TemplateRefused as refusal:
        roles = ", ".join(dict.fromkeys(message.role for message in conversation.messages))
        # A template raises in words of its own: they must not move the cursor either.
        reason = "".join(c if c.isprintable() else " " for c in str(refusal))[:200]
        raise UserError(
            f"The model's chat template does not take messages of {roles}: {reason}.",
            "Leave out what it refuses, or mend the template beside the tokenizer (chat_template.jinja or "
            "tokenizer_config.json); without one the card's is used.",
        ) from None


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
        encoded = _encoded_starts(starts, tokenizer)
        continued = dict(zip(continuations, tokenizer.encode_continuations(continuations), strict=True))
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


def _encoded_starts(texts: list[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of each text.

    The lines that all of them begin with, a template's frame, are encoded once where that is exact: they are half of
    the tokens of a short row.
    """
    num_shared = _num_shared(min(texts), max(texts)) if len(texts) > 1 else 0
    if not num_shared or not _newline_parts_texts(tokenizer):
        return dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    head = tokenizer.encode(texts[0][:num_shared])
    rests = tokenizer.encode_continuations([text[num_shared:] for text in texts])
    return {text: head + rest for text, rest in zip(texts, rests, strict=True)}


def _num_shared(first: str, last: str) -> int:
    """Characters of the whole lines with which both texts begin: all between them in order begin so too."""
    differs = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first.rfind("\n", 0, differs) + 1


@lru_cache(maxsize=8)
def _newline_parts_texts(tokenizer: Tokenizer) -> bool:
    """Whether what stands before a newline never changes how what follows it is encoded: no piece reaches across one.

    So with Llama's SentencePiece; not with byte-level BPE, whose pieces hold newlines and whose words end at them.
    """
    if tokenizer.is_byte_level or not tokenizer.has_fast_form:
        return False
    return all(
        b"\n" not in spelled or spelled == b"\n" for spelled in map(tokenizer.token_bytes, range(tokenizer.num_pieces))
    )


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
    marked = Marked(messages, control, template)
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
    marked: Marked, full: str, i: int, controls: dict[int, int], template: Template
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
    full: str, controls: list[tuple[int, int]], regions: list[tuple[int, int]], marked: Marked, control: Control
) -> list[Segment]:
    """Segments of `full` between the control tokens, cut again where an answer's region begins or ends."""
    cuts = sorted({bound for region in regions for bound in region})
    segments: list[Segment] = []
    position = 0
    for start, end in (*controls, (len(full), len(full))):
        has_text = False
        for a, b in pairwise((position, *(cut for cut in cuts if position < cut < start), start)):
            text = marked.plain(full[a:b])
            if text:
                is_target = any(first <= a < last for first, last in regions)
                segments.append(Segment(text, is_target, is_continuation=has_text))
                has_text = True
        if end > start:
            text = full[start:end]
            is_target = any(first <= start < last for first, last in regions)
            segments.append(Segment(text, is_target, control.ids[text]))
        position = end
    return segments
