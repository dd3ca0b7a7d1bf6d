"""Readers: one for each format of dialogues; every row that cannot be used is counted with its reason.

Owns file formats (alpaca, BELLE, sharegpt, messages, plain text). Does not know tokens, limits or splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.recipe import looks_like_hub_id
from graftlm.text.dialogue import Conversation, Message
from graftlm.text.texts import read_lines

FORMATS = ("alpaca", "belle", "sharegpt", "messages", "text")
NUM_EXAMPLES = 3
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant"}
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]\s*")


@dataclass(slots=True)
class Dropped:
    """How many rows were dropped for each reason, with up to three examples (`file:row`)."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < NUM_EXAMPLES:
            shown.append(where)


class Unusable(Exception):
    """A row that cannot be read as a dialogue; the text is the reason that is counted."""


def read_conversations(
    path: str | Path, format: str = "auto", language: str = "new"
) -> tuple[list[Conversation], Dropped]:
    """The dialogues of a file, folder or hub data set, and what was dropped and why.

    Raises UserError: no such file, not UTF-8, not whole, or a format that cannot be told.
    """
    dropped = Dropped()
    kept = []
    reader: Callable[[Any], list[Message]] | None = None if format == "auto" else _READERS[format]
    for where, row in _rows(path, format == "text", dropped):
        if reader is None and isinstance(row, dict):
            reader = _READERS[detect_format(row, str(path))]
        try:
            if reader is None:
                raise Unusable("not an object of fields")
            messages = _checked(reader(row))
            if format != "text" and len(messages) == 1:
                raise Unusable("no question before the answer")
        except Unusable as reason:
            dropped.add(str(reason), where)
            continue
        kept.append(Conversation(tuple(messages), where, language))
    return kept, dropped


def detect_format(row: dict[str, Any], where: str) -> str:
    """The format of a file by its first row. Raises UserError naming the fields found."""
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if "instruction" in row and "output" in row:
        found = _TURN.search(str(row["instruction"]))
        return "belle" if found and found.group(1) == "Human" else "alpaca"
    if "input" in row and "target" in row:
        return "belle"
    if "text" in row:
        return "text"
    if "instruction" in row and isinstance(row.get("instances"), list):
        return "belle"
    raise UserError(
        f"{where}: its format cannot be told from the fields {', '.join(map(str, row))[:200]}.",
        f"Rename the fields, or name the format in the recipe (format: one of {', '.join(FORMATS)}).",
    )


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{key} is not text but {type(value).__name__}")
    return value


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise Unusable("not an object of fields")
    return row


def _alpaca(row: Any) -> list[Message]:
    row = _object(row)
    question, given = _text(row, "instruction").strip(), _text(row, "input").strip()
    asked = Message("user", question, given) if question and given else Message("user", question or given)
    return [asked, Message("assistant", _text(row, "output").strip())]


def _belle(row: Any) -> list[Message]:
    """BELLE's rows: `Human:…\\nAssistant:…` in the instruction, or all in `input` with the answer in `target`."""
    row = _object(row)
    if isinstance(row.get("conversations"), list):
        return _sharegpt(row)
    if isinstance(row.get("instances"), list):
        first = _object(row["instances"][0]) if row["instances"] else {}
        return _alpaca({"instruction": row.get("instruction"), **first})
    if "target" in row:
        row = {"instruction": row.get("input"), "output": row["target"]}
    asked = _text(row, "instruction")
    parts = _TURN.split(asked)
    if len(parts) < 3 or parts[0].strip():
        return _alpaca(row)
    roles = ["user" if role == "Human" else "assistant" for role in parts[1::2]]
    turns = [Message(role, said.strip()) for role, said in zip(roles, parts[2::2], strict=True)]
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return [*turns, Message("assistant", _text(row, "output").strip())]


def _sharegpt(row: Any) -> list[Message]:
    found = _object(row).get("conversations")
    if not isinstance(found, list):
        raise Unusable("conversations is not a list")
    return [_message(turn, "from", "value") for turn in found]


def _messages(row: Any) -> list[Message]:
    found = _object(row).get("messages")
    if not isinstance(found, list):
        raise Unusable("messages is not a list")
    return [_message(turn, "role", "content") for turn in found]


def _message(turn: Any, role_key: str, text_key: str) -> Message:
    turn = _object(turn)
    role = str(turn.get(role_key)).lower()
    if role == "system":
        return Message("system", _text(turn, text_key).strip())
    if role not in _ROLES:
        raise Unusable(f"an unknown role: {role[:40]}")
    return Message(_ROLES[role], _text(turn, text_key).strip(), _text(turn, "input").strip())


def _plain(row: Any) -> list[Message]:
    said = row if isinstance(row, str) else _text(_object(row), "text")
    return [Message("assistant", said)] if said.strip() else []


_READERS: dict[str, Callable[[Any], list[Message]]] = {
    "alpaca": _alpaca, "belle": _belle, "sharegpt": _sharegpt, "messages": _messages, "text": _plain,
}  # fmt: skip


def _checked(messages: list[Message]) -> list[Message]:
    """A dialogue one can learn from: turns in order, nothing empty, an answer at the end."""
    if not messages:
        raise Unusable("empty")
    for message in messages:
        if any("\ud800" <= char <= "\udfff" for char in message.content + message.input):
            raise Unusable("broken Unicode (lone surrogates)")
    turns = [message for message in messages if message.role != "system"]
    if [m.role for m in messages[1:]].count("system") or not turns:
        raise Unusable("turns out of order")
    if len(turns) == 1 and turns[0].role == "assistant":
        return messages  # plain text
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    if [turn.role for turn in turns] != expected[: len(turns)]:
        raise Unusable("turns out of order")
    if turns[-1].role == "user":
        raise Unusable("no answer at the end")
    if not all(turn.content.strip() for turn in turns if turn.role == "assistant"):
        raise Unusable("an empty answer")
    if not all(turn.content.strip() for turn in turns):
        raise Unusable("an empty question")
    return messages


def _rows(path: str | Path, is_text: bool, dropped: Dropped) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with where it stands."""
    file = Path(path)
    if not file.exists() and looks_like_hub_id(str(path)):
        yield from _numbered(str(path), _hub_rows(str(path)))
    elif file.is_dir():
        names = sorted(p for p in file.iterdir() if p.suffix in (".jsonl", ".json", ".parquet"))
        if not names:
            raise UserError(f"{file} holds no .jsonl, .json or .parquet file.", "Give a folder of such files.")
        for name in names:
            yield from _rows(name, is_text, dropped)
    elif is_text and file.suffix not in (".jsonl", ".json", ".parquet"):
        blocks = "\n".join(read_lines(file)).split("\n\n")
        yield from _numbered(str(file), (block for block in blocks if block.strip()))
    elif file.suffix == ".parquet":
        yield from _numbered(str(file), _parquet_rows(file))
    elif file.suffix == ".json":
        yield from _numbered(str(file), _json_rows(file))
    else:
        for number, line in enumerate(read_lines(file), start=1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except (ValueError, RecursionError):
                    dropped.add("not JSON", f"{file}:{number}")


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


def _json_rows(path: Path) -> list[Any]:
    try:
        content = json.loads("\n".join(read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not whole JSON ({error}).", "Mend the file, or give one row a line as .jsonl."
        ) from None
    return content if isinstance(content, list) else [content]


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}).", "Copy or download it again.") from None


def _hub_rows(name: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise UserError(
            f"{name}: no such file, and it could not be fetched as a hub data set ({type(error).__name__}).",
            "Check the path, or the id and the network.",
        ) from error
