"""Prompts a person brings: rows of a JSONL file, and conversations saved and loaded again.

Owns the forms a prompt may have and what is said about one that has none of them. Does not know models. Rows to
train on are read in `text/corpus.py`; these here need no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from graftlm.errors import UserError
from graftlm.run import disk_errors
from graftlm.text.dialogue import Conversation, Message, Role

FORMS = (
    '{"prompt": "…"}, {"instruction": "…", "input": "…"}, {"messages": [{"role": "user", "content": "…"}]} or a string'
)
_ROLES = tuple(role for role in get_args(Role) if role != "text")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One line of a prompts file (from 1): what it held, and the conversation or what is wrong with it."""

    line: int
    value: Any
    conversation: Conversation | None
    problem: str = ""


def read_prompts(path: Path) -> Iterator[PromptRow]:
    """Every line that is not blank. Raises UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.", f"Give a JSONL file of prompts, one a line: {FORMS}.")
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
                conversation = conversation_of(value, f"{path}:{line}")
            except UnicodeDecodeError as error:
                yield PromptRow(line, None, None, f"not UTF-8 (byte {error.start})")
            except (json.JSONDecodeError, RecursionError):
                yield PromptRow(line, None, None, "not JSON")
            except ValueError as error:
                yield PromptRow(line, None, None, str(error))
            else:
                yield PromptRow(line, value, conversation)


def conversation_of(value: Any, source: str = "") -> Conversation:
    """The conversation a JSON value asks to be continued. Raises ValueError saying what is wrong."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, expected {FORMS}")
    if "messages" in value:
        messages = _messages(value["messages"])
    elif "instruction" in value:
        messages = (Message("user", _text(value, "instruction"), _text(value, "input", is_optional=True)),)
    elif "prompt" in value:
        messages = (Message("user", _text(value, "prompt")),)
    else:
        raise ValueError(f"has none of the keys prompt, instruction, messages; it has {', '.join(value) or 'none'}")
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise ValueError("asks nothing: its question is empty")
    return Conversation(messages, source)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"messages is a {type(value).__name__}, expected a list")
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict) or item.get("role") not in _ROLES or not isinstance(item.get("content"), str):
            raise ValueError(f"message {number} needs a role of {', '.join(_ROLES)} and a content that is text")
        messages.append(Message(item["role"], _whole(item["content"])))
    return tuple(messages)


def _text(value: dict[str, Any], key: str, *, is_optional: bool = False) -> str:
    text = value.get(key)
    if text is None and is_optional:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{key} is a {type(text).__name__}, expected text")
    return _whole(text)


def _whole(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Write a conversation as one line of JSON. Raises UserError rather than overwrite anything else; DiskError."""
    if path.exists():
        try:
            load_conversation(path)
        except UserError:
            raise UserError(f"{path} exists and is not a saved conversation.", "Choose another name.") from None
    row = {"messages": [{"role": m.role, "content": m.content} for m in conversation.messages]}
    with disk_errors(path.parent):
        try:
            path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"There is no folder {path.parent}.", "Choose a name in a folder that exists.") from None


def load_conversation(path: Path) -> Conversation:
    """Read what `save_conversation` wrote: the last row of a JSONL file. Raises UserError."""
    rows = list(read_prompts(path))
    if not rows:
        raise UserError(f"{path} is empty.", "Choose a saved conversation.")
    if rows[-1].conversation is None:
        raise UserError(f"{path}:{rows[-1].line} {rows[-1].problem}.", "Choose a saved conversation.")
    return rows[-1].conversation
