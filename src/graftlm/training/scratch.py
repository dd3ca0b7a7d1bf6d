"""A small base model from nothing: its tokenizer is learned and its weights pre-trained on plain text.

Owns the order of that work. Does not know recipes beyond its section, nor the language grafted later. It stands in
for a published base where none may be downloaded: the demo, tests, a first try on a laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import tee
from pathlib import Path
from typing import Any

import torch

from graftlm.model.causal import new_causal, save_causal
from graftlm.recipe import Scratch
from graftlm.text.lines import documents, read_lines
from graftlm.text.rows import RowsBuilder, TokenRows, text_rows
from graftlm.text.tokenizer import Tokenizer, load_tokenizer, train_base_tokenizer
from graftlm.training.following import stage_for_all
from graftlm.training.ranks import ALONE, Ranks


def build_scratch_base(
    scratch: Scratch, seed: int, folder: Path, device: torch.device, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Learn a tokenizer, pre-train a model, and save both in `folder`/model; continued when interrupted.

    Returns `num_pieces` and the facts of its training. Raises UserError, NumericalStop, DiskError, Interrupted.
    """
    texts = ["\n".join(read_lines(path)) for path in scratch.text]
    train_base_tokenizer(texts, scratch.num_pieces, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = new_causal(
        num_rows=tokenizer.num_pieces,
        hidden_size=scratch.hidden_size,
        num_layers=scratch.num_layers,
        num_heads=scratch.num_heads,
        intermediate_size=scratch.intermediate_size,
        is_tied=scratch.tied,
        max_positions=scratch.max_positions,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        seed=seed,
    )
    rows = _rows_of(scratch.text, tokenizer, scratch.row_tokens)
    heldout = {"old": _rows_of(scratch.heldout, tokenizer, scratch.row_tokens)} if scratch.heldout else {}
    run = stage_for_all(
        ranks, model, scratch.training, rows, heldout, folder, device, first_new_id=None, name_of=tokenizer.name_of
    )
    run.run()
    facts = run.facts()
    save_causal(run.finished_model(), folder / "model", also=tokenizer.save)
    return {"num_pieces": tokenizer.num_pieces, **facts}


def _rows_of(paths: Sequence[str], tokenizer: Tokenizer, row_tokens: int) -> TokenRows:
    """Rows of plain text files: a document is a block between blank lines, every token of it a target."""
    builder = RowsBuilder(tokenizer.num_pieces)
    for path in paths:
        found, again = tee(documents(Path(path)))
        for document, rows in zip(found, text_rows((d.value for d in again), tokenizer, row_tokens), strict=True):
            for row in rows:
                builder.add(row, document.where)
    return builder.rows()
