"""Which of a run's processes this is, by the environment that `torchrun` sets.

Owns that reading, and whether the launcher is still there; it is asked before the heavy libraries are there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.errors import UserError

PARENT = os.getppid()
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a run's processes this is, by the environment; `local` numbers count those of this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def place_here(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place. Raises UserError where the environment says half of it, or nonsense.

    A world of one is no set of ranks, whoever set it.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return Place()
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set and {', '.join(missing)} is not: this is no complete set of ranks.",
            "Start it through torchrun or with --gpus, or unset WORLD_SIZE.",
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    defaults = ("0", "1", "0", "1")
    values = [environment.get(name, default) for name, default in zip(names, defaults, strict=True)]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        told = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise UserError(f"The environment names no rank: {told}.", "Start it through torchrun or with --gpus.")
    return Place(*map(int, values))


def is_orphan(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torch's launcher, which started this rank, has been killed: nobody can stop or end the rank then, and the
    store that ranks meet in died with it. Whoever else starts ranks may leave them alone."""
    return "TORCHELASTIC_RUN_ID" in environment and os.getppid() != PARENT
