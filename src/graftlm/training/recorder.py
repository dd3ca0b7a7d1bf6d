"""The flight recorder: how far each step moves each role's weights, and how much of its gradient is zero.

Owns a fixed sample of every trained tensor and what is read from it after a step. It costs a few small copies; whole
tensors would cost as much as the optimizer itself (`bench/recorder.py` measures it). Does not judge what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Parameter

from graftlm.model.halves import joined_halves

SAMPLED = 1024  # of a tensor: its rms is then known to 2 %


class Recorder:
    """Evenly spaced entries of every tensor that learns, at most `SAMPLED` of each, or of each rank's part of it.

    `mean` is a power mean over the ranks that hold parts: of one's value, its number of entries, and the power.
    `low_of` are the lower halves of weights held in halves.
    """

    def __init__(
        self,
        roles: Mapping[str, Sequence[Parameter]],
        mean: Callable[[float, int, int], float] = lambda value, count, power: value,
        low_of: Mapping[Parameter, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._mean, self._low_of = mean, low_of
        self._parameters = {role: [p for p in parameters if p.requires_grad] for role, parameters in roles.items()}
        self._before = {role: [view.clone() for view in self._weights(role)] for role in self._parameters}

    def _weights(self, role: str) -> list[torch.Tensor]:
        """The sample of a role's weights as they are now: views, or of those in halves what both make."""
        return [
            joined_halves(_sample(p), _sample(self._low_of[p])) if p in self._low_of else _sample(p)
            for p in self._parameters[role]
        ]

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """By role, of the sample: rms of the update since the last reading and of the weights, and the share of
        gradient entries that are exactly zero (body and adapter: rows that no token names are zero by right)."""
        update, weight, zero = {}, {}, {}
        for role, before in self._before.items():
            views = self._weights(role)
            count = sum(view.numel() for view in views)
            if views:
                torch._foreach_sub_(before, views)
            update[role], weight[role] = (self._mean(_rms(found, count), count, 2) for found in (before, views))
            if views:
                torch._foreach_copy_(before, views)
            if role in ("body", "adapter"):
                gradients = [_sample(p.grad) for p in self._parameters[role] if p.grad is not None]
                sampled = sum(view.numel() for view in gradients)
                nonzero = torch.stack([view.count_nonzero() for view in gradients]).sum().item() if gradients else 0
                zero[role] = self._mean(1 - nonzero / max(sampled, 1), sampled, 1)
        return {"update_rms": update, "weight_rms": weight, "zero_gradient_share": zero}


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLED))]


def _rms(tensors: list[torch.Tensor], count: int) -> float:
    if not tensors:
        return 0.0
    return torch.stack(torch._foreach_norm(tensors)).double().norm().item() / math.sqrt(max(count, 1))
