"""What of a stage's weights this rank holds, and the way from parts to wholes and back.

Owns the parameters an optimizer moves: of layers shared out over ranks (`model/sharded.py`) this rank's part as a plain
tensor, of everything else the parameter itself. So what follows a backward pass (sums, norms, clipping, AdamW, moments)
computes with plain tensors, sharded or not. Does not know stages or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from graftlm.device import gradient_norms
from graftlm.model.halves import LOW
from graftlm.model.sharded import as_cut, is_shared_out, on_host, own_part, part_of, whole_of
from graftlm.training.ranks import Ranks
from graftlm.training.trainable import learning_roles, trainable_parameters


@dataclass(frozen=True, slots=True)
class Parts:
    """What learns, by name and by role, as this rank holds it; `shared_out` are those of them that the model holds in
    parts, as it holds them. `host_mesh`: over whom they are, for tensors on the CPU. `low_of`: the lower half of each
    that is held in halves."""

    by_name: dict[str, Parameter]
    roles: dict[str, list[Parameter]]
    shared_out: dict[str, Parameter]
    ranks: Ranks
    host_mesh: DeviceMesh | None = None
    low_of: Mapping[Parameter, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is saved of the weights, where it lies; of one held in halves each by itself."""
        lows = {name + LOW: self.low_of[p] for name, p in self.by_name.items() if p in self.low_of}
        return {**self.by_name, **lows}

    @property
    def lying_whole(self) -> list[Parameter]:
        """Those that every rank holds all of."""
        return [p for name, p in self.by_name.items() if name not in self.shared_out]

    @property
    def recorded(self) -> dict[str, list[Parameter]]:
        """What learns by role, where anything does: on each rank some of it, and everything on one rank alone."""
        cut = {id(self.by_name[name]) for name in self.shared_out}
        is_first_copy = self.ranks.mesh is None or self.ranks.rank < self.ranks.num_parts
        counts = {True: is_first_copy, False: self.ranks.mesh is None or self.ranks.is_first}
        return {role: [p for p in found if counts[id(p) in cut]] for role, found in self.roles.items() if found}

    def sum_gradients(self) -> None:
        """Make every gradient that of the whole step: added up over ranks, or this rank's part of that sum.

        Raises RankLost.
        """
        for name, parameter in self.shared_out.items():
            gradient, parameter.grad = parameter.grad, None  # summed by the backward passes; the next begin anew
            self.by_name[name].grad = None if gradient is None else own_part(gradient)
        self.ranks.sum_gradients(self.lying_whole)

    def gradient_norms(self, groups: Mapping[str, Sequence[Parameter]]) -> dict[str, float]:
        """The 2-norm of each group's gradients, over all their parts: the same bits on every rank. Raises RankLost."""
        if self.ranks.mesh is None:
            return gradient_norms(groups)
        cut = {id(self.by_name[name]) for name in self.shared_out}
        of_parts = gradient_norms({name: [p for p in group if id(p) in cut] for name, group in groups.items()})
        of_wholes = gradient_norms({name: [p for p in group if id(p) not in cut] for name, group in groups.items()})
        # Where copies of the parts are held, one of each counts.
        counts = self.ranks.rank < self.ranks.num_parts
        squares = self.ranks.total(*(norm * norm if counts else 0.0 for norm in of_parts.values()))
        return {name: math.sqrt(s + of_wholes[name] ** 2) for name, s in zip(groups, squares, strict=True)}

    def mean(self, value: float, count: int, power: int) -> float:
        """The power mean of what each rank found in `count` entries of its parts. Raises RankLost."""
        if self.ranks.mesh is None:
            return value
        total, num_entries = self.ranks.total(value**power * count, count)
        return (total / max(num_entries, 1)) ** (1 / power)

    def part(self, key: str, whole: Tensor) -> Tensor:
        """What this rank holds of a weight NAME, or of its optimizer's state NAME|KEY."""
        like = self._like(key, whole)
        return whole if like is None else part_of(whole, like)

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of those tensors: as they are and where they lie, or, of layers shared out, put together from all
        ranks one after another, in memory of their own on the CPU of rank 0. All ranks must call it together."""
        if self.ranks.mesh is None:
            return {key: part.detach() for key, part in parts.items()}
        found = {}
        for key, part in parts.items():
            like = self._like(key, part)
            whole = part if like is None else whole_of(part, like)
            if self.ranks.is_first:
                found[key] = whole.detach().to("cpu", copy=like is None)
        return found

    def to_write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors that every rank holds, whole or its part, those that this rank is to write, where they lie: each
        once among all ranks, and about as many bytes a rank. Every rank knows it for itself."""
        count, width = self.ranks.count, self.ranks.num_parts
        held, found = [0] * count, {}
        for key, tensor in sorted(tensors.items()):
            like = self._like(key, tensor)
            num_bytes = tensor.nbytes if like is None else math.prod(like.shape) * tensor.element_size() // width
            size = 1 if like is None else width  # of parts, all ranks of one copy write theirs
            first = min(range(0, count, size), key=lambda rank: held[rank])
            for rank in range(first, first + size):
                held[rank] += num_bytes
            if first <= self.ranks.rank < first + size:
                found[key] = tensor.detach()
        return found

    def laid_out(self, key: str, part: Tensor) -> Tensor:
        """What this rank holds of `key`, on the CPU: told where in the whole it lies, if it is a part."""
        like = self._like(key, part)
        return part if like is None or self.host_mesh is None else as_cut(part.cpu(), like, self.host_mesh)

    def room_for(self, key: str, whole: Tensor) -> Tensor:
        """Memory on the CPU for what this rank holds of `key`, laid out; `whole` says its dtype and its whole shape."""
        like = self._like(key, whole)
        shape = whole.shape if like is None else self.by_name[key.partition("|")[0]].shape
        return self.laid_out(key, torch.empty(shape, dtype=whole.dtype))

    def refuse_different(self, what: str) -> None:
        """Stop where ranks hold other bits of what they should hold alike. Raises RuntimeError, RankLost."""
        self.ranks.refuse_different([*self.lying_whole, *self.low_of.values()], what)
        self.ranks.refuse_different([self.by_name[name] for name in self.shared_out], what, self.ranks.num_parts)

    def _like(self, key: str, tensor: Tensor) -> Parameter | None:
        """The parameter whose cut `key` has; None where it lies whole, as an optimizer's count of steps does."""
        return self.shared_out.get(key.partition("|")[0]) if tensor.ndim else None


def parts_of(model: Any, ranks: Ranks, low_of: Mapping[Parameter, Tensor] = MappingProxyType({})) -> Parts:
    """What this rank holds of a model prepared to learn, its layers shared out or not; `low_of` as `Parts` has it."""
    learning = trainable_parameters(model)
    shared_out = {name: p for name, p in learning.items() if is_shared_out(p)}
    by_name = {name: Parameter(own_part(p)) if name in shared_out else p for name, p in learning.items()}
    names = {id(p): name for name, p in learning.items()}
    roles = {role: [by_name[names[id(p)]] for p in members] for role, members in learning_roles(model).items()}
    return Parts(by_name, roles, shared_out, ranks, None if ranks.mesh is None else on_host(ranks.mesh), low_of)


def num_held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes this rank holds of parameters."""
    return sum(own.numel() * own.element_size() for own in map(own_part, tensors))
