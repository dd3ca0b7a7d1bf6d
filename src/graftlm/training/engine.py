"""How a stage's gradients are made and used: what learns, the optimizer that moves it, and a step's passes.

Owns the choice between our own engine (weights whole, or layers shared out by FSDP2) and DeepSpeed's (`zero.py`), which
stand behind one seam. Does not know the loop's order, nor what is saved where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.recipe import Stage
from graftlm.training.loop import take_passes
from graftlm.training.optim import make_optimizer, optimizer_tensors, restore_optimizer
from graftlm.training.parts import Parts, parts_of
from graftlm.training.ranks import Ranks
from graftlm.training.trainable import copy_weights
from graftlm.training.zero import ZeroEngine


class PlainEngine:
    """torch's own backward pass and AdamW over what this rank holds."""

    def __init__(self, model: Any, stage: Stage, ranks: Ranks, low_of: Mapping[Parameter, Tensor]) -> None:
        self.parts: Parts = parts_of(model, ranks, low_of)
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.parts.roles, stage, low_of)
        self.take_passes = take_passes

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """They lie as passes want them, or are put together in each (FSDP2)."""
        return contextlib.nullcontext()

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as this rank holds it: NAME|KEY to its tensor, in the optimizer's own memory."""
        return optimizer_tensors(self.optimizer, self.parts.by_name)

    def put_back(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Go on from saved weights and moments, as this rank holds them. Raises UserError where they do not fit."""
        copy_weights(self.parts.by_name, weights, self.parts.low_of)
        restore_optimizer(self.optimizer, self.parts.by_name, moments)


def make_engine(
    model: Any, stage: Stage, ranks: Ranks, low_of: Mapping[Parameter, Tensor] = MappingProxyType({})
) -> PlainEngine | ZeroEngine:
    """The engine the ranks were told to train a prepared model with; `low_of`: lower halves of weights held in halves.

    All must call it together. Raises RankLost.
    """
    return ZeroEngine(model, stage, ranks) if ranks.zero_stage else PlainEngine(model, stage, ranks, low_of)
