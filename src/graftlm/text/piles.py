"""Records on disk in piles by key, so that each pile is small enough to be sorted in memory.

Owns the files and their number. Does not know what a record is: callers say which pile each belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

NUM_PILES = 256
PILE_BYTES = 2 * 2**20
"""What a pile should hold at most where it is known beforehand how much there will be."""

KEPT_BYTES = 2**12
"""Records that are kept in memory, a pile, before they are written: few files where there are few."""


def piles_for(num_bytes: int) -> int:
    """How many piles keep so many bytes near `PILE_BYTES` each."""
    return max(NUM_PILES, -(-num_bytes // PILE_BYTES))


class Piles:
    """Records of one structured dtype, in `count` files below `folder`; within a pile in the order of adding."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, count: int = NUM_PILES) -> None:
        self._folder, self._dtype, self.count = folder, np.dtype(dtype), count
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._kept_bytes = 0

    def add(self, piles_N: np.ndarray, records_N: np.ndarray) -> None:
        """Put every record on its pile (0 to `count` - 1)."""
        self._kept.append((piles_N, records_N))
        self._kept_bytes += records_N.nbytes
        if self._kept_bytes >= KEPT_BYTES * self.count:
            self._write()

    def _write(self) -> None:
        """Files are opened in turn: no handle is held."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for pile, records in enumerate(self._sorted()):
            if len(records):
                with self._file(pile).open("ab") as stream:
                    stream.write(records.tobytes())
        self._kept, self._kept_bytes = [], 0

    def _sorted(self) -> list[np.ndarray]:
        """What is kept of each pile."""
        piles_N = np.concatenate([np.zeros(0, np.int64), *(piles for piles, _ in self._kept)])
        records_N = np.concatenate([np.zeros(0, self._dtype), *(records for _, records in self._kept)])
        order_N = np.argsort(piles_N, kind="stable")
        return np.split(records_N[order_N], np.searchsorted(piles_N[order_N], np.arange(1, self.count)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Every pile that holds anything, by number."""
        for pile, kept in enumerate(self._sorted()):
            if self._file(pile).is_file():
                yield np.concatenate([np.fromfile(self._file(pile), self._dtype), kept])
            elif len(kept):
                yield kept

    def _file(self, pile: int) -> Path:
        return self._folder / f"{pile:03}"


def same_as_before(*columns: np.ndarray) -> np.ndarray:
    """For sorted columns (N,): whether each entry, in all of them, is that of the one before it."""
    same_N = np.zeros(len(columns[0]), bool)
    same_N[1:] = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    return same_N
