"""Lines of text files: their encoding, where they stand, and documents made of them.

Owns that text is UTF-8, what is said when it is not, and how long a line may be. Does not know what lines hold, nor how
a file is packed (`unpacked.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.text.unpacked import inner_name, unpacked, unpacking_command

LONGEST_LINE_BYTES = 2**28
"""A line lies in memory whole, and a small packed file may hold an endless one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands, what it holds, or what is wrong with it."""

    where: str
    value: Any
    problem: str = ""


def read_lines(path: str | Path, *, longest_bytes: int = LONGEST_LINE_BYTES) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends. Raises UserError as `raw_lines`, and for another encoding."""
    for number, raw in raw_lines(Path(path), longest_bytes=longest_bytes):
        try:
            yield decoded(raw, number)
        except UnicodeDecodeError as error:
            raise not_utf8(Path(path), number, error) from None


def documents(path: Path) -> Iterator[Row]:
    """The blocks between blank lines, each where it begins. Raises UserError as `read_lines`."""
    block: list[str] = []
    first = 1
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield Row(f"{path}:{first}", "\n".join(block))
            block = []
    if block:
        yield Row(f"{path}:{first}", "\n".join(block))


def raw_lines(path: Path, *, longest_bytes: int = LONGEST_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """Lines as bytes, with their ends and numbers (from 1), of a packed file those within.

    Raises UserError for a file that is missing or not whole, and for a line beyond `longest_bytes`.
    """
    with unpacked(path) as stream:
        for number in count(1):
            raw = stream.readline(longest_bytes + 1)
            if not raw:
                return
            if len(raw) > longest_bytes:
                raise UserError(
                    f"{path}:{number}: a line of more than {longest_bytes:,} bytes.",
                    "Give one row a line, or leave that line out; is this a file of text?",
                )
            yield number, raw


def decoded(raw: bytes, number: int) -> str:
    """A line without its end, and without the byte order mark on line 1. Raises UnicodeDecodeError."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> UserError:
    """What to tell about a line that is not UTF-8."""
    try:
        error.object.decode("gb18030")
        found = "it reads as GB18030, as older Chinese files do"
        unpack, inner = unpacking_command(path), inner_name(path)
        read, given = (f"{unpack} | ", "") if unpack else ("", f" {path}")
        fix = f"Convert it: {read}iconv -f GB18030 -t UTF-8{given} > {inner.stem}.utf8{inner.suffix}"
    except UnicodeDecodeError:
        found, fix = "nor is it GB18030", "Convert it to UTF-8, or remove that line."
    return UserError(f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); {found}.", fix)
