"""Norms, attention layers and gated MLPs that keep fewer tensors for the way back, and compute the same.

Owns the modules that stand in for them while a stage trains, under the same names and with the same weights, so that
hooks, adapters and saved weights see no difference. Autograd keeps of RMSNorm the normed input besides the input
itself, of SwiGLU the gate's SiLU, of attention queries and keys as they were rotated, and under autocast a 16-bit copy
of a layer's input for each product with it: all can be made again from what is kept anyway, at the price of a few
products by element. The forward pass is the same to the bit. Does not know stages.

Shapes: H hidden size, any number of positions before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from graftlm.model.attention import MAPS, PackedAttention
from graftlm.model.rounded import rounded_once

_SILUS = (nn.SiLU, SiLUActivation)


@dataclass(frozen=True, slots=True)
class LeanModules:
    """What stands for what: (parent, name, the model's own module) of each that was replaced."""

    replaced: tuple[tuple[nn.Module, str, Any], ...]

    def restore(self) -> None:
        """Put the model's own modules back, with what has become of their weights and maps since."""
        for parent, name, own in self.replaced:
            getattr(parent, name).hand_on(own)
            setattr(parent, name, own)


def make_lean(body: nn.Module) -> LeanModules:
    """Replace what `_stand_in` knows of a Llama-like body; its forward then needs `layout=` (`attend_packed`)."""
    found = [
        (parent, name, module, stand_in)
        for parent in body.modules()
        for name, module in parent.named_children()
        if (stand_in := _stand_in(module)) is not None
    ]
    for parent, name, module, stand_in in reversed(found):  # what lies inside another before that other
        setattr(parent, name, stand_in(module))
    return LeanModules(tuple((parent, name, module) for parent, name, module, _ in found))


def _stand_in(module: Any) -> type[_LeanNorm | _LeanMLP | PackedAttention] | None:
    """For RMSNorm, an MLP gated by SiLU, and attention without dropout."""
    if hasattr(module, "variance_epsilon"):
        return _LeanNorm
    if isinstance(getattr(module, "act_fn", None), _SILUS):
        return _LeanMLP
    if all(hasattr(module, name) for name in MAPS) and not module.attention_dropout:
        return PackedAttention
    return None


class _LeanNorm(nn.Module):
    """RMSNorm that keeps its input and one number a position."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = own.weight, own.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.weight, self.variance_epsilon)

    def hand_on(self, own: Any) -> None:
        """Give what was learned to the model's own norm."""
        own.weight = self.weight


class _LeanMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) that keeps gate and up, and x once."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

    def forward(self, x: Tensor) -> Tensor:
        for_gate, for_up = rounded_once(x, (self.gate_proj, self.up_proj))
        return self.down_proj(_Gated.apply(self.gate_proj(for_gate), self.up_proj(for_up)))

    def hand_on(self, own: Any) -> None:
        """Give the maps, adapters on them included, to the model's own MLP."""
        own.gate_proj, own.up_proj, own.down_proj = self.gate_proj, self.up_proj, self.down_proj


class _Normed(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), rounded as transformers' LlamaRMSNorm does it: in float32, but float64 stays.

    Its gradient: with n = x / rms and g the gradient times weight, (g - n * mean(g * n)) / rms. Source: RMSNorm, arXiv
    1910.07467, differentiated. Where the squares of x pass the largest number the output is 0 and looks healthy: there
    the gradient is NaN, so that the step is skipped and told.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms.masked_fill(inverse_rms == 0, torch.nan))
        return weight * (wide * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        grad, normed = grad_outputs[0].to(wide), x.to(wide) * inverse_rms
        by_weight = grad * normed
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = by_weight.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            along = (by_weight @ weight.to(wide))[..., None] / x.shape[-1]
            grad_x = (grad * weight.to(wide)).addcmul_(normed, along, value=-1).mul_(inverse_rms).to(x.dtype)
        return grad_x, grad_weight, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up; backward makes the SiLU again, so its numbers are autograd's to the bit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        grad = grad_outputs[0]
        return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)
