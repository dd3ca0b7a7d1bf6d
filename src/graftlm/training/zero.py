"""DeepSpeed's ZeRO as an engine: what learns is cut over the ranks as DeepSpeed cuts it, and moved by its optimizer.

Owns the twin of the model that DeepSpeed watches; pieces of what is cut are `zero_parts.py`'s. Both models share one
memory: held-out readings and the doctor's passes go through the plain one, unseen by DeepSpeed, whose hooks would take
every backward pass for a part of a step. The only file importing DeepSpeed, an extra; none of its checkpoints (pickles)
is written or read. Loss scale, clipping, skips and schedule stay those of the loop.

Source: ZeRO, arXiv 1910.02054: its second stage cuts gradients and moments, its third weights too.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from graftlm.device import Precision
from graftlm.model.rows import head_rows
from graftlm.recipe import Stage
from graftlm.run import say
from graftlm.training.batches import Batch
from graftlm.training.loop import response_loss_sum
from graftlm.training.optim import make_optimizer
from graftlm.training.ranks import BUCKET_BYTES, Ranks
from graftlm.training.trainable import copy_weights, learning_roles, trainable_parameters
from graftlm.training.zero_parts import Piece, ZeroParts, piece_at

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = BUCKET_BYTES // 4  # numbers in float32
CONFIG = {
    # Sizes DeepSpeed wants to know and the road decides anew at every step.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # Neither fp16 nor bf16: weights are float32 and products run under the loop's own autocast and loss scale.
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**60,
}
ZERO = {
    # Norms are taken by role, of the same gradients.
    2: {"stage": 2, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "compute_grad_norm": False},
    3: {"stage": 3, "reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET},
}


class ZeroEngine:
    """ZeRO over all ranks: each holds its part of gradients and moments and, by the stage of ZeRO, all weights or its
    part of them too."""

    def __init__(self, model: Any, stage: Stage, ranks: Ranks) -> None:
        """Cuts a prepared model. All ranks must call it together. Raises RankLost."""
        deepspeed = _imported(next(model.parameters()).device)
        self._cut = _Third(deepspeed) if ranks.zero_stage == 3 else _Second()
        if ranks.is_first:
            say(
                f"{stage.name}: DeepSpeed starts; the first time on a machine it compiles a part of itself, for minutes"
            )
        learning = trainable_parameters(model)
        twins = self._cut.twins_of(model)
        named = {name: twins[id(p)] for name, p in learning.items()}
        self._twin = self._cut.watched(_twin_of(model, twins), list(named.values()))
        names = {id(p): name for name, p in learning.items()}
        roles = {role: [names[id(p)] for p in found] for role, found in learning_roles(model).items()}
        optimizer = make_optimizer({role: [named[name] for name in found] for role, found in roles.items()}, stage)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        shapes = {name: p.shape for name, p in learning.items()}
        with ranks.passes_answered(), contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is the user's
            config = {**CONFIG, "zero_optimization": ZERO[ranks.zero_stage]}
            self._engine, *_ = deepspeed.initialize(
                model=self._twin, optimizer=optimizer, config=config, mpu=_World(ranks), dist_init_required=False
            )
        self.optimizer: Any = self._engine.optimizer
        self._pairs = [(p, twins[id(p)]) for p in model.parameters() if id(p) in twins]
        self._share()
        pieces = {
            name: self._cut.piece(twin, shapes[name].numel(), group_of[id(twin)], self.optimizer)
            for name, twin in named.items()
        }

        def gradient_of(name: str) -> Tensor | None:
            return self._cut.gradient(named[name], pieces[name])

        self.parts = ZeroParts(learning, shapes, roles, pieces, gradient_of, self._cut.are_whole, ranks)
        if ranks.is_first:
            say(f"{stage.name}: DeepSpeed's ZeRO-{ranks.zero_stage} over {ranks.count} ranks. {self._cut.told}")

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

    @contextlib.contextmanager
    def whole_weights(self, are_changed: bool = False) -> Iterator[None]:
        """Every weight in the plain model on every rank, for a while. All must enter together; none within another.

        `are_changed`: what is written into them, alike on all ranks, stays.
        """
        try:
            with self._cut.gathered([twin for _, twin in self._pairs], are_changed):
                self._share()
                yield
        finally:
            self._share()

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
        with self.whole_weights(are_changed=True):
            copy_weights(self.parts.by_name, weights)
            for name, piece in self.parts.pieces.items():
                piece.weights.copy_(piece.of(self.parts.by_name[name]))
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

    def _share(self) -> None:
        """Let the plain model lie where DeepSpeed has its twin lie now."""
        for parameter, twin in self._pairs:
            parameter.data = twin.data


class _Second:
    """Weights whole on every rank. DeepSpeed knows those that learn, and neither casts nor sends the others."""

    are_whole = True
    told = "Gradients and moments are cut; replays and the look before the first step hold gradients whole."

    def twins_of(self, model: Any) -> dict[int, Parameter]:
        """A twin of each parameter that DeepSpeed is to know, by the id of the model's own."""
        return {id(p): Parameter(p.detach()) for p in trainable_parameters(model).values()}

    def watched(self, model: Any, learning: Sequence[Parameter]) -> nn.Module:
        """What DeepSpeed is given."""
        watched = _Passes((model,))
        watched.learning = nn.ParameterList(learning)
        return watched

    def gathered(self, twins: Sequence[Any], are_changed: bool) -> contextlib.AbstractContextManager[None]:
        """They are."""
        return contextlib.nullcontext()

    def piece(self, twin: Any, num_entries: int, group: Mapping[str, Any], optimizer: Any) -> Piece:
        """This rank's piece of a parameter, as DeepSpeed has mapped it: one flat partition has taken the place of its
        group's parameters."""
        (flat,), mapped = group["params"], twin._hp_mapping
        if mapped is None:
            return piece_at(flat, 0, 0, 0)
        place = mapped.get_hp_fragment_address()
        return piece_at(flat, place.start, mapped.lp_fragment_address.start, place.numel)

    def gradient(self, twin: Any, piece: Piece) -> Tensor | None:
        """The gradient of that piece, where the next step will read it."""
        mapped = twin._hp_mapping
        return None if mapped is None else mapped.get_lp_grad_fragment(twin._index_in_param_group).view(-1)


class _Third:
    """Weights cut too, those that do not learn as well: DeepSpeed puts a module's together when it is called."""

    are_whole = False
    told = (
        "Weights, gradients and moments are cut. Held-out readings, replays and the look before the first step put all "
        "weights together on every rank, the latter two their gradients too: where that does not fit, take "
        "ranks.shard=full. The last layer is computed at all positions, labelled or not."
    )

    def __init__(self, deepspeed: Any) -> None:
        self._deepspeed = deepspeed

    def twins_of(self, model: Any) -> dict[int, Parameter]:
        """A twin of each parameter that DeepSpeed is to know, by the id of the model's own."""
        return {id(p): Parameter(p.detach(), p.requires_grad) for p in model.parameters()}

    def watched(self, model: Any, learning: Sequence[Parameter]) -> nn.Module:
        """What DeepSpeed is given."""
        watched = _Passes((model,))
        watched.model = model
        for rows in head_rows(model):  # the loss reads them without a call of their module
            self._deepspeed.zero.register_external_parameter(watched, rows)
        return watched

    def gathered(self, twins: Sequence[Any], are_changed: bool) -> contextlib.AbstractContextManager[None]:
        """All weights together on every rank; what is changed is rank 0's when it is cut again."""
        return self._deepspeed.zero.GatheredParameters(twins, modifier_rank=0 if are_changed else None)

    def piece(self, twin: Any, num_entries: int, group: Mapping[str, Any], optimizer: Any) -> Piece:
        """This rank's piece of a parameter: equal parts by rank, the last ones shorter, or none."""
        number, offset, length = optimizer.grad_position[optimizer.get_param_id(twin)]
        start = min(dist.get_rank() * length, num_entries)
        flat = optimizer.fp32_partitioned_groups_flat[number]
        return piece_at(flat, offset, start, min(length, num_entries - start))

    def gradient(self, twin: Any, piece: Piece) -> Tensor | None:
        """The gradient of that piece, where the next step will read it."""
        return self._deepspeed.utils.safe_get_local_grad(twin).view(-1)[: piece.weights.numel()]


class _Passes(nn.Module):
    """A pass over a micro-batch as a module, which is what DeepSpeed watches.

    The model lies in a tuple, where torch does not look for parameters: which it has is said beside it.
    """

    def __init__(self, held: tuple[Any]) -> None:
        super().__init__()
        self._held = held

    def train(self, mode: bool = True) -> _Passes:
        """Of the model as well."""
        self._held[0].train(mode)
        return super().train(mode)

    def forward(self, batch: Batch, precision: Precision, factor: float) -> Tensor:
        """The micro-batch's summed loss (nats)."""
        return response_loss_sum(self._held[0], batch, precision, factor)


def _twin_of(model: Any, twins: Mapping[int, Parameter]) -> Any:
    """The same modules with `twins` in the place of the parameters of those ids; all other tensors are the model's."""
    held: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**held, **twins})


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
        """No layer is computed by several."""
        return

    def get_model_parallel_world_size(self) -> int:
        """No layer is computed by several."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """No layer is computed by several."""
        return 0


def _imported(device: torch.device) -> Any:
    """DeepSpeed, which computes on `device` and keeps its own story to itself."""
    os.environ["DS_ACCELERATOR"] = device.type  # it would take a GPU where there is one
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # collectives it calls
    with contextlib.redirect_stdout(sys.stderr):  # where its logger goes from now on
        import deepspeed  # pyright: ignore[reportMissingImports]
    return deepspeed
