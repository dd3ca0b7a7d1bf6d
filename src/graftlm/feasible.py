"""Whether this machine can train the stages of a recipe at all, told before anything is trained.

Owns what is refused then: what the device does not compute, a row that no micro-batch holds, what surely does not fit
into memory. A stage looks once more, at itself, before its first step (`training/before.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from graftlm.errors import UserError
from graftlm.model.pointwise import compiled
from graftlm.model.quantised import require_bitsandbytes
from graftlm.plan_inputs import wishes_of
from graftlm.recipe import Recipe, Stage
from graftlm.training.precision import refuse_bf16_where_it_cannot_be, refuse_fp8_where_it_cannot_be
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.room import SURE, memory_of

PRETRAINING = "base.scratch.training"
GUESSED = 1.5
"""What needs more than this by an estimate from the recipe alone, without tokenised rows, does not fit."""

Stages = Mapping[str, Stage]
"""Stages by their place in the recipe."""


def refuse_what_cannot_be_computed(stages: Stages, device: torch.device) -> None:
    """Raises UserError where a stage asks for what `device` does not compute, or for a library that is not there."""
    for place, stage in stages.items():
        refuse_fp8_where_it_cannot_be(stage, place, device)
        refuse_bf16_where_it_cannot_be(stage.precision, place, device)
        if stage.frozen_base != "exact":
            require_bitsandbytes()
        if stage.compile:
            compiled(device.type, place)


def refuse_rows_that_may_come(recipe: Recipe, stages: Stages) -> None:
    """Raises UserError where a row of the most tokens the recipe allows is longer than a micro-batch.

    For a base made from nothing, which is trained before there are rows to look at.
    """
    assert recipe.base.scratch is not None
    told, larger, shorter = [], [], {}
    for place, stage in stages.items():
        is_base = place == PRETRAINING
        key = "base.scratch.row_tokens" if is_base else "data.max_tokens"
        longest = recipe.base.scratch.row_tokens if is_base else recipe.data.max_tokens
        budget = stage.micro_batch_tokens
        if budget < longest:
            told.append(f"{place}.micro_batch_tokens is {budget}, and a row may have {longest} tokens ({key}).")
            larger.append(f"{place}.micro_batch_tokens={longest}")
            shorter[key] = min(budget, shorter.get(key, budget))
    if told:
        rows = " ".join(f"{key}={tokens}" for key, tokens in shorter.items())
        raise UserError("\n".join(told), f"Run it with {' '.join(larger)}, or with {rows}.")


def refuse_what_surely_does_not_fit(
    recipe: Recipe, stages: Stages, device: torch.device, ranks: Ranks = ALONE, folder: Path | None = None
) -> None:
    """Raises UserError where a stage needs more memory than there is, but for one that wants no doctor.

    `folder` is the run's, where its rows are tokenised; without it they are guessed at, and doubt favours the recipe.
    """
    try:
        wishes, _ = wishes_of(recipe, folder)
    except UserError:
        return  # a base of unknown shape: the step that reads it tells what is wrong
    for wish in wishes:
        if wish.place in stages and stages[wish.place].recovery != "off":
            found = memory_of(wish, device, ranks, sure=SURE if folder else GUESSED)
            if found is not None and found.severity == "fatal":
                raise UserError(f"{wish.place}: {found.evidence}", found.cure)
