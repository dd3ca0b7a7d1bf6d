"""Norms, attention, gated MLPs and adapted layers that keep fewer tensors for the way back, and compute the same.

Owns the modules that stand in for them while a stage trains, under the same names and with the same weights, so that
hooks, adapters and saved weights see no difference. Autograd keeps of RMSNorm the normed input besides the input
itself, of SwiGLU the gate's SiLU, of attention queries and keys as they were rotated, and under autocast a 16-bit copy
of a layer's input for each product with it: all can be made again from what is kept anyway, at the price of a few
products by element. The forward pass is the same to the bit, but for adapters whose scaling is no power of two. Does
not know stages.

Shapes: H hidden size, any number of positions before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from graftlm.model.adapted import AdaptedLinear, has_plain_adapter
from graftlm.model.attention import MAPS, PackedAttention
from graftlm.model.pointwise import AS_WRITTEN, Pointwise
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


def make_lean(body: nn.Module, pointwise: Pointwise = AS_WRITTEN) -> LeanModules:
    """Replace what `_stand_in` knows of a Llama-like body; its forward then needs `layout=` (`attend_packed`)."""
    found = [
        (parent, name, module, stand_in)
        for parent in body.modules()
        for name, module in parent.named_children()
        if (stand_in := _stand_in(module)) is not None
    ]
    for parent, name, module, stand_in in reversed(found):  # what lies inside another before that other
        setattr(parent, name, stand_in(module, pointwise))
    return LeanModules(tuple((parent, name, module) for parent, name, module, _ in found))


def _stand_in(module: Any) -> type[_LeanNorm | _LeanMLP | PackedAttention | AdaptedLinear] | None:
    """For RMSNorm, an MLP gated by SiLU, attention without dropout, and a linear layer with a plain adapter."""
    if has_plain_adapter(module):
        return AdaptedLinear
    if hasattr(module, "variance_epsilon"):
        return _LeanNorm
    if isinstance(getattr(module, "act_fn", None), _SILUS):
        return _LeanMLP
    if all(hasattr(module, name) for name in MAPS) and not module.attention_dropout:
        return PackedAttention
    return None


class _LeanNorm(nn.Module):
    """RMSNorm that keeps its input and one number a position."""

    def __init__(self, own: Any, pointwise: Pointwise) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.pointwise = own.weight, own.variance_epsilon, pointwise

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.weight, self.variance_epsilon, self.pointwise)

    def hand_on(self, own: Any) -> None:
        """Give what was learned to the model's own norm."""
        own.weight = self.weight


class _LeanMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) that keeps gate and up, and x once."""

    def __init__(self, own: Any, pointwise: Pointwise) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.pointwise = pointwise

    def forward(self, x: Tensor) -> Tensor:
        for_gate, for_up = rounded_once(x, (self.gate_proj, self.up_proj))
        return self.down_proj(_Gated.apply(self.gate_proj(for_gate), self.up_proj(for_up), self.pointwise))

    def hand_on(self, own: Any) -> None:
        """Give the maps, adapters on them included, to the model's own MLP."""
        own.gate_proj, own.up_proj, own.down_proj = self.gate_proj, self.up_proj, self.down_proj


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, pointwise: Pointwise) -> Tensor:
        output, inverse_rms = pointwise.normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.pointwise = pointwise
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.pointwise.normed_back(grad_outputs[0], *ctx.saved_tensors, ctx.needs_input_grad[1])
        return (*grads, None, None)


class _Gated(torch.autograd.Function):
    """Backward makes the gate's SiLU again, so its numbers are autograd's to the bit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, pointwise: Pointwise) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.pointwise = pointwise
        return pointwise.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*ctx.pointwise.gated_back(grad_outputs[0], *ctx.saved_tensors), None)
