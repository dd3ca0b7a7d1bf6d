"""Token rows on disk: what a stage trains on, written once and mapped into memory.

Owns the folder of flat arrays and its promise: rows are only ever read back for the tokenizer, template and length
they were made with (a cache keyed by file name alone silently hands out old ids). Does not know what the tokens say.
On the road: the data step writes them, every stage and evaluation reads them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from graftlm.errors import UserError
from graftlm.text.dialogue import Rendered

if TYPE_CHECKING:
    from graftlm.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
ARRAYS = ("ids", "is_target", "offsets", "target_bytes")
SOURCES = "sources.txt"
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
        """Tokens of every row, (R,): made anew each time. Of some rows `lengths_of` tells them."""
        return np.diff(self.offsets)

    def lengths_of(self, row_ids: Sequence[int]) -> list[int]:
        """Tokens of these rows."""
        at = np.asarray(row_ids, np.int64)
        return (self.offsets[at + 1] - self.offsets[at]).tolist()

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
                if sha256_of(folder / name) != digest:
                    raise ValueError(f"{name} has changed since it was written")
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
            sources = SourceLines(folder / SOURCES, meta["rows"])
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


class SourceLines(Sequence[str]):
    """Where rows came from, a line of a file each: it is asked for a few of them, and may hold millions."""

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._number = path, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.removesuffix("\n")

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(self._number))]
        if not -self._number <= place < self._number:
            raise IndexError(place)
        return next(islice(self, place % self._number, None))


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

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows added so far."""
        return len(self._ids)

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


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
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
