"""The chat templates, as jinja strings.

Owns the exact wording put around a conversation. The same string is exported as the tokenizer's chat_template, so
training and serving cannot drift apart. Does not know tokens: `dialogue` renders these and finds the answers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graftlm.errors import UserError

if TYPE_CHECKING:
    from graftlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """A chat template and how conversations become training rows under it.

    `answers_per_row` "last": a conversation of k answers is k rows, each ending in one answer (for templates that
    put the history inside one frame); "all": one row, every answer in it is learned.
    """

    name: str
    jinja: str
    answers_per_row: Literal["last", "all"]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides what is rendered."""
        return hashlib.sha256(f"{self.answers_per_row}\n{self.jinja}".encode()).hexdigest()

    @property
    def knows_input(self) -> bool:
        """Whether the template prints a message's `input` itself (Alpaca's second field)."""
        return "message.input" in self.jinja


# Shared by both frames. The last question is what the frame asks; with history every earlier message goes in front
# of it as Human:/Assistant: lines, as the card's inference does. A system message stands in its own paragraph before
# the frame: the frame's bytes, on which the model was trained, stay as they are.
_HISTORY = (
    "{{ bos_token }}"
    "{%- set ns = namespace(asked='', input='', turns=0, answer='', answered=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}"
    "{%- elif message.role == 'assistant' and loop.last -%}"
    "{%- set ns.answer = message.content -%}{%- set ns.answered = true -%}"
    "{%- else -%}"
    "{%- set name = 'Assistant' if message.role == 'assistant' else 'Human' -%}"
    "{%- if ns.input -%}{%- set ns.asked = ns.asked + '\\n' + ns.input -%}{%- set ns.input = '' -%}{%- endif -%}"
    "{%- if ns.turns == 0 and message.role != 'assistant' -%}{%- set ns.asked = message.content -%}"
    "{%- elif ns.turns == 1 -%}{%- set ns.asked = 'Human:' + ns.asked + '\\n' + name + ':' + message.content -%}"
    "{%- else -%}{%- set ns.asked = ns.asked + '\\n' + name + ':' + message.content -%}{%- endif -%}"
    "{%- if message.input -%}{%- set ns.input = message.input -%}{%- endif -%}"
    "{%- set ns.turns = ns.turns + 1 -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_END = "{%- if ns.answered -%}{{ ns.answer + eos_token }}{%- endif -%}"

_CARD_FRAME = (
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\\n\\n### Instruction:\\n\\n' + ns.asked + ('\\n' + ns.input if ns.input else '') + '\\n\\n### Response:\\n\\n' }}"
)

# Source: the prompts of tatsu-lab/stanford_alpaca, train.py (Apache-2.0).
_ALPACA_FRAME = (
    "{%- if ns.input -%}"
    "{{ 'Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\\n\\n### Instruction:\\n' + ns.asked + "
    "'\\n\\n### Input:\\n' + ns.input + '\\n\\n### Response:' }}"
    "{%- else -%}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\\n\\n### Instruction:\\n' + ns.asked + '\\n\\n### Response:' }}"
    "{%- endif -%}"
)

CARD = Template("card", _HISTORY + _CARD_FRAME + _END, "last")
ALPACA = Template("alpaca", _HISTORY + _ALPACA_FRAME + _END, "last")
BUILT_IN = {template.name: template for template in (CARD, ALPACA)}


def find_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The template called `name`: card, alpaca, tokenizer (the tokenizer's own), or a `.jinja` file.

    A tokenizer that carries one of the built-in strings yields that built-in template. Raises: UserError.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name == "tokenizer":
        source = tokenizer.chat_template if tokenizer else None
        if not source:
            raise UserError(
                "the tokenizer has no chat template" if tokenizer else "no tokenizer to take the template from",
                "choose the template card or alpaca" + ("" if tokenizer else ", or name a tokenizer folder"),
            )
    elif name.endswith(".jinja") and Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(
            f"no template is called {name!r}", "known are: card, alpaca, tokenizer, or the path of a .jinja file"
        )
    for template in BUILT_IN.values():
        if template.jinja == source:
            return template
    return Template(name, source, "all")
