"""Plain texts out of files of any kind: what tokenizers learn from and are measured on.

Owns reading `.txt`, `.jsonl`, `.json`, `.parquet` and hub data sets as texts. Does not know conversations: of a row it
takes every string, joined by newlines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.recipe import looks_like_hub_id

COLUMN_NAMES_NOT_SAID = frozenset({"id", "from", "role", "kind", "source", "language"})
"""Fields whose strings are labels, not text."""


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file: lines of a `.txt`, rows of anything else. Raises UserError naming file and line."""
    file = Path(path)
    if not file.exists() and looks_like_hub_id(str(path)):
        yield from _hub_texts(str(path))
    elif file.is_dir():
        names = sorted(p for p in file.iterdir() if p.suffix in (".txt", ".jsonl", ".json", ".parquet"))
        for name in names:
            yield from read_texts(name)
    elif file.suffix == ".parquet":
        yield from _parquet_texts(file)
    elif file.suffix == ".json":
        yield from _json_texts(file)
    else:
        for number, line in enumerate(read_lines(file), start=1):
            if file.suffix != ".jsonl":
                yield line
            elif line.strip():
                yield _said(_parse(line, f"{file}:{number}"))


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends. Raises UserError for a missing file or another encoding."""
    number = 0
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); Chinese files are often GB18030.",
            f"Convert it: iconv -f GB18030 -t UTF-8 {path} > {path.stem}.utf8{path.suffix}",
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the path of an existing file.") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).", "Mend or remove that row.") from None


def _said(row: Any) -> str:
    """Every string of a row that is text and not a label, joined by newlines."""
    if isinstance(row, str):
        return row
    if isinstance(row, list):
        return "\n".join(filter(None, map(_said, row)))
    if isinstance(row, dict):
        return "\n".join(filter(None, (_said(v) for k, v in row.items() if k not in COLUMN_NAMES_NOT_SAID)))
    return ""


def _json_texts(path: Path) -> Iterator[str]:
    content = _parse("\n".join(read_lines(path)), str(path))
    for row in content if isinstance(content, list) else [content]:
        yield _said(row)


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}).", "Copy or download it again.") from None
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            yield _said(row)


def _hub_texts(name: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise UserError(
            f"{name}: no such file, and it could not be fetched as a hub data set ({type(error).__name__}).",
            "Check the path, or the id and the network.",
        ) from error
    for row in rows:
        yield _said(row)
