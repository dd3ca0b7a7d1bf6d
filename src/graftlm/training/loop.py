"""The loop: one optimizer step after another, the same for every stage.

Owns the order forward, backward, clip, schedule, step, observe. Knows neither LoRA nor fp16 nor Chinese: what
learns is whatever the optimizer holds, precision is passed in, text has become ids. Everything that watches or
saves is a function in `on_step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graftlm.device import Precision
from graftlm.model.body import labelled_hidden_states
from graftlm.model.loss import linear_cross_entropy_sum
from graftlm.model.rows import head_rows
from graftlm.training.batches import Batch, Steps
from graftlm.training.optim import set_learning_rates
from graftlm.training.parts import Parts
from graftlm.training.zero_parts import ZeroParts


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did. `loss` is nats per target token; norms are before clipping; `step` counts from 1.

    `num_updates` counts steps that touched the weights: the schedule follows it, so a skipped step does not
    advance it.
    """

    step: int
    num_updates: int
    loss: float
    lr: float
    grad_norm: float
    grad_norms: dict[str, float]
    loss_scale: float
    skipped: bool
    num_rows: int
    num_tokens: int
    num_targets: int
    seconds: float
    row_ids: list[int]


def response_loss_sum(
    model: torch.nn.Module,
    batch: Batch,
    precision: Precision,
    expected_grad: float = 1.0,
    *,
    adds_to_grads: bool = False,
) -> torch.Tensor:
    """Summed cross-entropy (nats) over the micro-batch's labels; arguments as `linear_cross_entropy_sum` takes them."""
    with precision.autocast():
        hidden_NH = labelled_hidden_states(model, batch.ids_1T, batch.layout, batch.labelled_N)
    return linear_cross_entropy_sum(
        hidden_NH,
        head_rows(model),
        batch.targets_N,
        precision.compute_dtype,
        expected_grad,
        adds_to_grads=adds_to_grads,
    )


def take_passes(model: torch.nn.Module, batches: Sequence[Batch], precision: Precision, factor: float) -> float:
    """Forward and backward over a step's micro-batches, whose gradients add up; returns their summed loss (nats).

    `factor` is what a loss is multiplied by before backward.
    """
    loss_sum = 0.0
    for batch in batches:
        loss = response_loss_sum(model, batch, precision, factor, adds_to_grads=True)
        (loss * factor).backward()
        loss_sum += loss.item()
    return loss_sum


def train(
    model: torch.nn.Module,
    steps: Steps,
    *,
    first_step: int,
    num_updates: int,
    lr_at: Callable[[int], float],
    optimizer: torch.optim.Optimizer,
    parts: Parts | ZeroParts,
    take_passes: Callable[[torch.nn.Module, Sequence[Batch], Precision, float], float] = take_passes,
    precision: Precision,
    max_grad_norm: float,
    on_step: Sequence[Callable[[StepRecord], None]],
) -> None:
    """Take the steps from `first_step` on. `lr_at(num_updates)` is a factor in 0..1 of each group's peak rate.

    With other ranks, each goes through its own micro-batches; from summed gradients on, all compute the same.
    """
    model.train()
    ranks = parts.ranks
    for step in range(first_step, steps.num_steps):
        started = time.perf_counter()
        micro_batches = steps.micro_batches(step, precision.device)
        # One denominator for the whole step: the loss is the mean over its target tokens, however they were packed and
        # shared out.
        num_targets = steps.num_targets(step)
        factor = precision.grad_factor(num_targets)
        optimizer.zero_grad(set_to_none=True)
        loss_sum = take_passes(model, micro_batches, precision, factor)
        num_tokens = sum(batch.num_tokens for batch in micro_batches if batch.row_ids)
        if not ranks.is_alone:
            loss_sum, num_tokens = ranks.total(loss_sum, num_tokens)
            parts.sum_gradients()
        grad_norm, grad_norms = precision.unscale_and_clip(parts.roles, max_grad_norm, parts.gradient_norms)
        set_learning_rates(optimizer, lr_at(num_updates))
        loss_scale = precision.loss_scale
        was_updated = precision.step(optimizer, grad_norm)
        num_updates += was_updated
        record = StepRecord(
            step=step + 1,
            num_updates=num_updates,
            loss=loss_sum / max(num_targets, 1),
            lr=max(group["lr"] for group in optimizer.param_groups),
            grad_norm=grad_norm,
            grad_norms=grad_norms,
            loss_scale=loss_scale,
            skipped=not was_updated,
            num_rows=len(steps.row_ids(step)),
            num_tokens=int(num_tokens),
            num_targets=num_targets,
            seconds=time.perf_counter() - started,
            row_ids=steps.row_ids(step),
        )
        for observe in on_step:
            observe(record)
