"""Whether a stage fits into the memory there is, told before its first step: a pass too large may end the process.

Owns a stage in the words of a plan, that verdict, and whether a checkpoint may be copied too. The sums are made in
`health/memory.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graftlm.device import Precision, available_memory_bytes, memory_here_bytes
from graftlm.health.activations import WIDE, Learns
from graftlm.health.devices import device_here, precision_told
from graftlm.health.finding import Finding
from graftlm.health.memory import GIB, StageSize
from graftlm.health.plan import StageWish, plan_stage, size_of, with_overhead
from graftlm.health.row_facts import RowFacts, measured_rows
from graftlm.health.sharding import WHOLE, Share, peak_of
from graftlm.model.causal import plain_model
from graftlm.model.shapes import Shape, shape_of
from graftlm.recipe import Lora, Stage
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Steps, common_prefix
from graftlm.training.part_files import FILE_BYTES
from graftlm.training.ranks import ALONE, Ranks

SURE = 1.1
"""The estimate is right to a tenth (bench/memory.py): what needs more than this does not fit."""
SHARED_SAMPLE = 64


def learns_of(stage: Stage) -> Learns:
    """What of the model a stage trains, in a plan's words."""
    trains = stage.trains
    if isinstance(trains, Lora):
        return Learns("lora", trains.rows, trains.rank, trains.targets, trains.dropout, trains.dora, stage.frozen_base)
    if trains.kind == "full":
        return Learns("full", "all")
    return Learns("new-rows", "new", frozen_base=stage.frozen_base)


def wish_of(stage: Stage, place: str, shape: Shape, num_new_rows: int, rows: RowFacts) -> StageWish:
    """A stage in a plan's words."""
    return StageWish(
        name=stage.name,
        place=place,
        shape=shape,
        learns=learns_of(stage),
        num_new_rows=num_new_rows,
        rows=rows,
        precision=stage.precision,
        epochs=stage.epochs,
        batch_rows=stage.batch_rows,
        micro_batch_tokens=stage.micro_batch_tokens,
        gradient_checkpointing=stage.gradient_checkpointing,
        keeps_best=stage.keep == "best",
        split_master=stage.split_master,
        fp8=stage.fp8,
    )


def facts_of(rows: TokenRows, source: str) -> RowFacts:
    """What a plan wants to know of tokenised rows."""
    sample = np.unique(np.linspace(0, len(rows) - 1, SHARED_SAMPLE).astype(int)).tolist()
    return measured_rows(rows, common_prefix(rows, sample), source)


def memory_finding(
    model: Any, stage: Stage, steps: Steps, precision: Precision, first_new_id: int | None, ranks: Ranks = ALONE
) -> Finding | None:
    """What there is to tell of a prepared stage's memory: fatal where it surely does not fit, None where it does.

    `ranks` train it together.
    """
    return memory_of(_prepared(model, stage, steps, first_new_id), precision.device, ranks, precision.name)


def memory_of(
    wish: StageWish, device: torch.device, ranks: Ranks = ALONE, precision: str | None = None, sure: float = SURE
) -> Finding | None:
    """The same of a stage in a plan's words, fatal where it needs `sure` times the memory there is.

    `precision` is what its products run in, where that is decided already.
    """
    there = memory_here_bytes(device, ranks.local_count)
    if there is None:
        return None
    here = replace(device_here(device), memory_bytes=there)
    name = precision or precision_told(here, wish.precision)[0]
    worst = peak_of(_size(wish, name, device, ranks), _share(ranks))
    needed = with_overhead(worst, here)
    if needed <= there:
        return None
    changes = plan_stage(wish, here, ranks.count, _share(ranks)).changes
    return Finding(
        "does-not-fit", "fatal" if needed > sure * there else "warning", wish.place, None,
        f"It needs {needed / GIB:.1f} GiB at its peak ({worst.name}), by estimate; {there / GIB:.1f} are there.",
        f"It fits with {' '.join(changes)}."
        if changes
        else "No micro-batch fits. graftlm plan with the same recipe and overrides tells where one would, and what "
        "fits here.",
    )  # fmt: skip


def holds_copy(
    model: Any,
    stage: Stage,
    steps: Steps,
    precision: Precision,
    first_new_id: int | None,
    ranks: Ranks = ALONE,
    num_savers: int = 1,
) -> bool:
    """Whether what this rank saves of a checkpoint, as one of `num_savers`, fits into the host's memory a second time,
    beside a prepared stage at its peak.

    No where the system does not say how much there is.
    """
    size = _size(_prepared(model, stage, steps, first_new_id), precision.name, precision.device, ranks)
    copy_bytes = size.checkpoint_bytes // num_savers
    if num_savers > 1:
        largest = size.shape.num_rows * size.shape.hidden_size * WIDE
        copy_bytes += 2 * min(copy_bytes, max(largest, FILE_BYTES))  # a file is made in memory, twice over
    if precision.device.type == "cuda":
        free, num_here = available_memory_bytes(), ranks.local_count if num_savers > 1 else 1
        return free is not None and free > SURE * num_here * copy_bytes
    there = memory_here_bytes(precision.device, ranks.local_count)
    needed = with_overhead(peak_of(size, _share(ranks)), device_here(precision.device)) + copy_bytes
    return there is not None and there > SURE * needed


def _prepared(model: Any, stage: Stage, steps: Steps, first_new_id: int | None) -> StageWish:
    """A prepared stage as a plan has it."""
    shape = shape_of(plain_model(model).config.to_dict(), stage.name)
    num_new_rows = 0 if first_new_id is None else shape.num_rows - first_new_id
    return wish_of(stage, f"stages.{stage.name}", shape, num_new_rows, facts_of(steps.rows, "the stage's"))


def _size(wish: StageWish, precision: str, device: torch.device, ranks: Ranks) -> StageSize:
    """The size of a rank's share of a stage."""
    own = replace(wish, batch_rows=-(-wish.batch_rows // ranks.count)) if ranks.pass_together else wish
    return size_of(own, precision, device.type == "cpu", wish.micro_batch_tokens, wish.gradient_checkpointing)


def _share(ranks: Ranks) -> Share:
    if ranks.zero_stage:
        return Share("zero3" if ranks.zero_stage == 3 else "zero2", ranks.count)
    return WHOLE if ranks.num_parts == 1 else Share("layers", ranks.num_parts)
