"""Optimizer and schedule.

Owns parameter groups by role (adapter, body, old rows, new rows; each split by whether it decays), AdamW, its state
as named tensors, and the learning rate's shape. Does not know the loop or what the parameters mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import Parameter

from graftlm.recipe import Stage
from graftlm.training.halves_adamw import HalvesAdamW


def make_optimizer(
    roles: dict[str, list[Parameter]], stage: Stage, low_of: Mapping[Parameter, torch.Tensor] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """AdamW over the roles' parameters, each with its own peak rate and decay; vectors (norms) never decay.

    `low_of`: the lower halves of those held in halves.

    Source: decoupled weight decay, arXiv 1711.05101.
    """
    groups = []
    for role, parameters in roles.items():
        own = getattr(stage.groups, role)
        peak_lr = own.peak_lr if own.peak_lr is not None else stage.peak_lr
        decay = own.weight_decay if own.weight_decay is not None else stage.weight_decay
        for decays in (True, False):
            members = [p for p in parameters if (p.ndim >= 2) == decays]
            if members:
                weight_decay = decay if decays else 0.0
                rates = {"role": role, "asked_lr": peak_lr, "peak_lr": peak_lr, "lr": peak_lr}
                groups.append({"params": members, "weight_decay": weight_decay, **rates})
    if stage.split_master:
        return HalvesAdamW(groups, stage.betas, stage.eps, low_of)
    return torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=True)


def cut_peak_rates(optimizer: torch.optim.Optimizer, of_roles: Mapping[str, float]) -> None:
    """Set every group's peak to its role's share of what was asked; roles not in `of_roles` get all of it."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["asked_lr"] * of_roles.get(group["role"], 1.0)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rate_shape(stage: Stage, num_steps: int) -> Callable[[int], float]:
    """The factor (0..1) of the peak rate for the update after `num_updates` ones: warm-up, then the schedule.

    Warm-up rises linearly; its steps are `ceil(warmup_ratio * num_steps)` as in the Trainer of transformers,
    except that the first update already moves the weights. Cosine and linear fall to 0 after the last update.
    """
    warmup = stage.warmup_steps if stage.warmup_steps is not None else math.ceil(stage.warmup_ratio * num_steps)

    def factor(num_updates: int) -> float:
        if num_updates < warmup:
            return (num_updates + 1) / (warmup + 1)
        share = min((num_updates - warmup) / max(num_steps - warmup, 1), 1.0)
        if stage.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1.0 - share if stage.schedule == "linear" else 1.0

    return factor


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state for a checkpoint: `NAME|KEY` to its tensor, for the named `parameters` it holds.

    They are the optimizer's own tensors, where they lie: a step changes them.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        f"{names[id(parameter)]}|{key}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned, and nothing else: moments gathered since are forgotten."""
    optimizer.state.clear()
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        # AdamW keeps its step count where its kernel wants it; moments lie beside their parameter.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
