"""The arms of `bench/cpu.py`: our trainer, and each peer at its documented default and at settings tuned by us.

A step is 16 rows in every arm. Owns names and settings only; what a setting means, its peer's arm in `peers/` knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from judging import OURS

from graftlm.malloc import AS_SET

BATCH_ROWS = 16
PACKS = {511: 4, 1023: 2, 2047: 1}
"""Packs a step's rows fill at each budget (tokens): one less than a multiple of 8, since LLaMA-Factory adds a token."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting of one trainer; `packs` is how many packs it makes of a step's rows, `environment` what its process
    is given besides what all are."""

    name: str
    peer: str
    settings: dict[str, Any] = field(default_factory=dict)
    packs: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def _arms() -> list[Arm]:
    bare, plain = {"gradient_checkpointing": False}, {"disable_gradient_checkpointing": True}
    packed = [
        Arm(f"trl bfd packing {tokens}", "trl", {**bare, "packing": True, "max_length": tokens}, packs)
        for tokens, packs in PACKS.items()
    ] + [
        Arm(f"llamafactory neat_packing {tokens}", "llamafactory",
            {**plain, "neat_packing": True, "cutoff_len": tokens}, packs)
        for tokens, packs in PACKS.items()
    ]  # fmt: skip
    best = packed[len(PACKS)]
    return [
        Arm(OURS, OURS, environment=AS_SET),
        # Eight rows a device are both peers' default; two such batches make the step.
        Arm("trl default", "trl", {"per_device_train_batch_size": 8}),
        Arm("trl padded", "trl", {**bare, "per_device_train_batch_size": BATCH_ROWS}),
        Arm("trl padding_free", "trl",
            {**bare, "padding_free": True, "max_length": None, "per_device_train_batch_size": BATCH_ROWS}),
        Arm("llamafactory default", "llamafactory", {"per_device_train_batch_size": 8}),
        Arm("llamafactory padded", "llamafactory", {**plain, "per_device_train_batch_size": BATCH_ROWS}),
        *packed,
        replace(best, name=f"{best.name}, malloc as ours", environment=AS_SET),
    ]  # fmt: skip


ARMS = _arms()
QUICK = ("trl default", "trl bfd packing 1023", "llamafactory default", "llamafactory neat_packing 1023")


def in_turns(arms: list[Arm]) -> Iterator[Arm]:
    """Ours, a peer, ours, a peer, ours."""
    ours = next(arm for arm in arms if arm.name == OURS)
    for arm in arms:
        if arm is not ours:
            yield from (ours, arm)
    yield ours
