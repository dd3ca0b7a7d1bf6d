"""Token rows on disk: what a stage trains on, written once and mapped into memory.

Owns the folder of flat arrays and its promise: rows are only ever read back for the tokenizer, template and length
they were made with (a cache keyed by file name alone silently hands out old ids). Does not know what the tokens say.
On the road: the data step writes them, every stage and evaluation reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graftlm.errors import DiskError, UserError
from graftlm.run import disk_errors
from graftlm.text.dialogue import Rendered

if TYPE_CHECKING:
    from graftlm.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
_ARRAYS = ("ids", "is_target", "offsets", "target_bytes")
_SOURCES = "sources.txt"
_AGAIN = "Prepare the data again (graftlm run redoes the data step)."


@dataclass(frozen=True, slots=True)
class TokenRows:
    """R rows of T tokens in all. ids (T,) uint16/uint32, is_target (T,) bool, offsets (R+1,) int64,
    target_bytes (R,) int64: utf-8 bytes of the learned text of each row."""

    ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray
    target_bytes: np.ndarray
    sources: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of row `i`, each (length,)."""
        start, end = self.offsets[i], self.offsets[i + 1]
        return self.ids[start:end], self.is_target[start:end]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, (R,)."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def num_targets(self) -> int:
        """Tokens that are learned, of all rows."""
        return int(np.count_nonzero(self.is_target))

    @property
    def num_target_bytes(self) -> int:
        """UTF-8 bytes of the text those tokens stand for."""
        return int(self.target_bytes.sum())

    @classmethod
    def load(
        cls, folder: str | Path, *, tokenizer: Tokenizer | None = None, template_fingerprint: str | None = None
    ) -> TokenRows:
        """Map the rows in `folder`.

        Raises: UserError if they are missing, not as they were written, or of another tokenizer or template.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
                found = meta.get("format_version") if isinstance(meta, dict) else type(meta).__name__
                raise UserError(f"{folder} has row format {found}, this version reads {FORMAT_VERSION}.", _AGAIN)
            for name, digest in meta["sha256"].items():
                if _sha256(folder / name) != digest:
                    raise ValueError(f"{name} has changed since it was written")
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
            sources = (folder / _SOURCES).read_text(encoding="utf-8").split("\n")[:-1]
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = Path(error.filename).name
            raise UserError(f"{folder} holds no token rows: {missing} is missing.", _AGAIN) from None
        except (ValueError, EOFError, KeyError, AttributeError) as error:
            raise UserError(f"The token rows in {folder} are damaged: {error}.", _AGAIN) from None
        rows = cls(**arrays, sources=sources, meta=meta)
        if tokenizer is not None:
            _refuse_other(folder, meta, "tokenizer", tokenizer.fingerprint)
        if template_fingerprint is not None:
            _refuse_other(folder, meta, "template", template_fingerprint)
        return rows


def _refuse_other(folder: Path, meta: Mapping[str, Any], what: str, expected: str) -> None:
    found = str(meta.get(what))
    if found != expected:
        raise UserError(
            f"The token rows in {folder} were made with another {what} ({found[:12]}, not {expected[:12]}).", _AGAIN
        )


class RowsBuilder:
    """Collects rendered rows in flat buffers (2 or 4 bytes a token) until they are written."""

    def __init__(self, num_pieces: int) -> None:
        self._ids = array("H" if num_pieces <= 65_536 else "I")
        self._is_target = bytearray()
        self._offsets = array("q", [0])
        self._target_bytes = array("q")
        self._sources: list[str] = []

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, row: Rendered, source: str) -> None:
        """Append one row; `source` is its "file:line"."""
        self._ids.extend(array(self._ids.typecode, row.ids))  # half the time of extending by the list itself
        self._is_target.extend(row.is_target)
        self._offsets.append(len(self._ids))
        self._target_bytes.append(row.num_target_bytes)
        self._sources.append(" ".join(source.split("\n")))

    def rows(self, meta: Mapping[str, Any] | None = None) -> TokenRows:
        """The rows added so far, in memory."""
        ids = np.frombuffer(self._ids, np.uint16 if self._ids.typecode == "H" else np.uint32)
        return TokenRows(
            ids if len(self._ids) else ids.copy(), np.frombuffer(bytes(self._is_target), np.bool_),
            np.frombuffer(self._offsets, np.int64), np.frombuffer(self._target_bytes, np.int64),
            list(self._sources), {"format_version": FORMAT_VERSION, **(meta or {})},
        )  # fmt: skip


def rows_meta(tokenizer: Tokenizer, template_fingerprint: str, max_tokens: int) -> dict[str, Any]:
    """What the ids of rows depend on, besides the text."""
    return {
        "tokenizer": tokenizer.fingerprint, "num_pieces": tokenizer.num_pieces, "template": template_fingerprint,
        "max_tokens": max_tokens,
    }  # fmt: skip


def save_rows(rows: TokenRows, folder: str | Path) -> None:
    """Write `rows` so that `folder` is either complete or not there; an older one is replaced. Raises: DiskError."""
    folder = Path(folder)
    needed_bytes = sum(getattr(rows, name).nbytes for name in _ARRAYS)
    partial: Path | None = None
    try:
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(folder.parent).free
            if free_bytes < needed_bytes:
                raise DiskError(
                    f"The token rows need {needed_bytes:,} bytes below {folder.parent} and {free_bytes:,} are free.",
                    "Free space or choose another --out, then run the same command again.",
                )
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.chmod(partial, 0o755)
            _write(rows, partial)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _write(rows: TokenRows, folder: Path) -> None:
    digests = {}
    for name in _ARRAYS:
        with _HashedFile(folder / f"{name}.npy") as file:
            np.save(file, getattr(rows, name), allow_pickle=False)
        digests[f"{name}.npy"] = file.digest.hexdigest()
    with _HashedFile(folder / _SOURCES) as file:
        file.write("".join(f"{source}\n" for source in rows.sources).encode(errors="backslashreplace"))
    digests[_SOURCES] = file.digest.hexdigest()
    counts = {"rows": len(rows), "tokens": rows.num_tokens, "targets": rows.num_targets,
              "target_bytes": rows.num_target_bytes}  # fmt: skip
    with _HashedFile(folder / "meta.json") as file:
        meta = {**rows.meta, **counts, "sha256": digests}
        file.write(json.dumps(meta, indent=1, ensure_ascii=False).encode())


class _HashedFile:
    """A file written through its own sha256, on disk when closed.

    It is no real file object to NumPy, which would else write behind Python's back and hide the system's error number.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: bytes) -> int:
        """Write and count into the hash."""
        self.digest.update(data)
        return self._file.write(data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_rows(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> Iterable[list[Rendered]]:
    """For every text its rows of at most `max_tokens`: BOS, the text in order, EOS; all but BOS are targets.

    A long text is cut into rows between tokens; each row begins with BOS, only the last ends with EOS. The bytes of
    its rows are the text's bytes (a row may end inside a character, no byte is lost or counted twice).
    Raises: UserError when `max_tokens` leaves no room.
    """
    texts = iter(texts)
    while batch := list(islice(texts, 1024)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield _text_rows_of(text, ids, tokenizer, max_tokens)


def _text_rows_of(text: str, ids: list[int], tokenizer: Tokenizer, max_tokens: int) -> list[Rendered]:
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    body = [*ids, tokenizer.eos_id]
    room = max_tokens - len(head)
    if room < 2:
        raise UserError(f"max_tokens: {max_tokens} leaves no room for text.", "Set it to 8 or more.")
    parts = [body[i : i + room] for i in range(0, len(body), room)]
    sizes = [sum(len(tokenizer.token_bytes(i)) for i in part if i not in tokenizer.special_ids) for part in parts]
    sizes[0] -= sum(sizes) - len(text.encode())  # Llama's tokenizer spells a blank before the text that is not in it
    return [
        Rendered(head + part, [False] * len(head) + [True] * len(part), size)
        for part, size in zip(parts, sizes, strict=True)
    ]
