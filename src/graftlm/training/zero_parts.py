"""What of a stage's weights, gradients and moments this rank holds where DeepSpeed's ZeRO cuts them.

Owns the way from the flat partitions of its optimizer to named tensors and back. Reads where DeepSpeed says that a
parameter's piece lies, and imports nothing of it. Does not know passes or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.device import gradient_norms
from graftlm.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's piece of one learning tensor, flat: from entry `start` on. `weights` lie in the optimizer's own
    partition `flat`, from its entry `offset` on; where this rank holds none of the tensor, it is empty."""

    weights: Parameter
    start: int
    flat: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The same piece of a whole tensor, a view where it can be."""
        return whole.reshape(-1).narrow(0, self.start, self.weights.numel())

    def of_partition(self, partition: Tensor) -> Tensor:
        """The same piece of what lies beside the partition: a moment."""
        return partition.narrow(0, self.offset, self.weights.numel())


class ZeroParts:
    """What learns: whole by name, as every rank holds it, and in this rank's pieces by role, as gradients come.

    The seam of `Parts`; a moment is cut, a weight is not.
    """

    def __init__(
        self, learning: Mapping[str, Parameter], twins: Mapping[str, Any], flats: Mapping[str, Tensor], ranks: Ranks
    ) -> None:
        """`twins` are the parameters as DeepSpeed knows them, `flats` by name this rank's partition of their group."""
        self.by_name, self.ranks, self._twins = dict(learning), ranks, twins
        self.pieces = {name: _piece(twin, flats[name]) for name, twin in twins.items()}
        self.roles: dict[str, list[Parameter]] = {}

    @property
    def lying_whole(self) -> list[Parameter]:
        """Every weight: ZeRO's second stage cuts none."""
        return list(self.by_name.values())

    @property
    def recorded(self) -> dict[str, list[Parameter]]:
        """This rank's pieces by role, where anything learns."""
        return {role: found for role, found in self.roles.items() if found}

    def sum_gradients(self) -> None:
        """Make every piece's gradient that of the whole step, in the memory DeepSpeed's step will read."""
        for name, twin in self._twins.items():
            mapped, piece = twin._hp_mapping, self.pieces[name]
            if mapped is not None:
                gradient = mapped.get_lp_grad_fragment(twin._index_in_param_group).view(-1)
                piece.weights.grad = gradient.mul_(self.ranks.count)  # DeepSpeed's is a mean over ranks

    def gradient_norms(self, groups: Mapping[str, Sequence[Parameter]]) -> dict[str, float]:
        """The 2-norm of each group's gradients over all pieces: the same bits on every rank. Raises RankLost."""
        squares = self.ranks.total(*(norm * norm for norm in gradient_norms(groups).values()))
        return {name: math.sqrt(square) for name, square in zip(groups, squares, strict=True)}

    def mean(self, value: float, count: int, power: int) -> float:
        """The power mean of what each rank found in `count` entries of its pieces. Raises RankLost."""
        total, num_entries = self.ranks.total(value**power * count, count)
        return (total / max(num_entries, 1)) ** (1 / power)

    def part(self, key: str, whole: Tensor) -> Tensor:
        """What this rank holds of a weight NAME: all of it; of its optimizer's state NAME|KEY: its piece."""
        name, _, is_state = key.partition("|")
        return self.pieces[name].of(whole).clone() if is_state and whole.ndim else whole

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors whole: weights where they lie; moments on rank 0's CPU, put together one after another. All
        ranks must call it together. Raises RankLost."""
        found = {}
        for key, part in parts.items():
            name, _, is_state = key.partition("|")
            if not is_state or not part.ndim:
                found[key] = part.detach()
                continue
            whole = torch.zeros_like(self.by_name[name])
            self.pieces[name].of(whole).copy_(part)
            self.ranks.sum_in_place(whole)
            if self.ranks.is_first:
                found[key] = whole.cpu()
        return found

    def refuse_different(self, what: str) -> None:
        """Stop where ranks hold other bits of what they should hold alike. Raises RuntimeError, RankLost."""
        self.ranks.refuse_different(self.lying_whole, what)


def _piece(twin: Any, flat: Tensor) -> Piece:
    """This rank's piece of a parameter whose group lies in `flat`, as DeepSpeed has mapped it; empty for none."""
    mapped = twin._hp_mapping
    start, offset, length = 0, 0, 0
    if mapped is not None:
        place = mapped.get_hp_fragment_address()
        start, offset, length = mapped.lp_fragment_address.start, place.start, place.numel
    return Piece(Parameter(flat.detach().narrow(0, offset, length)), start, flat, offset)
