"""Room on disk and in the host's memory that a run takes.

Owns those sums. Does not know devices or time.
"""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.health.memory import GIB, WIDE
from graftlm.health.plan import StagePlan

CHECKPOINTS = 5  # two newest, two good ones before them, and the one being written
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def disk_gib(plans: Sequence[StagePlan], export_dtype: str, base_bytes_per_weight: int) -> dict[str, float]:
    """GiB by item. `at most` counts what is there while the hungriest stage runs, all before it kept."""
    shape = plans[-1].size.shape
    grown = shape.num_parameters * base_bytes_per_weight
    results = [WIDE * plan.size.learning_parameters for plan in plans]
    passing = [
        CHECKPOINTS * plan.size.checkpoint_bytes + (2 * result if plan.wish.keeps_best else 0)
        for plan, result in zip(plans, results, strict=True)
    ]
    finished = shape.num_parameters * BYTES[export_dtype]
    most = max(grown + sum(results[: place + 1]) + passing[place] for place in range(len(plans)))
    items = {
        "base with new rows": grown,
        "results of the stages": sum(results),
        "a checkpoint": max(plan.size.checkpoint_bytes for plan in plans),
        "checkpoints while a stage runs": max(passing),
        "finished model": finished,
        "at most": max(most, grown + sum(results) + finished),
    }
    return {name: num_bytes / GIB for name, num_bytes in items.items()}


def host_gib(plans: Sequence[StagePlan]) -> float:
    """Memory of the host beside a GPU: the model is loaded there in fp32, frozen matrices stay there in fp32 while the
    GPU holds them in 16 bits, and a checkpoint's tensors are copied to it."""
    return (
        max(
            max(plan.size.shape.num_parameters * WIDE, plan.size.narrow_parameters * WIDE + plan.size.checkpoint_bytes)
            for plan in plans
        )
        / GIB
    )
