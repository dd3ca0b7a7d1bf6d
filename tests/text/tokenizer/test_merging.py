"""Merging against the plainest byte-pair learning: count every pair anew, join the most frequent."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from graftlm.text.tokenizer.merging import Merge, merge_words


class Namer:
    """Numbers for joined symbols; pairs may be forbidden."""

    def __init__(self, first: int, forbidden: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.next, self.forbidden = first, forbidden

    def __call__(self, left: int, right: int) -> int | None:
        if (left, right) in self.forbidden:
            return None
        self.next += 1
        return self.next - 1


def replace(word: list[int], left: int, right: int, joined: int) -> tuple[list[int], int]:
    found, number, place = [], 0, 0
    while place < len(word):
        if word[place : place + 2] == [left, right]:
            found.append(joined)
            number, place = number + 1, place + 2
        else:
            found.append(word[place])
            place += 1
    return found, number


def plainly_applied(words: list[list[int]], counts: list[int], merges: list[Merge]) -> None:
    """Each merge must be one of the most frequent pairs of its moment, and have fired as often as it says."""
    for merge in merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in zip(words, counts, strict=True):
            last = None
            for place, pair in enumerate(pairwise(word)):
                if last is not None and last == (place - 1, pair) and pair[0] == pair[1]:
                    last = None  # aaa holds one pair, not two
                    continue
                pairs[pair] += count
                last = (place, pair)
        assert pairs[merge.left, merge.right] == max(pairs.values())
        fired = 0
        for number, word in enumerate(words):
            words[number], times = replace(word, merge.left, merge.right, merge.joined)
            fired += times * counts[number]
        assert fired == merge.count


@pytest.mark.parametrize("seed", range(12))
def test_every_merge_is_the_most_frequent_pair(seed: int) -> None:
    dice = random.Random(seed)
    num_symbols = dice.choice([2, 3, 8])
    words = [[dice.randrange(num_symbols) for _ in range(dice.randint(0, 12))] for _ in range(60)]
    counts = [dice.randint(1, 9) for _ in words]
    merges = list(merge_words(words, counts, 40, Namer(num_symbols)))
    assert len(merges) > 10
    assert [merge.count for merge in merges] == sorted((merge.count for merge in merges), reverse=True)
    plainly_applied([list(word) for word in words], counts, merges)


def test_rare_pairs_are_found_after_the_frequent_ones() -> None:
    """The first pass leaves rare pairs out; they must come up once the frequent ones are used up."""
    words = [[0, 1]] * 1 + [[2, 3]] + [[4, 5]] * 1
    found = [(m.left, m.right, m.count) for m in merge_words(words, [100_000, 3, 1], 3, Namer(6))]
    assert found == [(0, 1, 100_000), (2, 3, 3)], "a pair that occurs once is no merge"


def test_forbidden_pairs_stay_apart() -> None:
    merges = list(merge_words([[0, 1, 2]], [5], 5, Namer(3, frozenset({(0, 1)}))))
    assert [(merge.left, merge.right) for merge in merges] == [(1, 2), (0, 3)]


def test_words_are_never_joined_to_each_other() -> None:
    assert list(merge_words([[0], [1], [0], [1]], [5, 5, 5, 5], 5, Namer(2))) == []
    assert list(merge_words([], [], 5, Namer(2))) == []


def test_number_of_merges_is_kept() -> None:
    assert len(list(merge_words([[0, 1, 2, 3, 4]], [9], 2, Namer(5)))) == 2
    assert list(merge_words([[0, 1]], [9], 0, Namer(2))) == []
