"""One 16-bit copy of what several linear maps read, where autocast would make one for each.

Owns that copy. Its rounding is autocast's, so every product is the same to the bit; gradients are added up in the
dtype of what was rounded, not in 16 bits. Does not know which maps read what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.model.adapted import AdaptedLinear


def rounded_once(x: Tensor, readers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """x for each reader: one rounded copy under autocast. Layers of PEFT's own want x as it is, and then it is x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and all(isinstance(reader, (nn.Linear, AdaptedLinear)) for reader in readers):
        return _RoundedOnce.apply(x, torch.get_autocast_dtype(kind), len(readers))
    return (x,) * len(readers)


class _RoundedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        rounded = x.to(dtype)
        return (rounded, *(rounded.view_as(rounded) for _ in range(count - 1)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        first, *others = grad_outputs
        total = first.to(ctx.dtype, copy=True)
        for grad in others:
            total += grad
        return total, None, None
