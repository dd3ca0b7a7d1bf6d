"""What the ranks of a stage hold in common although one of them alone has it: checkpoints of rank 0's disk, incidents,
what is seen of weights that lie in parts.

Owns the way from one rank to all. Does not know collectives (`ranks.py`) nor when any of this happens (`stage.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from graftlm.health.incident import Class, Incident
from graftlm.training.checkpoint import Checkpoint
from graftlm.training.ranks import Ranks

# What a step was, over all ranks, is the gravest of what each found in its own rows. A rank that saw nothing says the
# same as one without labels, which is only told where none had any.
GRAVEST: tuple[Class, ...] = (
    "weights-not-finite", "forward-not-finite", "forward-overflow", "backward-overflow", "scale-too-high",
    "not-reproduced", "empty-labels", "loss-rose",
)  # fmt: skip


def checkpoint_from_first(
    ranks: Ranks, load: Callable[[], Checkpoint | None], keep: Callable[[str, Tensor], Tensor]
) -> Checkpoint | None:
    """What rank 0 loads, on every rank: no other needs its disk. `keep` says what of a tensor this rank holds on to.

    Raises what `load` raises, on every rank; RankLost.
    """
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
    tensors = {group: ranks.tensors_from_first(own.pop(group, None), keep) for group in message["groups"]}
    return Checkpoint(tensors, message["values"])


def gravest(ranks: Ranks, own: Incident) -> Incident:
    """The incident of the whole step, with the rank whose rows it comes from. Raises RankLost."""
    if ranks.is_alone:
        return own
    # Where weights are shared out all ranks took the same rows again, and each knows whose they were.
    told = ranks.gather(asdict(own if ranks.mesh else replace(own, rank=ranks.rank)))
    found = min(told, key=lambda incident: (GRAVEST.index(incident["cause"]), incident["rank"]))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Incident(**values)


def bad_weight_of_any(ranks: Ranks, own: str) -> str:
    """The weight that is not finite, where ranks hold parts and each has searched its own; "" for none."""
    if ranks.mesh is None:
        return own
    return next(filter(None, ranks.gather(own)), "")


@dataclass(frozen=True, slots=True)
class SeenOfPart:
    """What a look finds of one learning parameter, or of a rank's part of it: the sum of its squares, its gradient's
    largest magnitude, whether there is a gradient, and whether all of it is zero or missing."""

    squares: float
    largest: float
    has_gradient: bool
    is_silent: bool


def seen_of_parts(ranks: Ranks, own: Mapping[str, SeenOfPart], in_parts: Collection[str]) -> dict[str, SeenOfPart]:
    """What was seen of whole parameters by name: of those `in_parts`, from every rank's part; of others, rank 0's."""
    if ranks.mesh is None:
        return dict(own)
    told = ranks.gather({name: asdict(one) for name, one in own.items()})
    # Of copies of the parts, the first counts.
    of_ranks = [{name: SeenOfPart(**one) for name, one in theirs.items()} for theirs in told[: ranks.num_parts]]
    return {
        name: SeenOfPart(
            squares=sum(seen[name].squares for seen in of_ranks),
            largest=max(seen[name].largest for seen in of_ranks),
            has_gradient=any(seen[name].has_gradient for seen in of_ranks),
            is_silent=all(seen[name].is_silent for seen in of_ranks),
        )
        if name in in_parts
        else of_ranks[0][name]
        for name in own
    }
