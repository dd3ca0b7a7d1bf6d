"""Records on disk in piles by key, so that each pile is small enough to be sorted in memory.

Owns the files and their number. Does not know what a record is: callers say which pile each belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

NUM_PILES = 256


class Piles:
    """Records of one structured dtype, in `NUM_PILES` files below `folder`; within a pile in the order of adding."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        folder.mkdir(parents=True)
        self._folder, self._dtype = folder, np.dtype(dtype)

    def add(self, piles_N: np.ndarray, records_N: np.ndarray) -> None:
        """Put every record on its pile (0 to NUM_PILES - 1). Files are opened in turn: no handle is held."""
        order_N = np.argsort(piles_N, kind="stable")
        bounds = np.searchsorted(piles_N[order_N], np.arange(NUM_PILES + 1))
        for pile in np.flatnonzero(np.diff(bounds)).tolist():
            with self._file(pile).open("ab") as stream:
                stream.write(records_N[order_N[bounds[pile] : bounds[pile + 1]]].tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        """Every pile that holds anything, by number."""
        for pile in range(NUM_PILES):
            if self._file(pile).is_file():
                yield np.fromfile(self._file(pile), self._dtype)

    def _file(self, pile: int) -> Path:
        return self._folder / f"{pile:03}"


def same_as_before(*columns: np.ndarray) -> np.ndarray:
    """For sorted columns (N,): whether each entry, in all of them, is that of the one before it."""
    same_N = np.zeros(len(columns[0]), bool)
    same_N[1:] = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    return same_N
