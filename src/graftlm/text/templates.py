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
        return "['input']" in self.jinja or ".input" in self.jinja


# Shared by both frames. The last question is what the frame asks; with history every earlier message goes in front
# of it as Human:/Assistant: lines, as the card's inference does. A system message stands in its own paragraph before
# the frame: the frame's bytes, on which the model was trained, stay as they are.
_START = (
    "{{ bos_token }}"
    "{%- set turns = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ messages[0]['content'] + '\\n\\n' }}{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
    "{%- set answer = '' -%}"
    "{%- if turns[-1]['role'] == 'assistant' -%}"
    "{%- set answer = turns[-1]['content'] + eos_token -%}{%- set turns = turns[:-1] -%}"
    "{%- endif -%}"
    "{{ 'Below is an instruction that describes a task"
)
_REQUEST = ". Write a response that appropriately completes the request.\\n\\n### Instruction:\\n"
_QUESTION = (
    "{%- if turns | length == 1 -%}"
    "{{ turns[0]['content'] }}"
    "{%- else -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('a system message must come first') }}{%- endif -%}"
    "{{ ('' if loop.first else '\\n') + ('Assistant:' if message['role'] == 'assistant' else 'Human:')"
    " + message['content'] }}"
    "{%- if message['input'] and not loop.last -%}{{ '\\n' + message['input'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
)

_CARD = (
    _START + _REQUEST + "\\n' }}" + _QUESTION
    + "{{ ('\\n' + turns[-1]['input'] if turns[-1]['input'] else '') + '\\n\\n### Response:\\n\\n' + answer }}"
)  # fmt: skip

# Source: the prompts of tatsu-lab/stanford_alpaca, train.py (Apache-2.0).
_ALPACA = (
    _START + "' + (', paired with an input that provides further context' if turns[-1]['input'] else '') + '"
    + _REQUEST + "' }}" + _QUESTION
    + "{{ ('\\n\\n### Input:\\n' + turns[-1]['input'] if turns[-1]['input'] else '')"
    + " + '\\n\\n### Response:' + answer }}"
)  # fmt: skip

CARD = Template("card", _CARD, "last")
ALPACA = Template("alpaca", _ALPACA, "last")
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
                "The tokenizer has no chat template." if tokenizer else "No tokenizer to take the template from.",
                "Choose the template card or alpaca" + ("." if tokenizer else ", or name a tokenizer folder."),
            )
    elif name.endswith(".jinja"):
        source = _read(Path(name))
    else:
        raise UserError(
            f"No template is called {name!r}.", "Known are: card, alpaca, tokenizer, or the path of a .jinja file."
        )
    for template in BUILT_IN.values():
        if template.jinja == source:
            return template
    return Template(name, source, "all")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The template {path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(
            f"The template {path} cannot be read: {error.strerror}.", "Name a file, or choose card or alpaca."
        ) from None
