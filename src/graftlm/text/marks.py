"""Marks around what is said, so that nothing a user writes can become a control token or move an answer's bounds.

Owns the control tokens of a tokenizer as strings and the private-use characters put around every message before a
template is rendered. Does not know tokens or masks: `dialogue` finds the answers between the marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from graftlm.text.sandbox import TemplateRefused, compile_template
from graftlm.text.templates import Template

if TYPE_CHECKING:
    from graftlm.text.dialogue import Message
    from graftlm.text.tokenizer import Tokenizer

_PRIVATE_USE = re.compile("[\U000f0000-\U0010fffd]")
_PRIVATE_RANGES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


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


class Marked:
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
        """The template's text of the first messages, the marks still in it. Raises: TemplateRefused."""
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
