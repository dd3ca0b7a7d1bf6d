"""Near duplicates in memory: the plain reference that the search on disk (`text/near.py`) is held to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rensa import RMinHash, RMinHashLSH

from graftlm.text.near import MAX_CLOSE_LOOKS, NUM_PERMUTATIONS, rows_per_band, shingles

SLACK = 0.13


class NearIndex:
    """Texts by what they share, all held in memory."""

    def __init__(self, threshold: float) -> None:
        rows = rows_per_band(threshold)
        bands = NUM_PERMUTATIONS // rows
        self._threshold, self._num = threshold, rows * bands
        self._index = RMinHashLSH(threshold=threshold, num_perm=self._num, num_bands=bands)
        self._known: list[tuple[str, list[int], bool]] = []

    def _minhash(self, text: str) -> Any:
        minhash = RMinHash(num_perm=self._num, seed=0)
        minhash.update(shingles(text))
        return minhash

    def insert(self, text: str, is_heldout: bool) -> None:
        minhash = self._minhash(text)
        self._index.insert(len(self._known), minhash)
        self._known.append((text, minhash.digest(), is_heldout))

    def nearest(self, text: str) -> bool | None:
        """Whether the known text that `text` is near to is held out; None where there is none."""
        minhash = self._minhash(text)
        places = np.sort(np.asarray(self._index.query(minhash), int))
        if not len(places):
            return None
        digests = np.array([self._known[place][1] for place in places])
        estimates = (digests == np.array(minhash.digest())).mean(1)
        order = np.argsort(-estimates, kind="stable")[:MAX_CLOSE_LOOKS]
        own = set(shingles(text))
        for place in places[order[estimates[order] >= self._threshold - SLACK]]:
            other, _, is_heldout = self._known[place]
            theirs = set(shingles(other))
            if len(own & theirs) >= self._threshold * len(own | theirs):
                return is_heldout
        return None


def near_fates(texts: Sequence[str], heldout: Sequence[str], threshold: float) -> list[str]:
    """What becomes of each text: kept, near to one kept before it, or to one held out."""
    index = NearIndex(threshold)
    for text in heldout:
        index.insert(text, True)
    fates = []
    for text in texts:
        found = index.nearest(text)
        fates.append("kept" if found is None else "leak" if found else "near")
        if found is None:
            index.insert(text, False)
    return fates
