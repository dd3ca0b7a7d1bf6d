"""Runs of text spelled as a base tokenizer's symbols: what merging goes on from.

Owns how that is done fast: a run falls apart wherever no token of the base reaches across, and only the distinct parts
are encoded. Does not know what is learned from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from graftlm.run import progress
from graftlm.text.tokenizer.engines import FastEngine
from graftlm.text.tokenizer.tokenizer import Tokenizer

Number = Callable[[bytes], int]

_RUNS_AT_A_TIME = 10_000
_NUM_TRIED = 1000


def spell_runs(base: Tokenizer, runs: Counter[str], number: Number) -> tuple[list[list[int]], list[int]]:
    """Every run as numbers of symbols, and how often it occurs; a byte-level base first cuts runs into its words.

    A symbol is a token's bytes; of a SentencePiece base, the bytes of one unknown character are one symbol. `number`
    gives a symbol its number.
    """
    texts = list(runs)
    if base.is_byte_level and not _falls_apart(base, texts[:_NUM_TRIED], number):
        return _spell_by_words(base, runs, number)
    return _spell_by_fragments(base, texts, number), list(runs.values())


def _falls_apart(base: Tokenizer, texts: Sequence[str], number: Number) -> bool:
    """Whether fragments spell runs as the base's own words do; a pre-tokenizer or normalizer may see to it that not."""
    assert isinstance(base.engine, FastEngine)
    by_words = base.engine.encode_words(texts)
    whole = [[number(base.token_bytes(one)) for one in cut[0]] if len(cut) == 1 else None for cut in by_words]
    return whole == _spell_by_fragments(base, texts, number)


def _spell_by_words(base: Tokenizer, runs: Counter[str], number: Number) -> tuple[list[list[int]], list[int]]:
    assert isinstance(base.engine, FastEngine)
    number_of = {piece_id: number(base.token_bytes(piece_id)) for piece_id in base.piece_ids}
    words: list[list[int]] = []
    counts: list[int] = []
    texts, starts = list(runs), range(0, len(runs), _RUNS_AT_A_TIME)
    for start in progress(starts, len(starts), "encoding runs, ten thousands"):
        part = texts[start : start + _RUNS_AT_A_TIME]
        for run, cut in zip(part, base.engine.encode_words(part), strict=True):
            for ids in cut:
                words.append([number_of[piece_id] for piece_id in ids])
                counts.append(runs[run])
    return words, counts


def _spell_by_fragments(base: Tokenizer, texts: Sequence[str], number: Number) -> list[list[int]]:
    """Two characters across which no token reaches are never joined: for a base that knows Chinese characters and few
    words, most fragments are single characters."""
    neighbours = _neighbours(base, set().union(*texts))
    inner = {left for left, _ in neighbours}
    cut = [run if inner.isdisjoint(run) else list(_cut(run, neighbours)) for run in texts]
    distinct = sorted(set().union(*cut))
    numbers = {}
    for fragment, ids in zip(distinct, base.encode_continuations(distinct), strict=True):
        parts = map(base.token_bytes, ids)
        numbers[fragment] = [number(part) for part in (parts if base.is_byte_level else whole_characters(parts))]
    return [[one for fragment in fragments for one in numbers[fragment]] for fragments in cut]


def _cut(run: str, neighbours: set[tuple[str, str]]) -> Iterator[str]:
    start = 0
    for end, pair in enumerate(pairwise(run), start=1):
        if pair not in neighbours:
            yield run[start:end]
            start = end
    yield run[start:]


def _neighbours(base: Tokenizer, alphabet: set[str]) -> set[tuple[str, str]]:
    """Pairs of characters of the alphabet across which some token reaches, holding both or a part of one or both."""
    found: set[tuple[str, str]] = set()
    across: set[tuple[bytes, bytes]] = set()
    for part in map(base.token_bytes, base.piece_ids):
        try:
            text = part.decode()
        except UnicodeDecodeError:
            starts = [place for place, byte in enumerate(part) if byte & 0xC0 != 0x80]
            for start, end in pairwise([*starts, len(part)]):
                if start:
                    before = max((one for one in starts if one < start), default=0)
                    across.add((part[before:start], part[start:end]))
        else:
            found.update(pair for pair in pairwise(text) if alphabet.issuperset(pair))
    spelled = {char: char.encode() for char in alphabet}
    for end, begin in across:
        lefts = [char for char, code in spelled.items() if code.endswith(end)]
        rights = [char for char, code in spelled.items() if code.startswith(begin)] if lefts else []
        found.update((left, right) for left in lefts for right in rights)
    return found


def whole_characters(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts, those that are bytes of one character joined."""
    begun = b""
    for part in parts:
        begun += part
        try:
            begun.decode()
        except UnicodeDecodeError:
            continue
        yield begun
        begun = b""
