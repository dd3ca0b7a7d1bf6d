"""Grafting onto a byte-level BPE base (GPT-2, Llama-3, Qwen): merges of bytes appended to its tokenizer.json.

Owns how new merges are written so that nothing old can change: after all old merges, one merge a new id, no string the
base already has, and only strings that the new script alone can bring into a text. Then no new merge ever joins less
than whole old tokens, and expanding new ids gives the base's own. Does not know how merges are found.

New ids start after the highest old one, special tokens included, so ids that a model's padded matrix leaves unused are
the first to be filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from graftlm.text.tokenizer.engines import CHAR_OF_BYTE, FastEngine
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.tokenizer import Tokenizer

BytePair = tuple[bytes, bytes]


def fold_characters(old: Tokenizer, characters: Iterable[str], script: Script) -> tuple[list[BytePair], int]:
    """Merges that join the base's tokens of each character, left to right, and the number of characters refused.

    Refused are those whose first bytes begin characters of another script too, or are a token of the base already.
    """
    known = _known(old)
    merges: list[BytePair] = []
    num_refused = 0
    made: set[bytes] = set()
    for char in characters:
        symbols = [old.token_bytes(piece_id) for piece_id in old.encode_continuation(char)]
        folds = [(b"".join(symbols[:cut]), symbols[cut]) for cut in range(1, len(symbols))]
        if any(left + right in known or not script.owns(left + right) for left, right in folds):
            num_refused += 1
            continue
        merges += [fold for fold in folds if fold[0] + fold[1] not in made]
        made.update(left + right for left, right in folds)
    return merges, num_refused


def merges_of_words(old: Tokenizer, words: Sequence[str], first: Sequence[BytePair]) -> tuple[list[BytePair], int]:
    """For each word the last of the merges that spell it, and the number of words that no merges spell.

    Words come best first. Neighbours are joined where together they are a word, the best word first: what every engine
    will do once each word has its one merge.
    """
    folds = {pair: pair[0] + pair[1] for pair in first}
    rank = {word.encode(): number for number, word in enumerate(words)}
    spelled = old.encode_continuations(words)
    merges = []
    for word, ids in zip(words, spelled, strict=True):
        symbols = _folded([old.token_bytes(piece_id) for piece_id in ids], folds)
        last: BytePair | None = None
        while len(symbols) > 1:
            best = min(range(1, len(symbols)), key=lambda k: rank.get(symbols[k - 1] + symbols[k], len(rank)))
            last = (symbols[best - 1], symbols[best])
            if last[0] + last[1] not in rank:
                break
            symbols[best - 1 : best + 1] = [last[0] + last[1]]
        if len(symbols) == 1 and last is not None and symbols[0] == word.encode():
            merges.append(last)
    return merges, len(words) - len(merges)


def _folded(symbols: list[bytes], folds: dict[BytePair, bytes]) -> list[bytes]:
    done: list[bytes] = []
    for symbol in symbols:
        done.append(symbol)
        while len(done) > 1 and (whole := folds.get((done[-2], done[-1]))) is not None:
            done[-2:] = [whole]
    return done


def append_merges(
    old: Tokenizer, asked: Sequence[BytePair], script: Script, pad: str | None, dropped: dict[str, int]
) -> Tokenizer:
    """The base with one new id for every merge that can be added exactly; the others are counted in `dropped`."""
    merges = _addable(old, asked, script, dropped)
    while True:
        engine = FastEngine(FastTokenizer.from_str(json.dumps(_with_merges(old, merges, pad))))
        dead = _dead(engine, merges, old.num_pieces)
        if not dead:
            break
        dropped["cannot be reached by merging"] = dropped.get("cannot be reached by merging", 0) + len(dead)
        merges = _addable(old, [pair for pair in merges if pair[0] + pair[1] not in dead], script, dropped)
    spelled: dict[bytes, tuple[int, ...]] = {
        old.token_bytes(i): (i,) for i in old.piece_ids if i not in old.special_ids
    }
    expansions = {}
    for number, (left, right) in enumerate(merges):
        spelled[left + right] = spelled[left] + spelled[right]
        expansions[old.num_pieces + number] = spelled[left + right]
    return old.grafted(engine, expansions, pad)


def _known(old: Tokenizer) -> set[bytes]:
    return {old.token_bytes(piece_id) for piece_id in old.piece_ids if piece_id not in old.special_ids}


def _addable(old: Tokenizer, asked: Sequence[BytePair], script: Script, dropped: dict[str, int]) -> list[BytePair]:
    available, added = _known(old), []
    for left, right in asked:
        reason = None
        if left + right in available:
            reason = "already there"
        elif not script.owns(left + right):
            reason = "bytes another script uses too"
        elif left not in available or right not in available:
            reason = "part of it dropped"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        available.add(left + right)
        added.append((left, right))
    return added


def _with_merges(old: Tokenizer, merges: Sequence[BytePair], pad: str | None) -> dict[str, Any]:
    """The base's parsed tokenizer.json with the merges, and a pad token, after everything."""
    assert isinstance(old.engine, FastEngine)
    model = dict(old.engine.parts["model"])
    vocabulary, listed = dict(model["vocab"]), list(model["merges"])
    added = [dict(token) for token in old.engine.parts["added_tokens"]]
    # `tokenizers` numbers a special token by itself unless the model's own vocabulary holds it; with ids after the
    # special ones it would number them anew.
    for token in added:
        vocabulary.setdefault(token["content"], token["id"])
    as_pairs = not listed or isinstance(listed[0], list)
    for number, (left, right) in enumerate(merges):
        vocabulary[_spelled(left + right)] = old.num_pieces + number
        pair = [_spelled(left), _spelled(right)]
        listed.append(pair if as_pairs else " ".join(pair))
    if pad:
        vocabulary[pad] = old.num_pieces + len(merges)
        added.append({
            "id": vocabulary[pad], "content": pad, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    return {**old.engine.parts, "model": {**model, "vocab": vocabulary, "merges": listed}, "added_tokens": added}


def _spelled(symbol: bytes) -> str:
    return "".join(CHAR_OF_BYTE[byte] for byte in symbol)


def _dead(engine: FastEngine, merges: Sequence[BytePair], first_id: int) -> set[bytes]:
    """Pieces that are whole text and do not come out when that text is encoded.

    Words looked up whole before any merge (`ignore_merges`) would hide them: the merges alone are asked.
    """
    parts = {**engine.parts, "model": {**engine.parts["model"], "ignore_merges": False}}
    by_merges = FastEngine(FastTokenizer.from_str(json.dumps(parts)))
    whole = {}
    for number, (left, right) in enumerate(merges):
        try:
            whole[first_id + number] = (left + right).decode()
        except UnicodeDecodeError:
            continue
    reached = by_merges.encode_continuations(list(whole.values()))
    return {text.encode() for (piece_id, text), ids in zip(whole.items(), reached, strict=True) if ids != [piece_id]}
