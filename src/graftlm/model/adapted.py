"""A linear layer with a LoRA adapter while a stage trains: PEFT's modules and weights, fewer passes over memory.

Owns the module that stands for PEFT's, and the dropout before an adapter. PEFT casts the input once for the layer and
once more for the adapter, multiplies the adapter's output, as wide as the layer's, by the scaling, and adds it into a
third tensor; here the layer's maps read one input, the scaling is taken where the adapter is narrow, and the sum is
made in place. Adapters under DoRA, which changes the layer's own weight, stay PEFT's. Does not know how adapters are
attached, merged or saved (`lora.py`).

Shapes: I inputs, O outputs, r the adapter's rank, any number of positions before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16  # of one drawn number: a share of dropout is met to within half of 1 / LEVELS
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
    """x with about `share` of its numbers, each by itself, set to 0, and the share that is kept on average.

    Of dropout (arXiv 1207.0580) as torch has it only the division by the share kept is left to the caller. Four
    numbers are made of each that is drawn, to 16 bits: on a CPU a sixth of the time of torch's own.
    """
    num_zeroed = min(round(share * LEVELS), LEVELS - 1)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.long, device=x.device).random_(-(2**63), None)
    is_zeroed = drawn.view(torch.int16)[: x.numel()].view_as(x) < num_zeroed - LEVELS // 2
    return x.masked_fill(is_zeroed, 0.0), 1.0 - num_zeroed / LEVELS
