"""Who is to blame: one role of the weights after another put back for a moment.

Owns the ways a role can be taken out of a step (its last good weights, or a neutral start) and the blame for a loss
that rose. Leaves every weight as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.device import Precision
from graftlm.model.rows import Role, parameter_groups_by_role
from graftlm.model.sharded import own_part
from graftlm.training.batches import Steps
from graftlm.training.loop import response_loss_sum
from graftlm.training.ranks import ALONE, Ranks

CLEAR_SHARE = 0.5  # of the rise that putting a role back must undo to be blamed for it


@dataclass(frozen=True, slots=True)
class PutBack:
    """Parameters of one role by name, as this rank holds them, and other weights for them: their last good ones, or a
    neutral start."""

    parameters: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    is_last_good: bool

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the parameters hold those weights for a while."""
        before = {name: p.clone() for name, p in self.parameters.items()}
        try:
            self._copy(self.weights)
            yield
        finally:
            self._copy(before)

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def roles_put_back(model: Any, last_good: Mapping[str, Tensor] | None) -> Iterator[tuple[Role, list[PutBack]]]:
    """For each role that learns, the ways to take it out of a step.

    `last_good` are trained weights by name, as this rank holds them. The neutral start of an adapter is zero, that of
    new rows the mean old row.
    """
    roles = parameter_groups_by_role(model)
    for role, named in roles.items():
        learning = {name: own_part(p) for name, p in named if p.requires_grad}
        if not learning:
            continue
        ways = []
        if last_good is not None and learning.keys() <= last_good.keys():
            ways.append(PutBack(learning, {name: last_good[name] for name in learning}, True))
        if role == "adapter":
            ways.append(PutBack(learning, {name: torch.zeros_like(p) for name, p in learning.items()}, False))
        elif role == "new_rows":
            # Embedding and head have rows of one length; old and new parts of each come in the same order.
            means = [p.detach().mean(0) for _, p in roles["old_rows"]]
            start = {name: mean.expand_as(p) for (name, p), mean in zip(learning.items(), means, strict=True)}
            ways.append(PutBack(learning, start, False))
        yield role, ways


@torch.no_grad()
def blame_for_rise(
    model: Any,
    steps: Steps,
    step: int,
    precision: Precision,
    last_good: Mapping[str, Tensor] | None,
    best: float,
    ranks: Ranks = ALONE,
) -> tuple[str, ...]:
    """Roles each of which, put back alone, undoes at least half of a step's rise (nats per target) above `best`."""
    batches = steps.micro_batches(step, precision.device)
    num_targets = max(steps.num_targets(step), 1)

    def loss() -> float:
        own = sum(response_loss_sum(model, batch, precision).item() for batch in batches)
        return ranks.total(own)[0] / num_targets

    was_training = model.training
    model.eval()
    now = loss()
    found = []
    for role, ways in roles_put_back(model, last_good):
        for way in (way for way in ways if way.is_last_good):
            with way.held():
                undone = now - loss()
            if undone >= CLEAR_SHARE * max(now - best, 0.0):
                found.append(role)
    model.train(was_training)
    return tuple(found)
