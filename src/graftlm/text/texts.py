"""Plain texts out of files of any kind: what tokenizers learn from and are measured on.

Owns what of a row is text. Does not know conversations: of a row it takes every string that is no label, joined by
newlines. File forms lie in `files.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.text.files import open_files
from graftlm.text.lines import read_lines

COLUMN_NAMES_NOT_SAID = frozenset({"id", "from", "role", "kind", "source", "language"})
"""Fields whose strings are labels, not text."""


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file: lines of plain text, rows of anything else. Raises UserError naming file and line."""
    for file in open_files(path):
        if file.form == "text":
            yield from read_lines(file.name)
            continue
        for row in file.rows:
            if row.problem:
                raise UserError(f"{row.where}: {row.problem}.", "Mend or remove that row.")
            yield _said(row.value)


def first_texts(paths: Iterable[str | Path], number: int) -> list[str]:
    """The first `number` texts of the files that are not blank. Raises UserError as `read_texts`."""
    return list(islice((text for path in paths for text in read_texts(path) if text.strip()), number))


def _said(row: Any) -> str:
    """Every string of a row that is text and not a label, joined by newlines; a stack, as rows may be nested deeply."""
    said: list[str] = []
    left = [row]
    while left:
        value = left.pop()
        if isinstance(value, str):
            said.append(value)
        elif isinstance(value, list):
            left += reversed(value)
        elif isinstance(value, dict):
            left += reversed([one for name, one in value.items() if name not in COLUMN_NAMES_NOT_SAID])
    return "\n".join(filter(None, said))


__all__ = ["first_texts", "read_lines", "read_texts"]
