"""A learning float32 weight held in two halves: 16 bits that products take, and 16 that only the optimizer reads.

Owns the split, the way back to the same bits, and which weights of a model are held so while a stage trains: those of
the layers' linear maps and of a head of its own. Under autocast such a weight is rounded to bfloat16 for every
micro-batch, and the copies are held until its backward; here the upper half is that rounded weight, and both halves
together take the float32's memory. Does not know optimizers or stages.

A weight halfway between two bfloat16s is rounded away from zero, where autocast takes the even one: only so has each
pair of halves one meaning. Both are as near to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from graftlm.model.causal import is_tied, plain_model, vocabulary_modules
from graftlm.model.frozen import HeldLayers, NarrowLinear
from graftlm.model.rows import head_rows, joined

LOW = "|low"  # ends the name under which a weight's lower half is kept
BLOCK = {"cpu": 2**17, "cuda": 2**24}
"""Numbers put together at a time in an optimizer's step, by device. A CPU's second-level cache about holds them with
their gradients and moments (measured: docs/log.md); on a GPU they are to be worth a launch: an estimate."""


def join_into(wide: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Make float32 `wide` of a bfloat16 `high` and an int16 `low` half of its shape; returns it."""
    wide.copy_(high)
    wide.view(torch.int32).add_(low)
    return wide


def split_from(wide: Tensor, high: Tensor, low: Tensor) -> None:
    """Fill both halves from float32 `wide`, which is written over.

    Taking the lower 16 bits as a signed number away leaves the nearest float32 whose lower 16 bits are 0: a bfloat16.
    """
    bits = wide.view(torch.int32)
    low.copy_(bits)
    bits.sub_(low)
    high.copy_(wide)


def joined_halves(high: Tensor, low: Tensor) -> Tensor:
    """The float32 weight that two halves make."""
    return join_into(torch.empty(high.shape, dtype=torch.float32, device=high.device), high, low)


def joined_by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved weights by name, those that were saved in halves (NAME and NAME|low) put together again."""
    return {
        name: joined_halves(tensor, tensors[name + LOW]) if name + LOW in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(LOW)
    }


@dataclass(slots=True)
class Halves:
    """The weights of a model that are held so: `low_of` is the lower half of each, whose parameter is the upper one.

    The parameters stay the same objects; their gradients are float32 either way.
    """

    low_of: dict[Parameter, Tensor] = field(default_factory=dict)
    layers: HeldLayers = field(default_factory=lambda: HeldLayers(()))

    @torch.no_grad()
    def split(self, model: nn.Module) -> None:
        """Hold the learning float32 weights of the linear maps and of a head that is not tied in halves."""
        found = tuple(_linear_maps(model))
        for parent, name, layer in found:
            weight: Any = layer.weight
            self._split((weight,))
            setattr(parent, name, NarrowLinear(weight, layer.bias))
        self.layers = HeldLayers(found)
        if not is_tied(model) and len(head_rows(model)) > 1:
            self._split(head_rows(model))

    def _split(self, parts: Sequence[Parameter]) -> None:
        """Split a matrix that is parameters one above the other, within the memory it takes: first all upper halves."""
        whole = joined(parts)
        wide, memory = whole.clone(), whole.view(-1)
        high = memory.view(torch.bfloat16)[: wide.numel()].view(wide.shape)
        low = memory.view(torch.int16)[wide.numel() :].view(wide.shape)
        split_from(wide, high, low)
        num_rows = [len(part) for part in parts]
        for part, own_high, own_low in zip(parts, high.split(num_rows), low.split(num_rows), strict=True):
            part.data, part.grad_dtype = own_high, torch.float32
            self.low_of[part] = own_low

    @torch.no_grad()
    def restore(self) -> None:
        """Hold them whole again, where they lie."""
        while self.low_of:  # one after another, so that no more than one is held twice
            weight, low = self.low_of.popitem()
            weight.data = joined_halves(weight.data, low)
        self.layers.restore()
        self.layers = HeldLayers(())


def _linear_maps(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers whose float32 weight learns, the head among them where its rows are not split; no tied one."""
    tied_head = vocabulary_modules(model)[1] if is_tied(model) else None
    for parent in plain_model(model).modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer is not tied_head and layer.weight.requires_grad:
                yield parent, name, layer
