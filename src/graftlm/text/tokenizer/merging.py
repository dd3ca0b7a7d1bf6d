"""Byte-pair merging over counted words: which neighbours are worth joining, most frequent first.

Owns the search and nothing else: symbols are numbers, and whether two may be joined is asked of the caller. Does not
know scripts, vocabularies or files.

All words lie in one array as a linked list. A pair's count only falls once it exists, since two old symbols never
become neighbours again; so a heap of once-true counts suffices, and a count is looked up afresh only when it comes up.
Source: BPE, arXiv 1508.07909.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BORDER = -1  # between two words
_GONE = -2  # joined to the symbol on its left
_SMALLEST_COUNT = 2


@dataclass(frozen=True, slots=True)
class Merge:
    """`left` and `right` became the symbol `joined`, at `count` places."""

    left: int
    right: int
    joined: int
    count: int


def merge_words(
    words: Sequence[Sequence[int]],
    counts: Sequence[int],
    num_merges: int,
    join: Callable[[int, int], int | None],
) -> Iterator[Merge]:
    """Yield up to `num_merges` merges, most frequent first, until no pair occurs twice.

    `counts` says how often each word occurs. `join(left, right)` gives the number of the new symbol, one never used
    before, or None where the two must stay apart; it is asked once a pair, when the pair's turn comes.
    """
    chain = _Chain(words, counts)
    # Most pairs are too rare to be ever merged. They are left out until the others are used up.
    threshold = max(_SMALLEST_COUNT, int(chain.weights.sum()) // (64 * max(1, num_merges)))
    done = 0
    while True:
        heap = chain.pairs(threshold)
        while heap and done < num_merges:
            stale, pair, places = heapq.heappop(heap)
            left, right = pair >> 32, pair & 0xFFFFFFFF
            standing = chain.still(left, right, places)
            disjoint = chain.disjoint(standing) if left == right else standing
            count = int(chain.weights[disjoint].sum())
            if count < -stale:
                if count >= threshold:
                    heapq.heappush(heap, (-count, pair, standing))
                continue
            joined = join(left, right)
            if joined is None:
                continue
            for entry in chain.merge(disjoint, joined, threshold):
                heapq.heappush(heap, entry)
            done += 1
            yield Merge(left, right, joined, count)
        if done >= num_merges or threshold <= _SMALLEST_COUNT:
            return
        threshold = max(_SMALLEST_COUNT, threshold // 8)


class _Chain:
    """All words as one linked list over arrays; each place has a symbol, a weight and two neighbours."""

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        lengths = np.fromiter((len(word) + 1 for word in words), dtype=np.int64, count=len(words))
        flat = [_BORDER]
        for word in words:
            flat += word
            flat.append(_BORDER)
        self.symbols = np.array(flat, dtype=np.int64)
        self.weights = np.concatenate([[0], np.repeat(np.asarray(counts, dtype=np.int64), lengths)])
        self._link()

    def _link(self) -> None:
        size = len(self.symbols)
        self.following = np.arange(1, size + 1)
        self.following[-1] = 0
        self.preceding = np.arange(-1, size - 1)

    def pairs(self, threshold: int) -> list[tuple[int, int, Any]]:
        """A heap of (minus count, pair, places) of every pair that occurs at least `threshold` times."""
        kept = self.symbols != _GONE
        self.symbols, self.weights = self.symbols[kept], self.weights[kept]
        self._link()
        places = np.flatnonzero((self.symbols[:-1] >= 0) & (self.symbols[1:] >= 0))
        pairs = (self.symbols[places] << 32) | self.symbols[places + 1]
        heap = self._grouped(pairs, places, threshold)
        heapq.heapify(heap)
        return heap

    def _grouped(self, pairs: Any, places: Any, threshold: int) -> list[tuple[int, int, Any]]:
        if not len(places):
            return []
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        sums = np.add.reduceat(self.weights[places], starts)
        chosen = np.flatnonzero(sums >= threshold)
        ends = np.append(starts[1:], len(places))
        return [
            (-count, pair, places[start:end])
            for count, pair, start, end in zip(
                sums[chosen].tolist(), pairs[starts[chosen]].tolist(), starts[chosen].tolist(), ends[chosen].tolist(),
                strict=True,
            )
        ]  # fmt: skip

    def still(self, left: int, right: int, places: Any) -> Any:
        """The places, among those once known, where the pair still stands."""
        return places[(self.symbols[places] == left) & (self.symbols[self.following[places]] == right)]

    def disjoint(self, places: Any) -> Any:
        """Places of a pair of one symbol with itself that do not overlap, the leftmost of a row first (aaa: once)."""
        taken: list[int] = []
        used = -1
        for place, after in zip(places.tolist(), self.following[places].tolist(), strict=True):
            if place != used:
                taken.append(place)
                used = after
        return np.array(taken, dtype=np.int64)

    def merge(self, places: Any, joined: int, threshold: int) -> list[tuple[int, int, Any]]:
        """Join the symbols at `places` with those after them; returns the pairs this makes."""
        right = self.following[places]
        after = self.following[right]
        self.symbols[places], self.symbols[right] = joined, _GONE
        self.following[places], self.preceding[after] = after, places
        before, after = self.preceding[places], self.following[places]
        left_symbols, right_symbols = self.symbols[before], self.symbols[after]
        has_left = left_symbols >= 0
        # Two new symbols side by side are one pair: it is counted as the left neighbour of the second.
        has_right = (right_symbols >= 0) & (right_symbols != joined)
        return [
            *self._grouped((left_symbols[has_left] << 32) | joined, before[has_left], threshold),
            *self._grouped((joined << 32) | right_symbols[has_right], places[has_right], threshold),
        ]
