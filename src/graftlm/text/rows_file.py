"""Token rows on their way to disk: appended a stretch at a time, whole or not there at the end.

Owns the writing of the folder that `TokenRows.load` reads. Memory holds one stretch, whatever the number of rows. Does
not know what the tokens say.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graftlm.errors import DiskError
from graftlm.run import disk_errors
from graftlm.text.dialogue import Rendered
from graftlm.text.rows import ARRAYS, FORMAT_VERSION, SOURCES, RowsBuilder, TokenRows, sha256_of

STRETCH_TOKENS = 2**20
"""Tokens that are collected before they are written: some 3 MiB."""


class RowsFile:
    """A folder of rows being written. Use `rows_file`, which makes it whole."""

    def __init__(self, folder: Path, num_pieces: int) -> None:
        self.num_rows = 0
        self._folder, self._num_pieces = folder, num_pieces
        self._recent = RowsBuilder(num_pieces)
        self._counts = {"rows": 0, "tokens": 0, "targets": 0, "target_bytes": 0}
        self._files: dict[str, BinaryIO] = {}
        self._types: dict[str, np.dtype] = {}

    def add(self, row: Rendered, source: str) -> None:
        """Append one row; `source` is its "file:line"."""
        self._recent.add(row, source)
        self.num_rows += 1
        if self._recent.num_tokens >= STRETCH_TOKENS:
            self._write_recent()

    def _write_recent(self) -> None:
        rows, self._recent = self._recent.rows(), RowsBuilder(self._num_pieces)
        self.append(rows)

    def append(self, rows: TokenRows) -> None:
        """Append rows that lie in memory. Raises DiskError, OSError."""
        needed_bytes = sum(getattr(rows, name).nbytes for name in ARRAYS)
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < needed_bytes:
            raise DiskError(
                f"The token rows need {needed_bytes:,} bytes more below {self._folder.parent} and {free_bytes:,} are "
                "free.",
                "Free space or choose another --out, then run the same command again.",
            )
        is_first = not self._files
        for name in ARRAYS:
            array = getattr(rows, name)
            if is_first:
                self._files[name], self._types[name] = (self._folder / f"{name}.npy").open("wb"), array.dtype
                _write_header(self._files[name], array.dtype, 0)
            if name == "offsets":
                array = array[not is_first :] + self._counts["tokens"]
            self._files[name].write(array.astype(self._types[name]).tobytes())
        if is_first:
            self._files[SOURCES] = (self._folder / SOURCES).open("wb")
        self._files[SOURCES].write("".join(f"{one}\n" for one in rows.sources).encode(errors="backslashreplace"))
        found = (len(rows), rows.num_tokens, rows.num_targets, rows.num_target_bytes)
        for name, number in zip(self._counts, found, strict=True):
            self._counts[name] += number

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write what is left, how long the arrays became, and the account of it all. Raises DiskError, OSError."""
        self._write_recent()
        rows, tokens = self._counts["rows"], self._counts["tokens"]
        lengths = {"ids": tokens, "is_target": tokens, "offsets": rows + 1, "target_bytes": rows}
        for name, length in lengths.items():
            self._files[name].seek(0)
            _write_header(self._files[name], self._types[name], length)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        digests = {name: sha256_of(self._folder / name) for name in (*(f"{name}.npy" for name in ARRAYS), SOURCES)}
        with (self._folder / "meta.json").open("w", encoding="utf-8") as stream:
            json.dump({**meta, **self._counts, "sha256": digests}, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """NumPy's header of an array; it leaves room for the length to grow, so that it is as long for any."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, description)


@contextlib.contextmanager
def rows_file(folder: Path, num_pieces: int, meta: Mapping[str, Any]) -> Iterator[RowsFile]:
    """A folder of rows to append to: complete at the end or, where that is not reached, not there. An older one is
    replaced. Raises DiskError."""
    partial: Path | None = None
    file: RowsFile | None = None
    try:
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(f".{folder.name}-*"):  # of a kill
                shutil.rmtree(left)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.chmod(partial, 0o755)
            file = RowsFile(partial, num_pieces)
            yield file
            file.finish({"format_version": FORMAT_VERSION, **meta})
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # of a full disk: what stopped the writing matters more
                file.close()
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def save_rows(rows: TokenRows, folder: str | Path) -> None:
    """Write `rows` so that `folder` is either complete or not there; an older one is replaced. Raises: DiskError."""
    with rows_file(Path(folder), rows.meta.get("num_pieces", 0), rows.meta) as file:
        file.append(rows)
