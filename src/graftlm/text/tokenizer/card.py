"""The published merge, repeated piece by piece for whoever needs the card's very vocabulary.

Owns what that merge is and what is wrong with it. Every new piece has score 0 and so outranks every piece of the base:
text of other scripts may be cut differently, and tied scores have no tokenizer.json form. Mode `merge` takes the same
inventory without these faults.
"""

from __future__ import annotations

from graftlm.errors import UserError
from graftlm.text.tokenizer.sentencepiece_graft import append_pieces
from graftlm.text.tokenizer.tokenizer import Tokenizer

WHY_NO_FAST_FORM = (
    "no tokenizer.json can encode alike: with XY and YX both new and tied at score 0, SentencePiece cuts XYX as XY+X "
    "and YXY as YX+Y, which no order of merges does"
)


def graft_card(old: Tokenizer, inventory: Tokenizer, pad: str | None) -> Tokenizer:
    """Every piece that the base lacks, in the inventory's order, at score 0. Source: the card's published merge.

    Raises UserError when one of the two is not a SentencePiece model.
    """
    if old.model is None or inventory.model is None:
        which = "base (--base)" if old.model is None else "inventory (--pieces)"
        raise UserError(
            f"Mode card joins two SentencePiece models; the {which} is another kind, and {WHY_NO_FAST_FORM}.",
            "Give a tokenizer.model for both, or use --mode continued or merge, which hold for either kind of base.",
        )
    known = {piece.piece for piece in old.model.pieces}
    added = [piece.piece for piece in inventory.model.pieces if piece.piece not in known]
    return append_pieces(old, added, lambda number: 0.0, pad)
