"""Readers: one for each format of dialogues; every row that cannot be used is counted with its reason.

Owns what the fields of a row mean (alpaca, BELLE, sharegpt, messages, plain text), which format a file is in, and what
is asked of a dialogue. File forms lie in `files.py`, unwanted characters in `clean.py`. Does not know tokens, limits
or splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from graftlm.errors import UserError
from graftlm.recipe import Source
from graftlm.run import progress
from graftlm.text.clean import BrokenText, clean, script_share, simplifier
from graftlm.text.dialogue import Conversation, Message, Role
from graftlm.text.files import File, open_files
from graftlm.text.lines import Row
from graftlm.text.tally import Tally

NUM_ROWS_LOOKED_AT = 100
EMPTY = "empty"  # in place of a format, of a file without a row
Format = Literal["auto", "alpaca", "belle", "sharegpt", "messages", "text"]
_SENDERS: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
_TOOL_SENDERS = frozenset({"tool", "function", "function_call", "tool_call", "observation", "ipython"})

# BELLE's several turns in one field. Only the beginning of a line counts, and only blanks may stand before the name:
# `\s*` there would cross lines, in quadratic time on a field of many newlines.
_TURN = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")
_TURNS = re.compile(r"\s*Human[ \t]*[:：].*\n[ \t]*Assistant[ \t]*[:：]\s*\Z", re.DOTALL)


class Unusable(Exception):
    """A row that cannot be read as a dialogue; the text is the reason that is counted."""


@dataclass(slots=True)
class Reading:
    """What reading one source gave.

    `conversations` are what is left, where `read_source` keeps them; `dropped` counts rows by reason, `cut` rows that
    lost a part, `cleaned` rows from which characters went. `files` tells each file's format, rows and the fields nobody
    reads.
    """

    conversations: list[Conversation] = field(default_factory=list)
    num_rows: int = 0
    dropped: Tally = field(default_factory=Tally)
    cut: Tally = field(default_factory=Tally)
    cleaned: Tally = field(default_factory=Tally)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_source(source: Source, *, is_first_look: bool = False) -> Reading:
    """Every row of a source as a dialogue, or counted as dropped: `num_rows` is the sum of both.

    A first look reads only the first rows of each file. Raises UserError as `dialogues_of`.
    """
    reading = Reading()
    reading.conversations.extend(dialogues_of(source, reading, is_first_look=is_first_look))
    return reading


def dialogues_of(source: Source, reading: Reading, *, is_first_look: bool = False) -> Iterator[Conversation]:
    """The dialogues of a source one after another, none of them kept; what else there is to tell is counted in
    `reading` on the way.

    Raises UserError: no such file, not whole, foreign, without rows, or a format that cannot be told.
    """
    for file in open_files(source.path, split=source.split, config=source.config):
        yield from _read_file(file, source, reading, is_first_look)
    if not reading.num_rows:
        raise UserError(f"{source.path} holds no row.", "Give a file with one dialogue a row.")


def read_conversations(
    path: str | Path, format: Format = "auto", language: Literal["new", "old"] = "new"
) -> tuple[list[Conversation], Tally]:
    """The dialogues of a file, folder or hub data set, and what was dropped and why. Raises UserError."""
    reading = read_source(Source(path=str(path), format=format, language=language))
    return reading.conversations, reading.dropped


def detect_format(rows: Sequence[Row], name: str) -> str:
    """The format of a file by its first rows. Raises UserError naming the fields found."""
    found = {one for row in rows if (one := _format_of(row.value))}
    if found <= {"alpaca", "belle"} and found:
        return "belle" if "belle" in found else "alpaca"
    for row in rows:
        if one := _format_of(row.value):
            return one
    values = [row.value for row in rows if not row.problem]
    if values and all(isinstance(value, str) for value in values):
        return "text"
    first = next((value for value in values if isinstance(value, dict)), None)
    seen = f"the fields {', '.join(map(str, first))[:200]}" if first else f"its first {len(rows)} rows"
    raise UserError(
        f"{name}: its format cannot be told from {seen}.",
        "Rename the fields (instruction and output; conversations; messages; text), or name the format: --format for "
        "graftlm data, `format:` in a recipe.",
    )


def _format_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(turns := row.get("conversations"), list):
        # BELLE's published file of several turns has ShareGPT's fields, but calls who answers by another name.
        return (
            "belle" if any(isinstance(turn, dict) and turn.get("from") == "assistant" for turn in turns) else "sharegpt"
        )
    if "instruction" in row and "output" in row:
        asked = row["instruction"]
        return "belle" if isinstance(asked, str) and not row.get("input") and _TURNS.match(asked) else "alpaca"
    if ("input" in row and "target" in row) or ("instruction" in row and isinstance(row.get("instances"), list)):
        return "belle"
    return "text" if "text" in row else None


def _read_file(file: File, source: Source, reading: Reading, is_first_look: bool) -> Iterator[Conversation]:
    if file.form == "text" and source.format not in ("auto", "text"):
        raise UserError(
            f"{file.name} is plain text, not {source.format}.", "Give rows of fields, or leave the format out."
        )
    rows = file.rows
    first = list(islice(rows, NUM_ROWS_LOOKED_AT))
    rows = iter(first) if is_first_look else chain(first, rows)
    if not first:
        reading.files[file.name] = {"format": EMPTY, "rows": 0}
        return
    format = source.format
    if format == "auto":
        format = "text" if file.form == "text" else detect_format(first, file.name)
    unread: set[str] = set()
    num_before = reading.num_rows
    for row in progress(rows, file.num_rows, f"read {Path(file.name).name}"):
        for one in _instances(row):
            reading.num_rows += 1
            conversation = _read_row(one, format, source, reading)
            if conversation is not None:
                yield conversation
        if isinstance(row.value, dict):
            unread |= row.value.keys() - _FIELDS[format]
    facts = {"format": format, "rows": reading.num_rows - num_before}
    reading.files[file.name] = facts | ({"fields_not_read": sorted(map(str, unread))[:20]} if unread else {})


def _instances(row: Row) -> Iterator[Row]:
    """BELLE's seed tasks hold one instruction and a list of inputs with outputs: each is a row of its own."""
    value = row.value
    if not isinstance(value, dict) or not isinstance(value.get("instances"), list) or not value["instances"]:
        yield row
        return
    several = len(value["instances"]) > 1
    for number, one in enumerate(value["instances"], start=1):
        where = f"{row.where}[{number}]" if several else row.where
        if isinstance(one, dict):
            yield Row(where, {"instruction": value.get("instruction"), **one})
        else:
            yield Row(where, None, "an instance is no object of fields")


def _read_row(row: Row, format: str, source: Source, reading: Reading) -> Conversation | None:
    try:
        if row.problem:
            raise Unusable(row.problem)
        messages = _cleaned(_READERS[format](row.value), row.where, reading)
        if source.simplify:
            change = simplifier()
            messages = [replace(m, content=change(m.content), input=change(m.input)) for m in messages]
        messages = _checked(messages, row.where, reading)
        conversation = Conversation(tuple(messages), row.where, source.language)
        if source.script and script_share(conversation.text, source.script) < source.min_script_share:
            raise Unusable(f"less than {source.min_script_share:g} of its letters in script {source.script}")
    except Unusable as reason:
        reading.dropped.add(str(reason), row.where)
        return None
    return conversation


def _cleaned(messages: list[Message], where: str, reading: Reading) -> list[Message]:
    cleaned, done = [], []
    for message in messages:
        try:
            content, in_content = clean(message.content)
            given, in_given = clean(message.input)
        except BrokenText as error:
            raise Unusable(str(error)) from None
        done += in_content + in_given
        cleaned.append(Message(message.role, content.strip(), given.strip()))
    for what in dict.fromkeys(done):
        reading.cleaned.add(what, where)
    return cleaned


def _checked(messages: list[Message], where: str, reading: Reading) -> list[Message]:
    """A dialogue one can learn from: turns in order, nothing empty, an answer at the end."""
    if len(messages) == 1 and messages[0].role == "text":
        if not messages[0].content:
            raise Unusable("an empty text")
        return messages
    if messages and messages[0].role == "system" and not messages[0].content:
        messages = messages[1:]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise Unusable("no turn at all")
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    if [turn.role for turn in turns] != expected[: len(turns)]:
        raise Unusable("no question before the answer" if turns[0].role == "assistant" else "turns out of order")
    if turns[-1].role == "user":
        if len(turns) == 1:
            raise Unusable("no answer")
        reading.cut.add("a last question without an answer", where)
        messages, turns = messages[:-1], turns[:-1]
    for turn in turns:
        if not turn.content:
            raise Unusable("an empty answer" if turn.role == "assistant" else "an empty question")
    return messages


# ------------------------------------------------------------------------------------------ the formats, field by field


def _object(value: Any, what: str = "not an object of fields") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unusable(what)
    return value


def _text(row: dict[str, Any], key: str, *, is_needed: bool = False) -> str:
    value = row.get(key)
    if value is None:
        if is_needed and key not in row:
            raise Unusable(f"no field {key}")
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{key} is not text but {type(value).__name__}")
    return value


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise Unusable(f"no field {key}" if key not in row else f"{key} is not a list but {type(value).__name__}")
    return value


def _system(row: dict[str, Any]) -> list[Message]:
    said = _text(row, "system")
    return [Message("system", said)] if said.strip() else []


def _alpaca(row: Any) -> list[Message]:
    """`instruction`, `input`, `output`; some also keep a `system` text and a `history` of [question, answer]."""
    row = _object(row)
    question = _text(row, "instruction", is_needed=True)
    given = _text(row, "input")
    earlier: list[Message] = []
    for pair in _list(row, "history") if row.get("history") is not None else ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair)):
            raise Unusable("history is not a list of [question, answer]")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = Message("user", question, given) if question.strip() else Message("user", given)
    answer = Message("assistant", _text(row, "output", is_needed=True))
    return [*_system(row), *earlier, asked, answer]


def _belle(row: Any) -> list[Message]:
    """BELLE's forms: alpaca's fields; all in `input` with the answer in `target`; `Human:…\\nAssistant:…` turns in the
    instruction; or conversations."""
    row = _object(row)
    if isinstance(row.get("conversations"), list):
        return _sharegpt(row)
    if "target" in row and "output" not in row:
        row = {"instruction": row.get("input"), "output": row["target"]}
    asked = _text(row, "instruction")
    if _text(row, "input").strip() or not _TURNS.match(asked):
        return _alpaca(row)
    parts = _TURN.split(asked)
    turns = [
        Message("user" if name == "Human" else "assistant", said)
        for name, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return [*turns[:-1], Message("assistant", _text(row, "output", is_needed=True))]


def _sharegpt(row: Any) -> list[Message]:
    row = _object(row)
    turns = [_message(turn, "from", "value") for turn in _list(row, "conversations")]
    return [*_system(row), *turns] if not turns or turns[0].role != "system" else turns


def _messages(row: Any) -> list[Message]:
    return [_message(turn, "role", "content") for turn in _list(_object(row), "messages")]


def _message(turn: Any, role_key: str, text_key: str) -> Message:
    turn = _object(turn, "a turn is no object of fields")
    sender = _text(turn, role_key, is_needed=True).strip().lower()
    if sender in _TOOL_SENDERS or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("a turn that calls or answers a tool")
    if sender not in _SENDERS:
        raise Unusable("a turn of an unknown sender")
    if turn.get("weight") == 0:
        raise Unusable("an answer of weight 0, which is not to be learned")
    if isinstance(turn.get(text_key), list):
        turn = {**turn, text_key: _joined_parts(turn[text_key])}
    return Message(_SENDERS[sender], _text(turn, text_key, is_needed=True), _text(turn, "input"))


def _joined_parts(parts: list[Any]) -> str:
    """OpenAI's content as a list of parts; only text can be learned."""
    said = []
    for part in parts:
        if isinstance(part, str):
            said.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            said.append(part["text"])
        else:
            raise Unusable("a part of a turn that is not text")
    return "".join(said)


def _plain(row: Any) -> list[Message]:
    return [Message("text", row if isinstance(row, str) else _text(_object(row), "text", is_needed=True))]


_READERS: dict[str, Callable[[Any], list[Message]]] = {
    "alpaca": _alpaca, "belle": _belle, "sharegpt": _sharegpt, "messages": _messages, "text": _plain,
}  # fmt: skip
_FIELDS: dict[str, frozenset[str]] = {
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "belle": frozenset({"instruction", "input", "output", "target", "instances", "conversations", "system"}),
    "sharegpt": frozenset({"conversations", "system"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
}
