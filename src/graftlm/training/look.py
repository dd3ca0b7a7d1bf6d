"""The look before the first step: one forward and backward pass in float32 over a stage's first rows.

Owns how the numbers of a pre-flight are taken from a model, its optimizer and its rows. Does not judge them:
`health/preflight.py` does. Leaves model, gradients and random numbers as it found them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.device import Precision, random_states, restore_random_states
from graftlm.health.look import LargestRow, Look, RoleNumbers
from graftlm.health.probe import NameOf, Probe, bits_below, first_bad_weight, no_name, plain_name, watching
from graftlm.model.body import labelled_hidden_states
from graftlm.model.causal import head_weight, is_tied, plain_model, vocabulary_modules
from graftlm.model.loss import linear_cross_entropy_sum, target_losses
from graftlm.model.row_init import row_rms
from graftlm.model.rows import Role, head_rows, parameter_groups_by_role
from graftlm.model.sharded import is_shared_out, own_part
from graftlm.recipe import Full, Lora, LossScale, NewRows, Stage
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Batch, Steps, idle_batch, row_batches
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.together import SeenOfPart, bad_weight_of_any, seen_of_parts

NUM_ROWS = 8
BUDGET_TOKENS = 2048
LOOKED_AT_ONCE = 2**24  # tokens of the rows whose ids are compared with the vocabulary at a time


def take_look(
    model: Any,
    steps: Steps,
    stage: Stage,
    precision: Precision,
    first_new_id: int | None,
    name_of: NameOf = no_name,
    ranks: Ranks = ALONE,
) -> Look:
    """Everything a pre-flight judges, of a model prepared for `stage` and not yet trained; `name_of` tells an id's
    text.

    One rank looks. Where weights come from several, all must call this together, and what rank 0 returns is right:
    the others' passes are idle ones, and they tell of their parts.
    """
    roles = parameter_groups_by_role(model)
    num_vocab_rows = len(head_weight(model))
    bad_row_id = _row_outside(steps.rows, num_vocab_rows)
    bad_weight = bad_weight_of_any(ranks, first_bad_weight(model, first_new_id, name_of))
    probe, first_loss, ids = Probe(), {}, []
    num_targets = num_tokens = 0
    batch = _first_batch(steps, precision.device)
    if bad_row_id < 0:
        ids, num_targets, num_tokens = batch.ids_1T.unique().tolist(), len(batch.targets_N), batch.num_tokens
    if bad_row_id < 0 and not bad_weight:
        states = random_states()
        taken = batch if ranks.is_first else idle_batch(precision.device)
        probe, first_loss = _pass(model, taken, first_new_id, bool(num_targets))
        restore_random_states(states)
    numbers = {
        role: _numbers(named, _unseen(role, ids, model, first_new_id), _rate(stage, role), ranks)
        for role, named in roles.items()
    }
    where, largest = probe.largest(probe.products)
    look = Look(
        precision=precision.name,
        eps=stage.eps,
        peak_lr=_rate(stage, "adapter" if isinstance(stage.trains, Lora) else None),
        lora_factor=_lora_factor(stage.trains),
        is_rank_stabilized=isinstance(stage.trains, Lora) and stage.trains.rslora,
        loss_floor=precision.scaler.floor if precision.scaler else None,
        loss_initial=precision.scaler.scale if precision.scaler else None,
        is_scale_unused=stage.precision in ("fp32", "bf16") and stage.loss_scale != LossScale(),
        num_steps=steps.num_steps,
        norm_eps=float(getattr(plain_model(model).config, "rms_norm_eps", 0.0)),
        are_new_rows_fixed=isinstance(stage.trains, Lora) and stage.trains.rows == "none" and first_new_id is not None,
        num_vocab_rows=num_vocab_rows,
        uniform_loss=math.log(num_vocab_rows),
        roles={role: found for role, found in numbers.items() if found.num_tensors},
        frozen=tuple(_frozen(roles, stage.trains)),
        row_rms=_row_rms(model, first_new_id),
        largest_rows=_largest_rows(model, first_new_id, name_of),
        bad_weight=bad_weight,
        headroom_bits=bits_below(largest),
        headroom_where=where,
        ceiling_bits=_ceilings(numbers, probe),
        first_loss=first_loss,
        first_bad=probe.first_bad,
        num_targets=num_targets,
        num_tokens=num_tokens,
        num_rows=len(batch.row_ids),
        num_without_labels=sum(not steps.rows.row(row_id)[1].any() for row_id in batch.row_ids),
        bad_row_id=bad_row_id,
        is_dialogue=stage.objective == "dialogue",
        ends_right=_ends_right(batch, plain_model(model).config.eos_token_id),
    )
    model.zero_grad(set_to_none=True)
    return look


def _first_batch(steps: Steps, device: torch.device) -> Batch:
    """The first rows of step 0 that fit a small pass, packed as training packs them."""
    row_ids = steps.row_ids(0)[:NUM_ROWS]
    while len(row_ids) > 1 and sum(steps.rows.lengths_of(row_ids)) > BUDGET_TOKENS:
        row_ids = row_ids[:-1]
    budget = max(BUDGET_TOKENS, sum(steps.rows.lengths_of(row_ids)))
    return row_batches(steps.rows, row_ids, budget, device, steps.sparing)[0]


def _pass(model: Any, batch: Batch, first_new_id: int | None, needs_backward: bool) -> tuple[Probe, dict[str, float]]:
    """One pass at scale 1 without 16-bit products; the losses (nats) of old and of new target pieces."""
    was_training = model.training
    model.train()
    with watching(model) as probe:
        hidden_NH = labelled_hidden_states(model, batch.ids_1T, batch.layout, batch.labelled_N)
        head, wide = head_weight(model), torch.promote_types(head_weight(model).dtype, torch.float32)
        losses_N = target_losses(hidden_NH.detach(), head, batch.targets_N, wide)
        loss = linear_cross_entropy_sum(hidden_NH, head_rows(model), batch.targets_N, wide) / max(
            len(batch.targets_N), 1
        )
        if needs_backward:
            loss.backward()
    model.train(was_training)
    is_new_N = batch.targets_N >= (math.inf if first_new_id is None else first_new_id)
    parts = {"old": losses_N[~is_new_N], "new": losses_N[is_new_N]}
    return probe, {kind: part.double().mean().item() for kind, part in parts.items() if len(part)}


def _numbers(named: Sequence[tuple[str, Parameter]], is_unseen: set[int], peak_lr: float, ranks: Ranks) -> RoleNumbers:
    learning = [(plain_name(name), p) for name, p in named if p.requires_grad]
    first_at: dict[int, str] = {}
    shared = []
    for name, p in learning:
        own = own_part(p)
        if own.numel() and first_at.setdefault(own.data_ptr(), name) != name:
            shared.append(name)
    seen = seen_of_parts(
        ranks, {name: _seen_of(p) for name, p in learning}, {n for n, p in learning if is_shared_out(p)}
    )
    has_any = any(one.has_gradient for one in seen.values())
    return RoleNumbers(
        num_tensors=len(learning),
        # Of a weight held in halves the gradient tells, not the half that is its parameter.
        dtypes=tuple(sorted({str(p.grad_dtype).removeprefix("torch.") for _, p in learning})),
        peak_lr=peak_lr,
        weight_rms=math.sqrt(sum(one.squares for one in seen.values()) / max(sum(p.numel() for _, p in learning), 1)),
        largest_gradient=max((one.largest for one in seen.values() if one.has_gradient), default=0.0),
        silent=tuple(name for name, p in learning if id(p) not in is_unseen and seen[name].is_silent)
        if has_any
        else (),
        shared=tuple(shared),
    )


def _seen_of(parameter: Parameter) -> SeenOfPart:
    gradient = None if parameter.grad is None else own_part(parameter.grad)
    return SeenOfPart(
        squares=own_part(parameter).double().square().sum().item(),
        largest=gradient.abs().amax().item() if gradient is not None and gradient.numel() else 0.0,
        has_gradient=gradient is not None,
        is_silent=gradient is None or not bool(gradient.any()),
    )


def _unseen(role: Role, ids: Sequence[int], model: Any, first_new_id: int | None) -> set[int]:
    """Rows of the embedding that no token of the pass names: they rightly get no gradient."""
    if role not in ("old_rows", "new_rows"):
        return set()
    is_named = any((i >= (math.inf if first_new_id is None else first_new_id)) == (role == "new_rows") for i in ids)
    return set() if is_named else {id(p) for p in vocabulary_modules(model)[0].parameters()}


def _expected_roles(trains: Full | Lora | NewRows) -> set[Role]:
    if isinstance(trains, Full):
        return {"body", "old_rows", "new_rows"}
    if isinstance(trains, NewRows):
        return {"new_rows"}
    rows: dict[str, set[Role]] = {"all": {"old_rows", "new_rows"}, "new": {"new_rows"}, "none": set()}
    return {"adapter", *rows[trains.rows]}


def _frozen(roles: Mapping[Role, Sequence[tuple[str, Parameter]]], trains: Full | Lora | NewRows) -> Iterator[str]:
    for role in sorted(_expected_roles(trains)):
        yield from (plain_name(name) for name, p in roles[role] if not p.requires_grad)


def _row_rms(model: Any, first_new_id: int | None) -> dict[str, tuple[float, float]]:
    if first_new_id is None:
        return {}

    def rms(rows: Tensor) -> float:
        return row_rms(rows.detach()).median().item()  # of a mean, one row far too large would say that all are

    matrices = zip(("embedding", "head"), vocabulary_modules(model), strict=True)
    return {name: (rms(m.weight[:first_new_id]), rms(m.weight[first_new_id:])) for name, m in matrices}


def _largest_rows(model: Any, first_new_id: int | None, name_of: NameOf) -> dict[str, LargestRow]:
    found = {}
    for name, module in zip(("embedding", "head"), vocabulary_modules(model), strict=True):
        if name == "head" and is_tied(model):
            break
        rms = row_rms(module.weight.detach())
        row_id = int(rms.argmax())
        is_new = first_new_id is not None and row_id >= first_new_id
        found[name] = LargestRow(row_id, name_of(row_id), is_new, rms[row_id].item(), rms.median().item())
    return found


def _row_outside(rows: TokenRows, num_vocab_rows: int) -> int:
    """The first row with an id the vocabulary does not reach; -1 for none."""
    for begin in range(0, len(rows.ids), LOOKED_AT_ONCE):
        outside = np.flatnonzero(rows.ids[begin : begin + LOOKED_AT_ONCE] >= num_vocab_rows)
        if len(outside):
            return int(np.searchsorted(rows.offsets, begin + outside[0], side="right") - 1)
    return -1


def _ceilings(numbers: Mapping[str, RoleNumbers], probe: Probe) -> dict[str, float]:
    """The largest loss scale, as a power of two, at which no gradient passes fp16's range: by role, and inside."""
    found: dict[str, float] = {role: bits_below(n.largest_gradient) for role, n in numbers.items() if n.num_tensors}
    if probe.gradients:
        found["activations"] = bits_below(probe.largest(probe.gradients)[1])
    return {name: bits for name, bits in found.items() if math.isfinite(bits)}


def _ends_right(batch: Batch, eos: int | Sequence[int] | None) -> bool:
    """Whether any row's last target is an end token (true where the model names none: nothing can be said)."""
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    last = [batch.targets_N[batch.row_N == row][-1:].tolist() for row in range(len(batch.row_ids))]
    return not ends or not any(last) or any(target[0] in ends for target in last if target)


def _rate(stage: Stage, role: Role | None) -> float:
    own = getattr(stage.groups, role).peak_lr if role else None
    return stage.peak_lr if own is None else own


def _lora_factor(trains: Full | Lora | NewRows) -> float | None:
    if not isinstance(trains, Lora):
        return None
    return trains.alpha / (math.sqrt(trains.rank) if trains.rslora else trains.rank)
