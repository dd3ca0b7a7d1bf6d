"""Frozen matrices in 8 or 4 bits, with which a large base fits a small card. Lossy, and off unless asked for.

Owns the linear layer that keeps a rounded matrix and makes it wide again in each product, forward and backward; both
see the same rounded numbers. The only file importing bitsandbytes, an extra. Does not choose layers (`frozen.py`).

Source: NF4 is that of QLoRA, arXiv 2305.14314, in blocks of 64; 8 bits are bitsandbytes' dynamic map, arXiv 2110.02861,
in blocks of 256. Each block keeps its largest magnitude in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graftlm.errors import UserError

Bits = Literal["int8", "nf4"]
BLOCK = {"int8": 256, "nf4": 64}
BYTES_A_NUMBER = {"int8": 1 + 4 / BLOCK["int8"], "nf4": 0.5 + 4 / BLOCK["nf4"]}
"""Of a held matrix: its codes, and a float32 a block."""


def require_bitsandbytes() -> None:
    """Raises UserError where bitsandbytes is missing."""
    _bitsandbytes()


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is held in `bits`. Raises UserError where bitsandbytes is missing."""

    def __init__(self, layer: nn.Linear, bits: Bits) -> None:
        super().__init__()
        functional = _bitsandbytes()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        weight = layer.weight.detach().contiguous()
        if bits == "nf4":
            codes, state = functional.quantize_4bit(weight, blocksize=BLOCK[bits], quant_type=bits)
        else:
            codes, state = functional.quantize_blockwise(weight, blocksize=BLOCK[bits])
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("largest", state.absmax, persistent=False)
        self.register_buffer("levels", state.code, persistent=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def wide_weight(self, dtype: torch.dtype) -> Tensor:
        """The rounded matrix, (out_features, in_features), in `dtype`."""
        functional, codes = _bitsandbytes(), self.get_buffer("codes")
        shape = torch.Size((self.out_features, self.in_features))
        state = functional.QuantState(
            self.get_buffer("largest"), shape, self.get_buffer("levels"), BLOCK[self.bits], self.bits, dtype
        )
        if self.bits == "nf4":
            return functional.dequantize_4bit(codes, state, quant_type=self.bits)
        return functional.dequantize_blockwise(codes, state)

    def forward(self, input: Tensor) -> Tensor:
        """Of (..., in_features), (..., out_features) in autocast's dtype, else in the input's own."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return _QuantisedProduct.apply(input.to(dtype), self)


class _QuantisedProduct(torch.autograd.Function):
    """input @ weight.T + bias; the wide matrix is made again in backward and never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return linear(input, layer.wide_weight(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad @ ctx.layer.wide_weight(grad.dtype), None


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise UserError(
            "A base in 8 or 4 bits needs bitsandbytes, and it is not installed.",
            "Install it: pip install 'graftlm[quantised]' (or take frozen_base: exact).",
        ) from None
    return functional
