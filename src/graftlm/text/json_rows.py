"""Rows out of JSON: one a line, or the elements of one array.

Owns bounds on hostile JSON and how a row is named: `file:line`, in an array `file item N`. Does not know what a row
means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.text.lines import Row, decoded, not_utf8, raw_lines, read_lines

LARGEST_ARRAY_BYTES = 2**31
"""An array lies in memory whole; a packed one may be a thousand times its file."""

_LONGEST_NUMBER = 300


class _Decoder:
    """JSON that tells a field given twice, and does not spend seconds on a number of a million digits."""

    def __init__(self) -> None:
        self._has_twin = False
        decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_number)
        self.whole, self._scan = decoder.decode, decoder.raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self._has_twin |= len(found) != len(pairs)
        return found

    def row(self, where: str, line: str) -> Row:
        """The row of one line."""
        try:
            value = self.whole(line)
        except (ValueError, RecursionError) as error:
            return Row(where, None, _json_problem(error))
        return self._row(where, value)

    def element(self, where: str, text: str, start: int) -> tuple[Row, int]:
        """The row starting at `start` and where it ends. Raises ValueError, RecursionError."""
        value, end = self._scan(text, start)
        return self._row(where, value), end

    def _row(self, where: str, value: Any) -> Row:
        has_twin, self._has_twin = self._has_twin, False
        return Row(where, None, "a field given twice") if has_twin else Row(where, value)


def _number(digits: str) -> float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")


def _json_problem(error: Exception) -> str:
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "not JSON"


def json_lines(path: Path) -> Iterator[Row]:
    """One row a line; a row that is not JSON is handed on with its problem. Raises UserError: not UTF-8."""
    decoder = _Decoder()
    has_seen_utf8 = False
    for number, raw in raw_lines(path):
        try:
            line = decoded(raw, number)
        except UnicodeDecodeError as error:
            if not has_seen_utf8:
                raise not_utf8(path, number, error) from None
            yield Row(f"{path}:{number}", None, "not UTF-8")  # one broken line in a file that is otherwise whole
            continue
        has_seen_utf8 |= not line.isascii()
        if line.strip():
            yield decoder.row(f"{path}:{number}", line)


def json_array(path: Path) -> Iterator[Row]:
    """The elements of one JSON array, by their number from 1; one object is one row. Raises UserError: not whole.

    An array is often written on a single line: of its elements the number says where, a line would not.
    """
    text = _whole_text(path)
    decoder = _Decoder()
    position, number, begin = _next(text, 0), 0, 0
    is_array = text[position : position + 1] == "["
    position = _next(text, position + is_array)
    is_done = is_array and text[position : position + 1] == "]"
    try:
        while position < len(text) and not is_done:
            number, begin = number + 1, position
            row, position = decoder.element(f"{path} item {number}" if is_array else f"{path}:1", text, position)
            yield row
            position = _next(text, position)
            found = text[position : position + 1]
            is_done = found == "]" if is_array else position == len(text)
            if not is_done and (found != "," or not is_array):
                raise ValueError(f"expected , or ] and found {found!r}" if found else "it ends in the middle")
            position = position if is_done else _next(text, position + 1)
        if is_array and not is_done:
            raise ValueError("it ends in the middle")
        if is_array and text[position + 1 :].strip():
            raise ValueError("more follows after its end")
    except (ValueError, RecursionError) as error:
        what = "JSON nested too deeply" if isinstance(error, RecursionError) else f"not whole JSON ({error})"
        fix = "Mend the file, or give one row a line as .jsonl: then a broken row is left out and counted."
        line = 1 + text.count("\n", 0, begin)
        item = f" item {number}:" if is_array and number else ""
        raise UserError(f"{path}:{line}:{item} {what}.", fix) from None


def _whole_text(path: Path) -> str:
    """All of a file's text. Raises UserError as `read_lines`, and where it is more than memory should hold."""
    lines, num_characters = [], 0
    for line in read_lines(path, longest_bytes=LARGEST_ARRAY_BYTES):
        num_characters += len(line) + 1
        if num_characters > LARGEST_ARRAY_BYTES:
            raise UserError(
                f"{path} holds more than {LARGEST_ARRAY_BYTES:,} characters, and a JSON array is read whole.",
                f"Give one row a line: jq -c '.[]' {path} > {path.stem}.jsonl",
            )
        lines.append(line)
    return "\n".join(lines)


def _next(text: str, position: int) -> int:
    """Where the next character that is no blank stands."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
