"""Prompts a person brings: rows of a JSONL file, and conversations saved and loaded again.

Owns the forms a prompt may have and what is said about one that has none of them. Does not know models. Rows to
train on are read in `text/corpus.py`; these here need no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from graftlm.errors import UserError
from graftlm.run import disk_errors
from graftlm.text.dialogue import Conversation, Message, Role

FORMS = (
    '{"prompt": "…"}, {"instruction": "…", "input": "…"}, {"messages": [{"role": "user", "content": "…"}]} or a string'
)
TITLES_TOLD, TITLE_CHARS = 20, 60
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
                value = _parsed(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
                conversation = conversation_of(value, f"{path}:{line}")
            except UnicodeDecodeError as error:
                yield PromptRow(line, None, None, f"not UTF-8 (byte {error.start})")
            except ValueError as error:
                yield PromptRow(line, None, None, str(error))
            else:
                yield PromptRow(line, value, conversation)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # Python refuses a number of thousands of digits in words of its own
        raise ValueError("not JSON") from None


def conversation_of(value: Any, source: str = "") -> Conversation:
    """The conversation a JSON value asks to be continued. Raises ValueError saying what is wrong."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}, expected {FORMS}")
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
        raise ValueError(f"messages is {_kind(value)}, expected a list")
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
        raise ValueError(f"{key} is {_kind(text)}, expected text")
    return _whole(text)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "no value of JSON")


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
            raise UserError(
                f"{path} exists and is not a saved conversation, or not one alone.", "Choose another name."
            ) from None
    row = {"messages": [{"role": m.role, "content": m.content} for m in conversation.messages]}
    with disk_errors(path.parent):
        try:
            path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        except FileNotFoundError:
            if path.parent.is_dir():  # such as /proc
                raise UserError(f"{path.parent} takes no files.", "Choose a name in another folder.") from None
            raise no_folder(path.parent) from None


def no_folder(folder: Path) -> UserError:
    """What is told when a file is to be written into a folder that is not there: none is made by a slip of a key."""
    return UserError(f"There is no folder {folder}.", "Make it first, or choose a name in a folder that exists.")


def load_conversation(path: Path, number: int | None = None) -> Conversation:
    """Conversation `number` (from 1) of a JSONL file; without a number the only one. Raises UserError."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.", "Give one that /save wrote, or an export of the page.")
    rows = list(read_prompts(path))
    if not rows:
        raise UserError(f"{path} is empty.", "Choose a saved conversation.")
    if all(row.conversation is None for row in rows):
        others = f", and no other of its {len(rows):,} rows is a conversation" if len(rows) > 1 else ""
        raise UserError(f"{path}:{rows[0].line} {rows[0].problem}{others}.", "Choose a saved conversation.")
    if number is None and len(rows) > 1:
        told = "\n".join([f"{path} holds {len(rows)} conversations:", *_titles(rows)])
        raise UserError(told, f"\nSay which: /load {path} 1")
    if number is not None and not 1 <= number <= len(rows):
        raise UserError(f"{path} holds no conversation {number}.", f"Choose one from 1 to {len(rows)}.")
    row = rows[(number or 1) - 1]
    if row.conversation is None:
        raise UserError(f"{path}:{row.line} {row.problem}.", "Choose a saved conversation.")
    return row.conversation


def _titles(rows: Sequence[PromptRow]) -> list[str]:
    """A line for each of the first rows: its number, and its title or first question."""
    lines = []
    for number, row in enumerate(rows[:TITLES_TOLD], start=1):
        asked = next((m.content for m in row.conversation.messages if m.role == "user"), "") if row.conversation else ""
        title = row.value.get("title") if isinstance(row.value, dict) else None
        said = " ".join((title if isinstance(title, str) and title.strip() else asked or row.problem).split())
        lines.append(f"  {number}  {said[:TITLE_CHARS]}{'…' if len(said) > TITLE_CHARS else ''}")
    return [*lines, "  …"] if len(rows) > TITLES_TOLD else lines
