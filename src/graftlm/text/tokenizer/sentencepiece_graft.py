"""Grafting onto a SentencePiece BPE base (Llama, Llama-2, Mistral): pieces appended to its model.

Owns the scores and the order of new pieces. Below every score the base learned, and all different, a new piece merges
after every old one: expanding new ids then gives the base's own encoding of any text. Does not know how pieces are
found. The published merge, score 0 for every piece, is in `card.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from graftlm.errors import UserError
from graftlm.text.tokenizer.engines import FastEngine
from graftlm.text.tokenizer.load import tokenizer_of_model
from graftlm.text.tokenizer.samples import ODD_TEXTS, OLD_TEXTS
from graftlm.text.tokenizer.sentencepiece_bpe import (
    CONTROL,
    NORMAL,
    ODDITY_SCORE,
    SPACE,
    ModelProto,
    why_not_exact,
)
from graftlm.text.tokenizer.tokenizer import Tokenizer


def check_base(old: Tokenizer) -> None:
    """Refuse a base onto which no exact graft is possible. Raises UserError with the reason."""
    if old.model is None:
        kind = "is no byte-level BPE" if isinstance(old.engine, FastEngine) else "is unknown"
        raise UserError(
            f"The base's tokenizer.json {kind}, and no tokenizer.model lies beside it.",
            "Give a Llama-family base: a folder with its tokenizer.model, or a byte-level tokenizer.json.",
        )
    reason = why_not_exact(old.model)
    if reason is not None:
        raise UserError(
            f"The base's SentencePiece model cannot be grafted exactly: {reason}.",
            "Give a Llama-family base: SentencePiece BPE with scores of its own, or a byte-level tokenizer.json.",
        )


def check_files_agree(old: Tokenizer, real: list[str]) -> None:
    """Refuse a folder whose tokenizer.json was derived wrongly from the tokenizer.model beside it. Raises UserError."""
    if old.model is None or not isinstance(old.engine, FastEngine):
        return
    texts = [*ODD_TEXTS, *OLD_TEXTS, *real]
    by_model = tokenizer_of_model(old.model)
    if by_model.num_pieces != old.num_pieces:
        raise UserError(
            f"The base's tokenizer.json has {old.num_pieces} ids, its tokenizer.model {by_model.num_pieces}.",
            "Give a base whose two files agree, or its tokenizer.model alone.",
        )
    differing = [
        text
        for text, ours, theirs in zip(texts, by_model.encode_batch(texts), old.encode_batch(texts), strict=True)
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"The base's tokenizer.json does not encode as its tokenizer.model does ({len(differing)} of {len(texts)} "
            f"texts, for example {min(differing, key=len)[:60]!r}).",
            "Give the tokenizer.model alone as --base: its exact tokenizer.json is built from it.",
        )


def append_after(old: Tokenizer, pieces: Sequence[str], pad: str | None, dropped: dict[str, int]) -> Tokenizer:
    """The base with the pieces after all its own, best first; those no text can reach are counted in `dropped`.

    Pieces are text: a leading space is a space. Raises UserError as `check_base`.
    """
    check_base(old)
    assert old.model is not None
    known = {piece.piece for piece in old.model.pieces}
    wanted = [piece.replace(" ", SPACE) for piece in pieces]
    pieces = [piece for piece in dict.fromkeys(wanted) if piece not in known]
    inside = _inside_old_pieces(old.model, pieces)
    if inside:
        dropped["part of a piece of the base"] = len(inside)
        pieces = [piece for piece in pieces if piece not in inside]
    score = _scores_below(old.model, has_spaces=any(SPACE in piece for piece in pieces))
    while True:
        new = append_pieces(old, pieces, score, pad)
        reached = new.encode_continuations([piece.replace(SPACE, " ") for piece in pieces])
        first = old.num_pieces
        dead = {piece for k, (piece, ids) in enumerate(zip(pieces, reached, strict=True)) if ids != [first + k]}
        if not dead:
            return new
        dropped["cannot be reached by merging"] = dropped.get("cannot be reached by merging", 0) + len(dead)
        pieces = [piece for piece in pieces if piece not in dead]


def _scores_below(model: ModelProto, *, has_spaces: bool) -> Callable[[int], float]:
    """The score of the k-th new piece: below every learned one, and all different in the model's float32.

    Llama's runs of spaces, at -1e9, never meet a piece without a space, so scores can go on from the learned ones.
    A piece with a space before its word must come after them too: in two spaces and a word, the base joins the spaces.
    """
    scores = [p.score for p in model.pieces if p.type == NORMAL and (has_spaces or p.score > ODDITY_SCORE)]
    lowest = min(scores)
    step = max(1.0, 2 * float(np.spacing(np.float32(abs(lowest)))))
    return lambda number: lowest - step * (number + 1)


def _inside_old_pieces(model: ModelProto, pieces: Sequence[str]) -> set[str]:
    """New pieces of two characters and more that a piece of the base contains.

    SentencePiece joins whatever together is a piece: such a new piece could be joined on to the old one in a text where
    the base would not have come to it.
    """
    pairs = {pair for piece in pieces for pair in pairwise(piece)}
    old = [piece.piece for piece in model.pieces if not pairs.isdisjoint(pairwise(piece.piece))]
    parts = {piece[a:b] for piece in old for b in range(2, len(piece) + 1) for a in range(b - 1)}
    return {piece for piece in pieces if len(piece) > 1 and piece in parts}


def append_pieces(old: Tokenizer, pieces: Sequence[str], score: Callable[[int], float], pad: str | None) -> Tokenizer:
    """The base's model with `pieces` (spaces written ▁) appended; the k-th has `score(k)`."""
    assert old.model is not None
    model = ModelProto()
    model.CopyFrom(old.model)
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=score(number), type=NORMAL)
    if pad:
        model.pieces.add(piece=pad, score=0.0, type=CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    spelled = old.encode_continuations([piece.replace(SPACE, " ") for piece in pieces])
    expansions = {old.num_pieces + number: tuple(ids) for number, ids in enumerate(spelled)}
    return old.grafted(tokenizer_of_model(model).engine, expansions, pad, model)
