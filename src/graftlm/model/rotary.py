"""The rotation of queries and keys by position, and its undoing for gradients.

Computes what transformers' `apply_rotary_pos_emb` computes, to the bit, in float32 or wider whatever goes in, and in
memory of one result: no half is copied to be turned. Does not know what a rotation's angles are made of.

Shapes: T positions, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (T, D) each. Source: rotary embeddings, arXiv 2104.09864, halves apart as in GPT-NeoX."""


def rotate(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of D; in the wider dtype of x and the rotation."""
    cos_T1D, sin_T1D = (part[:, None] for part in rotation)
    half = x_THD.shape[-1] // 2
    wide = x_THD.to(torch.promote_types(x_THD.dtype, cos_T1D.dtype))
    turned = wide * cos_T1D
    turned[..., :half] -= wide[..., half:] * sin_T1D[..., :half]
    turned[..., half:] += wide[..., :half] * sin_T1D[..., half:]
    return turned


def rotate_back(grad_THD: Tensor, rotation: Rotation) -> Tensor:
    """The gradient of what `rotate` was given: its linear map transposed."""
    cos_T1D, sin_T1D = (part[:, None] for part in rotation)
    half = grad_THD.shape[-1] // 2
    back = grad_THD * cos_T1D
    back[..., :half] += grad_THD[..., half:] * sin_T1D[..., half:]
    back[..., half:] -= grad_THD[..., :half] * sin_T1D[..., :half]
    return back


def rotated(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """`rotate` with a gradient, which keeps nothing of x."""
    return _Rotated.apply(x_THD, *rotation)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, *rotation: Tensor) -> Tensor:
        ctx.save_for_backward(*rotation)
        ctx.dtype = x_THD.dtype
        return rotate(x_THD, (rotation[0], rotation[1]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return rotate_back(grad_outputs[0], ctx.saved_tensors).to(ctx.dtype), None, None
