"""DeepSpeed's ZeRO as an engine: what learns is cut over the ranks as DeepSpeed cuts it, and moved by its optimizer.

Owns the twin of the model that DeepSpeed watches; pieces of what is cut are `zero_parts.py`'s. Both models
share one memory: held-out readings and the doctor's passes go through the plain one, unseen by DeepSpeed, whose hooks
would take every backward pass for a part of a step. The only file importing DeepSpeed, an extra; none of its
checkpoints (pickles) is written or read. Loss scale, clipping, skips and schedule stay those of the loop.

Source: ZeRO, arXiv 1910.02054; gradients and moments partitioned is its second stage.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from graftlm.device import Precision
from graftlm.recipe import Stage
from graftlm.training.batches import Batch
from graftlm.training.loop import response_loss_sum
from graftlm.training.optim import make_optimizer
from graftlm.training.ranks import BUCKET_BYTES, Ranks
from graftlm.training.trainable import copy_weights, learning_roles, trainable_parameters
from graftlm.training.zero_parts import ZeroParts

MOMENTS = ("exp_avg", "exp_avg_sq")
CONFIG = {
    # Sizes DeepSpeed wants to know and this road decides anew at every step.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # Neither fp16 nor bf16: weights are float32 and products run under the loop's own autocast and loss scale.
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**60,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": BUCKET_BYTES // 4,
        "allgather_bucket_size": BUCKET_BYTES // 4,
        "compute_grad_norm": False,  # taken by role, of the same gradients
    },
}


class ZeroEngine:
    """ZeRO's second stage: every rank holds all weights, and of gradients and moments its part."""

    def __init__(self, model: Any, stage: Stage, ranks: Ranks) -> None:
        """Cuts what learns of a prepared model. All ranks must call it together. Raises RankLost."""
        learning = trainable_parameters(model)
        twins = {name: Parameter(p.detach()) for name, p in learning.items()}
        self._twin = _Watched(_twin_of(model, learning, twins), list(twins.values()))
        names = {id(p): name for name, p in learning.items()}
        roles = {role: [names[id(p)] for p in found] for role, found in learning_roles(model).items()}
        optimizer = make_optimizer({role: [twins[name] for name in found] for role, found in roles.items()}, stage)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        with ranks.passes_answered():
            self._engine = _initialized(self._twin, optimizer, ranks)
        for name, p in learning.items():
            p.data = twins[name].data  # DeepSpeed lays them into memory of its own
        self.optimizer: Any = self._engine.optimizer
        # DeepSpeed has put one flat partition in the place of a group's parameters.
        flats = {name: group_of[id(twin)]["params"][0] for name, twin in twins.items()}
        self.parts = ZeroParts(learning, twins, flats, ranks)
        self.parts.roles = {role: [self.parts.pieces[name].weights for name in found] for role, found in roles.items()}

    def take_passes(self, _: nn.Module, batches: Sequence[Batch], precision: Precision, factor: float) -> float:
        """Forward and backward over a step's micro-batches, of which every rank has as many, through the twin."""
        loss_sum = 0.0
        for piece in self.parts.pieces.values():
            piece.weights.grad = None
        self._twin.train()
        for number, batch in enumerate(batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            loss = self._engine(batch, precision, factor)
            self._engine.backward(loss * factor)
            loss_sum += loss.item()
        return loss_sum

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as this rank holds it: NAME|KEY to its tensor, in the optimizer's own memory."""
        return {
            f"{name}|{key}": piece.of_partition(value) if value.ndim else value
            for name, piece in self.parts.pieces.items()
            for key, value in self.optimizer.optimizer.state.get(piece.flat, {}).items()
        }

    @torch.no_grad()
    def put_back(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Go on from saved weights and, as this rank holds them, moments. Raises UserError where they do not fit."""
        copy_weights(self.parts.by_name, weights)
        self.optimizer.refresh_fp32_params()
        state = self.optimizer.optimizer.state
        state.clear()
        for joined, value in moments.items():
            name, _, key = joined.rpartition("|")
            piece = self.parts.pieces[name]
            held = state[piece.flat]
            if key not in held:
                held[key] = torch.zeros_like(piece.flat) if key in MOMENTS else value.to(piece.flat.device)
            if key in MOMENTS:
                piece.of_partition(held[key]).copy_(value)


class _Watched(nn.Module):
    """What DeepSpeed is given: a pass over a micro-batch as a module, whose parameters are those that learn.

    The model lies in a tuple, so that DeepSpeed neither casts nor sends the weights that do not learn.
    """

    def __init__(self, model: Any, learning: Sequence[Parameter]) -> None:
        super().__init__()
        self.learning = nn.ParameterList(learning)
        self._held = (model,)

    def train(self, mode: bool = True) -> _Watched:
        """Of the model as well."""
        self._held[0].train(mode)
        return super().train(mode)

    def forward(self, batch: Batch, precision: Precision, factor: float) -> Tensor:
        """The micro-batch's summed loss."""
        return response_loss_sum(self._held[0], batch, precision, factor)


def _twin_of(model: Any, learning: Mapping[str, Parameter], twins: Mapping[str, Parameter]) -> Any:
    """The same modules with `twins` where `learning` stood; all other tensors are the model's own."""
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**held, **{id(p): twins[name] for name, p in learning.items()}})


class _World:
    """All ranks as DeepSpeed asks for them: its own copy of their group would wait longer than this run's patience."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._group: Any = dist.new_group(timeout=timedelta(seconds=ranks.patience_seconds))

    def get_data_parallel_group(self) -> Any:
        """All ranks."""
        return self._group

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._ranks.count

    def get_data_parallel_rank(self) -> int:
        """This one's number."""
        return self._ranks.rank

    def get_model_parallel_group(self) -> None:
        """No model is cut across."""
        return

    def get_model_parallel_world_size(self) -> int:
        """No model is cut across."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """No model is cut across."""
        return 0


def _initialized(twin: _Watched, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Any:
    """DeepSpeed's engine over all ranks, which have met already."""
    device = next(twin.parameters()).device
    os.environ["DS_ACCELERATOR"] = device.type  # it would take a GPU where there is one
    with contextlib.redirect_stdout(sys.stderr):  # it logs to stdout, which is the user's
        import deepspeed  # pyright: ignore[reportMissingImports]

        engine, *_ = deepspeed.initialize(
            model=twin, optimizer=optimizer, config=copy.deepcopy(CONFIG), mpu=_World(ranks), dist_init_required=False
        )
    return engine
