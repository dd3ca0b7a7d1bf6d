"""What of a stage's weights, gradients and moments this rank holds where DeepSpeed's ZeRO cuts them.

Owns the way from the flat partitions of its optimizer to named tensors and back. Imports nothing of DeepSpeed: where a
piece lies and what its gradient is, it is told (`zero.py`). Does not know passes or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.device import gradient_norms
from graftlm.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's piece of one learning tensor, flat: `weights` are the tensor's entries from `start` on, and lie in
    the optimizer's own partition `flat`, from its entry `offset` on. Empty where this rank holds none of the tensor."""

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


def piece_at(flat: Tensor, offset: int, start: int, length: int) -> Piece:
    """The piece of `length` entries that lies at `offset` of a partition, and is its tensor's from `start` on."""
    return Piece(Parameter(flat.detach().narrow(0, offset, length)), start, flat, offset)


class ZeroParts:
    """What learns: by name as the model has it, and by role in this rank's pieces, as gradients come.

    The seam of `Parts`. `shapes` are those of whole tensors. `are_whole`: every rank holds every weight, and only
    gradients and moments are cut. `gradient_of` tells a piece's gradient by name, a mean over ranks, in the memory the
    optimizer will read; None where this rank has none of it.
    """

    def __init__(
        self,
        learning: Mapping[str, Parameter],
        shapes: Mapping[str, torch.Size],
        roles: Mapping[str, Sequence[str]],
        pieces: Mapping[str, Piece],
        gradient_of: Callable[[str], Tensor | None],
        are_whole: bool,
        ranks: Ranks,
    ) -> None:
        self.by_name, self.pieces, self.are_whole, self.ranks = dict(learning), pieces, are_whole, ranks
        self.roles = {role: [pieces[name].weights for name in names] for role, names in roles.items()}
        self._gradient_of = gradient_of
        self._shapes = shapes

    @property
    def weights(self) -> dict[str, Parameter]:
        """What is saved of the weights, as `wholes` takes it."""
        return self.by_name

    @property
    def lying_whole(self) -> list[Parameter]:
        """Those that every rank holds all of."""
        return list(self.by_name.values()) if self.are_whole else []

    @property
    def recorded(self) -> dict[str, list[Parameter]]:
        """This rank's pieces by role, where anything learns."""
        return {role: found for role, found in self.roles.items() if found}

    def sum_gradients(self) -> None:
        """Make every piece's gradient that of the whole step, in the memory the optimizer will read."""
        for name, piece in self.pieces.items():
            gradient = self._gradient_of(name)
            if gradient is not None:
                piece.weights.grad = gradient.mul_(self.ranks.count)  # one denominator for the step: a sum, not a mean

    def gradient_norms(self, groups: Mapping[str, Sequence[Parameter]]) -> dict[str, float]:
        """The 2-norm of each group's gradients over all pieces: the same bits on every rank. Raises RankLost."""
        squares = self.ranks.total(*(norm * norm for norm in gradient_norms(groups).values()))
        return {name: math.sqrt(square) for name, square in zip(groups, squares, strict=True)}

    def mean(self, value: float, count: int, power: int) -> float:
        """The power mean of what each rank found in `count` entries of its pieces. Raises RankLost."""
        total, num_entries = self.ranks.total(value**power * count, count)
        return (total / max(num_entries, 1)) ** (1 / power)

    def part(self, key: str, whole: Tensor) -> Tensor:
        """What this rank keeps of a saved weight NAME: all of it; of an optimizer's state NAME|KEY: its piece."""
        name, _, is_state = key.partition("|")
        return self.pieces[name].of(whole).clone() if is_state and whole.ndim else whole

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those weights and states whole: as they are and where they lie, or put together from all ranks one after
        another, on the CPU of rank 0. All ranks must call it together. Raises RankLost."""
        found = {}
        for key, part in parts.items():
            name, _, is_state = key.partition("|")
            if not part.ndim or (self.are_whole and not is_state):
                found[key] = part.detach()
                continue
            piece = self.pieces[name]
            whole = torch.zeros(self._shapes[name], device=piece.weights.device)
            piece.of(whole).copy_(part if is_state else piece.weights.detach())
            self.ranks.sum_in_place(whole)
            if self.ranks.is_first:
                found[key] = whole.cpu()
        return found

    def refuse_different(self, what: str) -> None:
        """Stop where ranks hold other bits of what they should hold alike. Raises RuntimeError, RankLost."""
        self.ranks.refuse_different(self.lying_whole, what)
