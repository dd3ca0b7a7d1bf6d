"""What the ranks of a stage hold in common although one of them alone has it: checkpoints of rank 0's disk, incidents.

Owns the way from one rank to all. Does not know collectives (`ranks.py`) nor when any of this happens (`stage.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from graftlm.health.incident import Class, Incident
from graftlm.training.checkpoint import Checkpoint
from graftlm.training.ranks import Ranks

# What a step was, over all ranks, is the gravest of what each found in its own rows. A rank that saw nothing says the
# same as one without labels, which is only told where none had any.
GRAVEST: tuple[Class, ...] = (
    "weights-not-finite", "forward-not-finite", "forward-overflow", "backward-overflow", "scale-too-high",
    "not-reproduced", "empty-labels", "loss-rose",
)  # fmt: skip


def checkpoint_from_first(ranks: Ranks, load: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What rank 0 loads, on every rank: no other needs its disk. Raises what `load` raises, on every rank; RankLost."""
    loaded: list[Checkpoint | None] = []

    def told() -> dict[str, Any] | None:
        loaded.append(load())
        found = loaded[0]
        return None if found is None else {"values": found.values, "groups": list(found.tensors)}

    message = ranks.from_first(told)
    if ranks.is_alone:
        return loaded[0]
    if message is None:
        return None
    own = loaded[0].tensors if loaded and loaded[0] is not None else {}
    tensors = {group: ranks.tensors_from_first(own.get(group)) for group in message["groups"]}
    return Checkpoint(tensors, message["values"])


def gravest(ranks: Ranks, own: Incident) -> Incident:
    """The incident of the whole step, with the rank whose rows it comes from. Raises RankLost."""
    if ranks.is_alone:
        return own
    told = ranks.gather(asdict(replace(own, rank=ranks.rank)))
    found = min(told, key=lambda incident: (GRAVEST.index(incident["cause"]), incident["rank"]))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Incident(**values)
