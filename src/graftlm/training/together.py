"""What the ranks of a stage hold in common although one of them alone has it: checkpoints of rank 0's disk, incidents,
what is seen of weights that lie in parts.

Owns the way from one rank to all. Does not know collectives (`ranks.py`) nor when any of this happens (`stage.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.health.incident import Class, Incident
from graftlm.model.sharded import own_part
from graftlm.training.checkpoint import Checkpoint, Stored
from graftlm.training.part_files import read_parts
from graftlm.training.parts import Parts
from graftlm.training.ranks import Ranks
from graftlm.training.zero_parts import ZeroParts

# What a step was, over all ranks, is the gravest of what each found in its own rows. A rank that saw nothing says the
# same as one without labels, which is only told where none had any.
GRAVEST: tuple[Class, ...] = (
    "weights-not-finite", "forward-not-finite", "forward-overflow", "backward-overflow", "scale-too-high",
    "not-reproduced", "empty-labels", "loss-rose",
)  # fmt: skip


def checkpoint_from_first(
    parts: Parts | ZeroParts, find: Callable[[], Stored | None], is_disk_shared: bool
) -> Checkpoint | None:
    """What rank 0 finds, on every rank, which holds on to its parts alone.

    One in parts each rank reads for itself, where its layers are cut too and the disk is that of all; of any other,
    rank 0 reads group by group and hands it out. Raises what `find` raises, on every rank; RankLost.
    """
    ranks = parts.ranks
    found: list[Stored | None] = []

    def told() -> dict[str, Any] | None:
        found.append(find())
        return None if found[0] is None else {**asdict(found[0]), "folder": str(found[0].folder)}

    message = ranks.from_first(told)
    if message is None:
        return None
    stored = Stored(Path(message["folder"]), message["values"], tuple(message["groups"]), message["is_in_parts"])
    if is_disk_shared and stored.is_in_parts and isinstance(parts, Parts):
        tensors = {group: _own(parts, stored, group) for group in stored.groups}
    else:
        tensors = {
            group: ranks.tensors_from_first(stored.tensors(group) if ranks.is_first else None, parts.part)
            for group in stored.groups
        }
    return Checkpoint(tensors, stored.values)


def _own(parts: Parts, stored: Stored, group: str) -> dict[str, Tensor]:
    """What this rank holds of a group, from all ranks' files."""
    return {name: own_part(part) for name, part in read_parts(stored.folder, group, parts.room_for).items()}


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
