"""Frozen matrices held in the dtype they are multiplied in: half the memory of a frozen base, and no cast in each pass.

Owns the linear layers that stand in for frozen ones while a stage trains. Under autocast a float32 weight is rounded
to 16 bits before each product; rounded once, every product is the same to the bit. A pass without autocast (the doctor
takes some) multiplies the rounded weight in the input's own dtype. On demand the body's are held in 8 or 4 bits instead
(`quantised.py`), which is lossy. Does not know why a layer is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graftlm.model.causal import is_tied, plain_model, vocabulary_modules
from graftlm.model.quantised import QuantisedLinear

FrozenBase = Literal["exact", "int8", "nf4"]


@dataclass(frozen=True, slots=True)
class HeldLayers:
    """What stands for what: (parent, name, the layer itself) of each layer that was replaced, the last one first."""

    replaced: tuple[tuple[nn.Module, str, nn.Linear], ...]

    def restore(self) -> None:
        """Put the layers themselves back, frozen ones with their float32 weights where they lay: on the CPU."""
        for parent, name, layer in self.replaced:
            setattr(parent, name, layer)


def hold_frozen_as(model: nn.Module, dtype: torch.dtype, base: FrozenBase = "exact") -> HeldLayers:
    """Replace every frozen float32 linear layer by one that holds its weight as `dtype`, or the body's as `base` says.

    The layers themselves are kept, outside the model, for `restore`. Nothing is replaced for a `dtype` of 32 bits or
    more and an exact base, nor a head tied to the embedding, nor a layer under DoRA, whose norm is taken of the exact
    weight. Raises UserError where a base in 8 or 4 bits is asked for and cannot be had.
    """
    head = vocabulary_modules(model)[1]
    tied_head = head if is_tied(model) else None
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for parent in plain_model(model).modules():
        if getattr(parent, "lora_magnitude_vector", None):
            continue
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear or layer is tied_head or layer.weight.dtype != torch.float32:
                continue
            if not any(p.requires_grad for p in layer.parameters()):
                found.append((parent, name, layer))
    if dtype.itemsize >= torch.float32.itemsize:
        found = [(parent, name, layer) for parent, name, layer in found if base != "exact" and layer is not head]
    for parent, name, layer in found:
        if base == "exact" or layer is head:
            setattr(parent, name, _HeldLinear(layer, dtype))
        else:
            setattr(parent, name, QuantisedLinear(layer, base))
    return HeldLayers(tuple(found))


class _HeldLinear(nn.Linear):
    """A frozen linear layer with its weight in 16 bits."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.weight.dtype:
            return linear(input, self.weight, self.bias)
        return _WideProduct.apply(input, self.weight, self.bias)


class _WideProduct(torch.autograd.Function):
    """input @ weight.T + bias in the input's dtype; the wide weight is made again in backward and never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad_outputs[0] @ weight.to(grad_outputs[0].dtype), None, None
