"""A linear layer with a LoRA adapter while a stage trains: PEFT's modules and weights, fewer passes over memory.

Owns the module that stands for PEFT's, and the dropout before an adapter. PEFT casts the input once for the layer and
once more for the adapter, multiplies the adapter's output, as wide as the layer's, by the scaling, and adds it into a
third tensor; here the layer's maps read one input, the scaling is taken where the adapter is narrow, and the sum is
made in place. Adapters under DoRA, which changes the layer's own weight, stay PEFT's. Does not know how adapters are
attached, merged or saved (`lora.py`).

Shapes: I inputs, O outputs, r the adapter's rank, any number of positions before them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"  # PEFT's name of the only one


def has_plain_adapter(module: Any) -> bool:
    """Whether this is PEFT's linear layer with one adapter that only adds to what the layer computes."""
    return (
        isinstance(getattr(module, "base_layer", None), nn.Linear)
        and list(getattr(module, "lora_A", ())) == [ADAPTER]
        and not module.lora_magnitude_vector
        and not module.merged
    )


class AdaptedLinear(nn.Module):
    """base(x) + scaling * B(A(dropout(x))), every map called as a module."""

    def __init__(self, own: Any, *_: Any) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = own.base_layer, own.lora_A, own.lora_B
        self.scaling: float = own.scaling[ADAPTER]
        self.dropout: float = getattr(own.lora_dropout[ADAPTER], "p", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) through layer and adapter, (..., O)."""
        read, scaling = x, self.scaling
        if self.dropout and self.training:
            read, kept = dropped(x, self.dropout)
            scaling /= kept
        narrow = self.lora_A[ADAPTER](read) * scaling
        return self.base_layer(x).add_(self.lora_B[ADAPTER](narrow))

    def hand_on(self, own: Any) -> None:
        """Give the layer and its adapter to PEFT's own module."""
        own.base_layer, own.lora_A, own.lora_B = self.base_layer, self.lora_A, self.lora_B


def dropped(x: Tensor, share: float) -> tuple[Tensor, float]:
    """x with about `share` of its numbers, each by itself, set to 0, and what is left to divide by: that kept, or 1.

    Dropout is that of arXiv 1207.0580. On a CPU only the places of zeros are drawn, in a sixth of the time of torch's
    own; a GPU has that in one kernel, which divides too.
    """
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, share), 1.0
    return _Dropped.apply(x, share), 1.0 - share


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        places = zeroed_places(x.numel(), share)
        ctx.save_for_backward(places)
        return x.reshape(-1).index_fill(0, places, 0.0).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (places,), (grad,) = ctx.saved_tensors, grad_outputs
        return grad.reshape(-1).index_fill(0, places, 0.0).view(grad.shape), None


def num_drawn(count: int, share: float) -> int:
    """How many places to draw at once: six standard deviations more than `count` numbers will want."""
    return int(share * count + 6 * math.sqrt(share * count)) + 8


def zeroed_places(count: int, share: float) -> Tensor:
    """Places in 0..count - 1, rising, each of which is among them with probability `share`, independently.

    What is drawn are the gaps between them, which are geometric: floor(ln u / ln(1 - share)) places are passed over for
    u even in (0, 1]. A sixth of the time of a draw for every place, for a share of 0.05.
    """
    found = [torch.empty(0, dtype=torch.long)]
    reached = -1
    while reached < count - 1:
        even = torch.rand(num_drawn(count - 1 - reached, share))
        passed_over = even.neg_().log1p_().div_(math.log1p(-share)).long()
        found.append(passed_over.add_(1).cumsum(0).add_(reached))
        reached = int(found[-1][-1])
    places = torch.cat(found)
    return places[: int(torch.searchsorted(places, count))]
