"""Frozen matrices held in the dtype they are multiplied in: half the memory of a frozen base, and no cast in each pass.

Owns the linear layers over 16-bit weights that stand in for frozen ones while a stage trains. Under autocast a float32
weight is rounded to 16 bits before each product; rounded once, every product is the same to the bit. A pass without
autocast (the doctor takes some) multiplies the rounded weight in the input's own dtype. On demand the body's are held
in 8 or 4 bits instead (`quantised.py`), which is lossy. Does not know why a layer is frozen.
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
            weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
            bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
            setattr(parent, name, NarrowLinear(weight, bias))
        else:
            setattr(parent, name, QuantisedLinear(layer, base))
    return HeldLayers(tuple(found))


class NarrowLinear(nn.Linear):
    """A linear layer over a weight in 16 bits, frozen or learning."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, input: Tensor) -> Tensor:
        """Of (..., in_features), (..., out_features): 16 bits under autocast to them, else the input's own dtype."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.weight.dtype:
            return linear(input, self.weight, self.bias)
        return _WideProduct.apply(input, self.weight, self.bias)


class _WideProduct(torch.autograd.Function):
    """input @ weight.T + bias in the input's dtype; the wide weight is made again in backward and never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (input, weight), (grad,) = ctx.saved_tensors, grad_outputs
        flat = grad.flatten(0, -2)
        grad_weight = None if input is None else flat.T @ input.flatten(0, -2)
        return grad @ weight.to(grad.dtype), grad_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
