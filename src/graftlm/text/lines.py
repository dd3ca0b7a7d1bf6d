"""Lines of text files: their encoding, where they stand, and documents made of them.

Owns that text is UTF-8 and what is said when it is not. Does not know what lines hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands, what it holds, or what is wrong with it."""

    where: str
    value: Any
    problem: str = ""


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends. Raises UserError for a missing file or another encoding."""
    for number, raw in raw_lines(Path(path)):
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


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines as bytes, with their ends and numbers (from 1). Raises UserError for a missing file."""
    try:
        with path.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the path of an existing file.") from None


def decoded(raw: bytes, number: int) -> str:
    """A line without its end, and without the byte order mark on line 1. Raises UnicodeDecodeError."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> UserError:
    """What to tell about a line that is not UTF-8."""
    try:
        error.object.decode("gb18030")
        found = "it reads as GB18030, as older Chinese files do"
        fix = f"Convert it: iconv -f GB18030 -t UTF-8 {path} > {path.stem}.utf8{path.suffix}"
    except UnicodeDecodeError:
        found, fix = "nor is it GB18030", "Convert it to UTF-8, or remove that line."
    return UserError(f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); {found}.", fix)
