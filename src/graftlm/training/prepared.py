"""A stage's model made ready to learn, and made plain again afterwards.

Owns the order of that: what learns, how the rest is held, where it lies, how it attends, over whom its layers are
shared out, what work its passes may leave out. Where layers are shared out, rank 0 makes the plain model anew at the
end, of modules kept without numbers. Does not know steps or files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.device import Precision
from graftlm.model.causal import body_of, plain_model, recompute_activations
from graftlm.model.fp8 import hold_in_fp8
from graftlm.model.frozen import HeldLayers, hold_frozen_as
from graftlm.model.halves import Halves
from graftlm.model.lean import LeanModules, make_lean
from graftlm.model.packed import attend_packed, attend_plain
from graftlm.model.pointwise import AS_WRITTEN, compiled
from graftlm.model.rows import lay_rows_together, touch_only_rows_read
from graftlm.model.sharded import shard_layers
from graftlm.recipe import Stage
from graftlm.run import say
from graftlm.training.batches import Sparing, all_sparing
from graftlm.training.ranks import Ranks
from graftlm.training.trainable import copy_weights, prepare_model, restore_model, trainable_parameters


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A model that learns as it was before its layers were shared out: its modules without numbers, and the weights
    that do not learn."""

    modules: Any
    frozen: dict[str, Tensor]

    def with_weights(self, learned: Mapping[str, Tensor]) -> Any:
        """The model again, holding these weights; no tensor is copied. May be called once."""
        tensors = {**self.frozen, **learned}
        made = {id(p): Parameter(tensors[name], p.requires_grad) for name, p in self.modules.named_parameters()}
        named = self.modules.named_parameters(remove_duplicate=False)
        # A tied matrix has two names, and both are given one parameter.
        state = self.modules.state_dict() | {name: made[id(p)] for name, p in named}
        self.modules.load_state_dict(state, assign=True)
        return self.modules


def whole_model(model: Any) -> WholeModel:
    """What is kept of a model before its layers are shared out; its frozen tensors are not copied."""
    # The memo of the copy: where one of these parameters stood, its twin without numbers does.
    hollow: dict[int, Any] = {
        id(p): Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return WholeModel(copy.deepcopy(model, hollow), frozen)


@dataclass(slots=True)
class Prepared:
    """A model ready to learn.

    Others stand for `lean`, its norms, attention and MLPs, and for `held`, its frozen layers, and those in FP8, in
    products of `held_for`. `halves` are its learning weights held in two. `whole` is what rank 0 makes the finished
    model of where layers are shared out.
    """

    model: Any
    stage: Stage
    first_new_id: int | None
    lean: LeanModules
    held: HeldLayers
    halves: Halves
    held_for: torch.dtype
    whole: WholeModel | None
    is_shared_out: bool

    def hold_for(self, dtype: torch.dtype, device: torch.device) -> None:
        """Hold what does not learn as products in `dtype` want it. Of what learns in common it is held so already."""
        if dtype != self.held_for:
            self.halves.restore()
            self.held.restore()
            self.held = _hold(self.model, self.stage, dtype, device)
            self.held_for = dtype
            self.model.to(device)
            _split(self.halves, self.model, self.stage, dtype)

    def in_words(self) -> str:
        """How it computes, where that is not as it comes: to follow what is said of a stage."""
        compiled = ", norms, gates and rotations compiled" if self.stage.compile else ""
        halves = ", learning weights in halves" if self.halves.low_of else ""
        if self.stage.split_master and not halves:
            halves = ", learning weights whole: only those of products in bf16 are split"
        return compiled + halves + (", linear layers in FP8, lossy" if self.stage.fp8 else "")

    def finished(self, learned: Mapping[str, Tensor]) -> Any:
        """The plain model with these weights, in float32 on the CPU; where layers are shared out, rank 0's to ask for.

        Raises UserError where `learned` is not what this stage trains.
        """
        if self.is_shared_out:
            assert self.whole is not None, "the finished model is rank 0's"
            return self._plain(self.whole.with_weights(learned))
        self.halves.restore()
        self.held.restore()
        model = self.model.cpu()
        copy_weights(trainable_parameters(model), learned)
        recompute_activations(model, False)
        self.lean.restore()
        return self._plain(model)

    def untrained(self) -> Any:
        """The plain model as it was found, of one that was only looked at."""
        self.halves.restore()
        self.held.restore()
        self.lean.restore()
        return self._plain(self.model)

    def _plain(self, model: Any) -> Any:
        touch_only_rows_read(model, False)
        model = restore_model(model, self.stage.trains, self.first_new_id)
        attend_plain(model)
        return model


def prepared(
    model: Any, stage: Stage, dtype: torch.dtype, device: torch.device, first_new_id: int | None, ranks: Ranks
) -> Prepared:
    """Make a float32 model ready for a stage whose products are of `dtype`. Raises UserError, RankLost."""
    model = prepare_model(model, stage.trains, first_new_id, stage.seed)
    is_shared_out = not ranks.hold_all
    whole = whole_model(model) if is_shared_out and ranks.is_first else None
    lean = make_lean(body_of(model), compiled(device.type) if stage.compile else AS_WRITTEN)
    # DeepSpeed cuts weights of one dtype only.
    held = HeldLayers(()) if ranks.zero_stage == 3 else _hold(model, stage, dtype, device)
    model.to(device)
    halves = Halves()
    _split(halves, model, stage, dtype)
    touch_only_rows_read(model, device.type == "cpu" and not ranks.pass_together)
    attend_packed(body_of(model))
    if stage.gradient_checkpointing:
        recompute_activations(model, True)
    if ranks.mesh is not None:
        with ranks.passes_answered():
            shard_layers(model, ranks.mesh)
        held = HeldLayers(())  # what they stood for is kept whole by rank 0, or not needed
    return Prepared(model, stage, first_new_id, lean, held, halves, dtype, whole, is_shared_out)


def _split(halves: Halves, model: Any, stage: Stage, dtype: torch.dtype) -> None:
    """Hold learning weights in halves where the stage says so and products are of the upper half's dtype."""
    if stage.split_master and dtype == torch.bfloat16:
        halves.split(model)
    lay_rows_together(model)


def _hold(model: Any, stage: Stage, dtype: torch.dtype, device: torch.device) -> HeldLayers:
    """Frozen layers held as products in `dtype` want them, and over them, where the stage says so, products in FP8.

    A CPU emulates those: the road refuses that, but a test of the numbers wants no more.
    """
    held = hold_frozen_as(model, dtype, stage.frozen_base)
    in_fp8 = hold_in_fp8(model, emulate=device.type == "cpu") if stage.fp8 else HeldLayers(())
    return HeldLayers(in_fp8.replaced + held.replaced)


def sparing_of(stage: Stage, model: Any, precision: Precision, ranks: Ranks) -> Sparing:
    """Work left out where that is exact. What adapters drop differs from row to row, in a common beginning too; in the
    last layer no one reads what they would give elsewhere. Dropout of attention allows neither.

    In ZeRO-3 not the last layer's: DeepSpeed fetches weights ahead in the order modules were called in, and a rank on
    the short cut beside one that is not (an idle one, or one with nearly all positions labelled) would never meet it.
    """
    every = all_sparing(precision)
    of_attention = getattr(plain_model(model).config, "attention_dropout", 0.0)
    if of_attention:
        say(f"{stage.name}: with dropout {of_attention:g} common beginnings and the last layer are computed in full")
        return replace(every, prefix=False, last_layer=False)
    dropout = getattr(stage.trains, "dropout", 0.0)
    if dropout:
        say(f"{stage.name}: with dropout {dropout:g} each row computes the common beginning for itself")
    return replace(every, prefix=not dropout, last_layer=every.last_layer and ranks.zero_stage != 3)
