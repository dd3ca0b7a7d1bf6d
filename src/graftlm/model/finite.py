"""Weights that are not finite: which parameter holds them, and which row of a vocabulary matrix.

Owns that search and the refusal of a base with such weights. Does not know training: what a step did to weights is told
by `health`, with the same search.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import UserError
from graftlm.model.causal import vocabulary_modules
from graftlm.model.sharded import own_part
from graftlm.text.tokenizer import Tokenizer


def bad_parameters(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Parameters with numbers that are not finite, by name: of a matrix of embedding or head its bad rows, else none.

    Of layers shared out over ranks, this rank's parts are searched. Norms are taken first: one pass over all weights at
    once.
    """
    named = list(model.named_parameters())
    of_rows = {id(p) for module in vocabulary_modules(model) for p in module.parameters()}
    norms = torch.stack([norm.double() for norm in torch._foreach_norm([own_part(p) for _, p in named])])
    for place in (~torch.isfinite(norms)).nonzero().flatten().tolist():
        name, parameter = named[place]
        rows = _bad_rows(own_part(parameter))
        if rows:  # else finite and so large that its norm is not
            yield name, rows if id(parameter) in of_rows else []


def _bad_rows(weight: Tensor) -> list[int]:
    return (~torch.isfinite(weight)).reshape(len(weight), -1).any(-1).nonzero().flatten().tolist()


def refuse_bad_weights(model: Any, folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a base with weights that are not finite: nothing learned from them would be. Raises UserError.

    It names the first such tensor and, where it has a row a piece, the row with the text of its piece.
    """
    found = list(bad_parameters(model))
    if not found:
        return
    name, rows = found[0]
    others = f", and {len(found) - 1} more of its tensors do" if len(found) > 1 else ""
    what = "numbers that are not finite (NaN or infinity)"
    raise UserError(
        f"{folder}: {name} holds {what}{_rows_told(rows, tokenizer)}{others}.",
        "The copy is damaged, or was saved by a run that had diverged: fetch the model again, or take an earlier save.",
    )


def _rows_told(rows: list[int], tokenizer: Tokenizer) -> str:
    if not rows:
        return ""
    text = tokenizer.name_of(rows[0])
    first = f"row {rows[0]}, {f'the piece {text!r}' if text else 'which no piece has'}"
    return f" in {first}" if len(rows) == 1 else f" in {len(rows):,} rows, first {first}"
