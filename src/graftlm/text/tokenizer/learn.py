"""Learning new pieces: the base's own BPE goes on over text of the new script.

Owns which pieces are worth a row. Does not know how runs are spelled (`spelling.py`), how pairs are found
(`merging.py`) nor how a vocabulary is written down (`sentencepiece_graft.py`, `byte_level.py`). A symbol is a byte
string: a base token, or a whole character for which a SentencePiece base only has bytes.

Source of the method: continued BPE; BPE, arXiv 1508.07909.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from graftlm.errors import UserError
from graftlm.run import progress, say
from graftlm.text.tokenizer.merging import merge_words
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.spelling import spell_runs
from graftlm.text.tokenizer.tokenizer import Tokenizer

SPACED_SHARE = 0.2
"""Above this share of words that follow a space, the space belongs to the pieces."""


WHY_FEWER = "nothing else that may be a piece occurs twice in the texts; more text gives more"


@dataclass(frozen=True, slots=True)
class Learned:
    """Pieces worth adding, in the order of their ids: `characters` for which the base only has bytes, then `merges` of
    two symbols in the order in which they were learned."""

    characters: list[str]
    merges: list[tuple[bytes, bytes]]


def count_runs(texts: Sequence[str], script: Script, with_space: bool) -> Counter[str]:
    """How often each run of the script occurs. Raises UserError when there is none."""
    pattern = script.run_with_space if with_space else script.run
    runs: Counter[str] = Counter()
    num_chars = sum(map(len, texts))
    for text in progress(texts, len(texts), "reading texts"):
        runs.update(pattern.findall(text))
    if not num_chars:
        raise UserError(
            f"The texts to learn from are empty ({len(texts)} lines or rows without a character).",
            "Give files that hold text in the new language (--text, tokenizer.text).",
        )
    if not runs:
        raise UserError(
            f"{num_chars:,} characters of text to learn from hold none of the script {'+'.join(script.names)}.",
            "Give texts in the new language, or name its script (--script, tokenizer.script).",
        )
    return runs


def puts_spaces(texts: Sequence[str], script: Script) -> bool:
    """Whether the language sets its words apart by spaces, judged by the first texts."""
    num_runs = num_spaced = 0
    for text in texts[:2000]:
        found = script.run_with_space.findall(text)
        num_runs += len(found)
        num_spaced += sum(run.startswith(" ") for run in found)
    return num_spaced > SPACED_SHARE * num_runs


def learn_pieces(
    base: Tokenizer,
    runs: Counter[str],
    script: Script,
    num_pieces: int,
    max_chars: int | None = None,
    forced: Sequence[str] = (),
    first: Sequence[tuple[bytes, bytes]] = (),
) -> Learned:
    """At most `num_pieces` pieces that shorten the runs most.

    Among them the characters `forced` and the merges `first`, which come before all learned ones. A merge is worth the
    tokens it saves, which is the number of times it fires; a character the tokens it saves each time it occurs. What a
    merge is made of is then worth at least as much, so the best are closed under their own parts.
    Raises UserError when what is forced is more than `num_pieces`.
    """
    symbols = _Symbols(base, script, max_chars)
    new_forced = [char for char in forced if char.encode() not in symbols.known]
    budget = num_pieces - len(new_forced) - len(first)
    if budget < 0:
        raise UserError(
            f"{num_pieces - budget} pieces are needed for the common characters alone, and {num_pieces} are asked for.",
            f"Ask for at least {num_pieces - budget} (--num-pieces, in a recipe tokenizer.num_pieces), or for none of "
            "them (--common-characters none, in a recipe tokenizer.common_characters=none).",
        )
    if budget < num_pieces:
        say(f"{num_pieces - budget:,} of them go to common characters, {budget:,} to what saves most tokens")
    words, counts = spell_runs(base, runs, symbols.number)
    if first:
        words = _applied(words, first, symbols)
    worth = {} if base.is_byte_level else _worth_of_characters(words, counts, symbols)
    for char in new_forced:
        worth.pop(char.encode(), None)
    worths = sorted(worth.values())
    merges: list[tuple[bytes, bytes]] = []
    for merge in progress(merge_words(words, counts, budget, symbols.join), budget, "learning pieces"):
        num_better = len(worths) - bisect_left(worths, merge.count)
        if len(merges) + 1 + num_better > budget:
            break
        merges.append((symbols.parts[merge.left], symbols.parts[merge.right]))
    best = sorted(worth, key=lambda part: (-worth[part], part))[: budget - len(merges)]
    num_learned = len(merges) + len(best)
    if num_learned < budget:
        say(f"learned {num_learned:,} of {budget:,} pieces: {WHY_FEWER}")
    return Learned([*new_forced, *(part.decode() for part in best)], [*first, *merges])


class _Symbols:
    """Byte strings by number, and which of them may be joined."""

    def __init__(self, base: Tokenizer, script: Script, max_chars: int | None) -> None:
        self.parts: list[bytes] = []
        self.known = set(map(base.token_bytes, base.piece_ids))
        self.script = script
        self._max_chars = max_chars
        self._is_byte_level = base.is_byte_level
        self._numbers: dict[bytes, int] = {}
        self._made = set() if base.is_byte_level else self._parts_of_pieces(base)

    def _parts_of_pieces(self, base: Tokenizer) -> set[bytes]:
        """What lies inside a piece of a SentencePiece base must not become a piece (`sentencepiece_graft.py`)."""
        texts = (base.token_bytes(piece_id).decode(errors="ignore") for piece_id in base.piece_ids)
        longer = [text for text in texts if len(text) > 2 and self.script.occurs_in(text)]
        return {text[a:b].encode() for text in longer for b in range(2, len(text) + 1) for a in range(b - 1)}

    def number(self, part: bytes) -> int:
        """The number of a byte string, given on first sight."""
        found = self._numbers.get(part)
        if found is None:
            found = self._numbers[part] = len(self.parts)
            self.parts.append(part)
        return found

    def join(self, left: int, right: int) -> int | None:
        """The number of both together; None where that is no piece to add."""
        whole = self.parts[left] + self.parts[right]
        if whole in self.known or whole in self._made or not self.script.owns(whole):
            return None
        if self._max_chars is not None and num_chars(whole) > self._max_chars:
            return None
        if not (self._is_byte_level or (self._can_stand(left) and self._can_stand(right))):
            return None
        self._made.add(whole)
        return self.number(whole)

    def _can_stand(self, number: int) -> bool:
        # A character that the base lacks and that is not the script's own gets no piece: no merge may need one.
        return self.parts[number] in self.known or self.script.owns(self.parts[number])


def num_chars(part: bytes) -> int:
    """Characters that begin in a byte string; the space before a word is not counted."""
    return sum(byte & 0xC0 != 0x80 for byte in part.removeprefix(b" "))


def _applied(words: list[list[int]], merges: Sequence[tuple[bytes, bytes]], symbols: _Symbols) -> list[list[int]]:
    """The words after merges that each fold one character's tokens from the left."""
    joined = {(symbols.number(a), symbols.number(b)): symbols.number(a + b) for a, b in merges}
    symbols.known.update(left + right for left, right in merges)
    found = []
    for word in words:
        done: list[int] = []
        for number in word:
            done.append(number)
            while len(done) > 1 and (whole := joined.get((done[-2], done[-1]))) is not None:
                done[-2:] = [whole]
        found.append(done)
    return found


def _worth_of_characters(words: list[list[int]], counts: list[int], symbols: _Symbols) -> dict[bytes, int]:
    """The script's characters for which the base only has bytes, by the number of tokens that a piece saves."""
    candidates = {
        number for number, part in enumerate(symbols.parts) if part not in symbols.known and symbols.script.owns(part)
    }
    occurrences: Counter[int] = Counter()
    for word, count in zip(words, counts, strict=True):
        for number in word:
            if number in candidates:
                occurrences[number] += count
    parts = symbols.parts
    return {parts[number]: (len(parts[number]) - 1) * n for number, n in occurrences.items() if n > 1}
