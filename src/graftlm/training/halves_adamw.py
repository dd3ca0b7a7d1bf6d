"""AdamW over float32 weights of which some are held in halves: torch's fused kernel, block by block.

Owns the step. A block's weights are put together in memory that stays in a cache, moved, and split again; what comes
out is to the bit what the kernel makes of whole weights. Does not know roles or rates (`optim.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.model.halves import BLOCK, join_into, split_from


class HalvesAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with its state as torch's own keeps it.

    `low_of` is the lower half of each weight that is held in halves, and may change between steps.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        low_of: Mapping[Parameter, Tensor],
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self._low_of = low_of

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None, "gradients are there when a step is taken"
        for group in self.param_groups:
            learning = [weight for weight in group["params"] if weight.grad is not None]
            for weight in learning:
                self._count(weight)
            whole = [weight for weight in learning if weight not in self._low_of]
            if whole:
                _move(group, whole, [weight.grad for weight in whole], [self.state[weight] for weight in whole])
            for weight in learning:
                if weight in self._low_of:
                    self._move_halves(group, weight)

    def _count(self, weight: Parameter) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(weight, dtype=torch.float32)
        state["step"] += 1

    def _move_halves(self, group: Mapping[str, Any], weight: Parameter) -> None:
        state = self.state[weight]
        size = BLOCK[weight.device.type]
        block = torch.empty(min(size, weight.numel()), device=weight.device)
        assert weight.grad is not None
        written = (weight.detach(), self._low_of[weight], state["exp_avg"], state["exp_avg_sq"])
        flat = (weight.grad.reshape(-1), *(tensor.view(-1) for tensor in written))
        for gradient, high, low, exp_avg, exp_avg_sq in zip(*(tensor.split(size) for tensor in flat), strict=True):
            wide = join_into(block[: len(high)], high, low)
            _move(group, [wide], [gradient], [{**state, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}])
            split_from(wide, high, low)


def _move(
    group: Mapping[str, Any], weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    """The kernel behind torch's AdamW, which counts no steps."""
    torch._fused_adamw_(
        weights, gradients, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
        [state["step"] for state in states], lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
