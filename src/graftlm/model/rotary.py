"""The rotation of queries and keys by position, with a gradient that keeps nothing of them.

Does not know what a rotation's angles are made of, nor how it is computed (`pointwise.py`).

Shapes: T positions, N heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftlm.model.pointwise import AS_WRITTEN, Pointwise


class Rotation(NamedTuple):
    """Cosines and sines by position. Source: rotary embeddings, arXiv 2104.09864, halves apart as in GPT-NeoX."""

    cos_TD: Tensor
    sin_TD: Tensor
    pointwise: Pointwise = AS_WRITTEN

    def at(self, places_N: Tensor) -> Rotation:
        """That of some of the positions."""
        return self._replace(cos_TD=self.cos_TD.index_select(0, places_N), sin_TD=self.sin_TD.index_select(0, places_N))


def rotated(x_TND: Tensor, rotation: Rotation) -> Tensor:
    """x turned by `rotation`."""
    return _Rotated.apply(x_TND, *rotation)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, pointwise: Pointwise) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.pointwise, ctx.dtype = pointwise, x_TND.dtype
        return pointwise.rotated(x_TND, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.pointwise.rotated_back(grad_outputs[0], *ctx.saved_tensors).to(ctx.dtype), None, None, None
