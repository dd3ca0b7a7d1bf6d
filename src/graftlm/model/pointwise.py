"""What a decoder layer computes number by number, norms, gates and rotations, and the gradients of it.

Owns these as plain functions, and the choice of having torch compile each into one kernel: written with torch's own
operations each is several passes over memory. Compiled they round otherwise, within the tolerances of the tests; 16-bit
ones keep float32 between operations. Does not know modules or autograd.

Shapes: H hidden size, any number of positions before it; T positions, N heads of size D.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from graftlm.errors import UserError


def normed(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / sqrt(mean(x^2) + eps), and the factor 1 / sqrt(...) of each position.

    Rounded as transformers' LlamaRMSNorm does it: in float32, but float64 stays. Where the squares of x pass the
    largest number the output is 0 and looks healthy: there the factor is NaN, so that the gradient is, the step is
    skipped and told. Source: RMSNorm, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * (wide * inverse_rms).to(x.dtype), inverse_rms.masked_fill(inverse_rms == 0, torch.nan)


def normed_back(
    grad: Tensor, x: Tensor, weight_H: Tensor, inverse_rms: Tensor, weight_learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what `normed` was given, x and, where it learns, weight.

    With n = x / rms and g the gradient times weight: (g - n * mean(g * n)) / rms, and the sum of grad * n.
    """
    wide = inverse_rms.dtype
    weight, unscaled = weight_H.to(wide), x.to(wide) * inverse_rms
    by_weight = grad.to(wide) * unscaled
    grad_weight = by_weight.flatten(0, -2).sum(0).to(weight_H.dtype) if weight_learns else None
    along = (by_weight @ weight)[..., None] / x.shape[-1]
    return (grad.to(wide) * weight).addcmul_(unscaled, along, value=-1).mul_(inverse_rms).to(x.dtype), grad_weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Source: SwiGLU, arXiv 2002.05202."""
    return silu(gate) * up


def gated_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)


def rotated(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of D; in the wider dtype of x and the rotation.

    What transformers' `apply_rotary_pos_emb` computes, in memory of one result: no half is copied to be turned.
    """
    cos_T1D, sin_T1D = cos_TD[:, None], sin_TD[:, None]
    half = x_TND.shape[-1] // 2
    wide = x_TND.to(torch.promote_types(x_TND.dtype, cos_TD.dtype))
    turned = wide * cos_T1D
    turned[..., :half] -= wide[..., half:] * sin_T1D[..., :half]
    turned[..., half:] += wide[..., :half] * sin_T1D[..., half:]
    return turned


def rotated_back(grad_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The gradient of what `rotated` was given: its linear map transposed."""
    cos_T1D, sin_T1D = cos_TD[:, None], sin_TD[:, None]
    half = grad_TND.shape[-1] // 2
    back = grad_TND * cos_T1D
    back[..., :half] += grad_TND[..., half:] * sin_T1D[..., half:]
    back[..., half:] -= grad_TND[..., :half] * sin_T1D[..., :half]
    return back


@dataclass(frozen=True, slots=True)
class Pointwise:
    """The functions of this file, as they are written or each compiled."""

    normed: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = normed
    normed_back: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]] = normed_back
    gated: Callable[[Tensor, Tensor], Tensor] = gated
    gated_back: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = gated_back
    rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated
    rotated_back: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated_back


AS_WRITTEN = Pointwise()


def compiled(device_type: str, place: str = "stages.NAME") -> Pointwise:
    """All of them compiled by torch for a device, on their first call there (seconds each; torch keeps them on disk).

    One kernel for all lengths: a run that goes on after a restart rounds as it did. Raises UserError where torch cannot
    compile: it wants a C++ compiler on a CPU, Triton on a GPU. `place` is the stage that asks for it.
    """
    try:
        return _kernels(device_type)
    except Exception as error:  # whatever a compiler, its headers or its cache may do
        cause = getattr(error, "inner_exception", error)  # what went wrong in a backend of torch.compile
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(
            f"{place}.compile is true, and torch cannot compile here: {reason}",
            f"Install a C++ compiler (on a GPU: the Triton that came with torch), or set {place}.compile=false.",
        ) from None


@cache
def _kernels(device_type: str) -> Pointwise:
    made = Pointwise(*(torch.compile(getattr(AS_WRITTEN, f.name), dynamic=True) for f in fields(Pointwise)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.gated(*torch.ones(2, 1, 64, 8, device=device_type))
    return made
