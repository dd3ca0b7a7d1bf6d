"""A step taken again, without touching a weight: at its own scale, at scale 1, in fp32, and with roles put back.

Owns the passes of a replay and the way from a tensor's place to row and token. Does not judge (`health/incident.py`)
and does not decide what follows (`recovery.py`). The step was skipped, so weights are as they were; random numbers are
set as the step had them and put back after, so that a replayed run goes on as if nothing had been looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftlm.device import Precision, random_states, restore_random_states
from graftlm.health.incident import HOPELESS, Class, Incident, Replayed, classify
from graftlm.health.probe import BadTensor, NameOf, first_bad_weight, no_name, watching
from graftlm.model.sharded import own_part
from graftlm.training.ablation import roles_put_back
from graftlm.training.batches import Batch, Steps, row_batches
from graftlm.training.loop import response_loss_sum
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.together import bad_weight_of_any

MOST_ROWS_TRIED = 64
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a pass over a step's micro-batches showed, up to the first bad one (its number, or -1)."""

    is_forward_finite: bool = True
    is_finite: bool = True
    first_bad: BadTensor | None = None
    bad_batch: int = -1


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step to replay: its number (from 0), the loss scale it had, and the random states it began with."""

    step: int
    loss_scale: float
    random: Mapping[str, Tensor]


def replay(
    model: Any,
    steps: Steps,
    skipped: SkippedStep,
    precision: Precision,
    last_good: Mapping[str, Tensor] | None,
    first_new_id: int | None,
    name_of: NameOf = no_name,
    ranks: Ranks = ALONE,
) -> Incident:
    """Find out what a skipped step was. `last_good` are trained weights by name to put back, where there are any;
    `name_of` tells an id's text.

    Every rank takes its own rows again. Where weights come from all of them, all take every rank's rows together: what
    is not finite in one's gradients is so in all parts of the sum, and only so is it known whose rows it came from.
    """
    after = random_states()
    is_common = ranks.mesh is not None
    shares = _shares(steps, skipped.step, precision, ranks)
    batches = [batch for _, share in shares for batch in share]
    unscaled = replace(precision, scaler=None)

    # As in the loop, over the whole step's targets, whoever takes its other rows.
    num_targets = steps.num_targets(skipped.step)

    def take(precision: Precision, scale: float, some: Sequence[Batch] = batches, needs_backward: bool = True) -> _Seen:
        restore_random_states(dict(skipped.random))
        own = num_targets if some is batches else sum(len(batch.targets_N) for batch in some)
        taken = drawn_as_then() if is_common and some is batches else some
        is_any = ranks.any if is_common else bool
        return _pass(model, taken, precision, scale / max(own, 1), needs_backward, is_any)

    def drawn_as_then() -> Iterator[Batch]:
        for rank, share in shares:
            ranks.draw_apart(steps.seed, skipped.step, rank)
            yield from share

    at_one = take(unscaled, 1.0)
    as_scaled = at_one if skipped.loss_scale == 1.0 else take(unscaled, skipped.loss_scale)
    in_fp32 = at_one
    if not at_one.is_forward_finite and precision.compute_dtype != torch.float32:
        in_fp32 = take(replace(unscaled, compute_dtype=torch.float32), 1.0, needs_backward=False)
    seen = Replayed(
        num_targets=num_targets,
        bad_weight=bad_weight_of_any(ranks, first_bad_weight(model, first_new_id, name_of)),
        is_forward_finite=at_one.is_forward_finite,
        is_forward_finite_in_fp32=in_fp32.is_forward_finite,
        is_finite=at_one.is_finite,
        is_finite_as_scaled=as_scaled.is_finite,
    )
    cause = classify(seen)
    shown = at_one if at_one.first_bad else as_scaled
    found = _incident(steps, skipped, cause, seen.bad_weight, batches, shown, first_new_id)
    if is_common and shown.bad_batch >= 0:
        owner_of = [rank for rank, share in shares for _ in share]
        found = replace(found, rank=owner_of[shown.bad_batch])
    if cause in HOPELESS and shown.bad_batch >= 0:
        batch = batches[shown.bad_batch]
        tried = batch.row_ids[:MOST_ROWS_TRIED]
        cured = list(_cured(model, last_good, lambda: take(unscaled, 1.0, [batch]).is_finite))
        found = replace(
            found,
            culprits=tuple(role for role, is_learned in cured if is_learned),
            bad_from_start=tuple(role for role, is_learned in cured if not is_learned),
            has_good=last_good is not None,
            bad_rows=tuple(i for i in tried if not take(unscaled, 1.0, _alone(steps, i, precision)).is_finite),
            num_rows=len(tried),
        )
    model.zero_grad(set_to_none=True)
    restore_random_states(after)
    return found


def _shares(steps: Steps, step: int, precision: Precision, ranks: Ranks) -> list[tuple[int, list[Batch]]]:
    """The micro-batches that are taken again, by the rank whose they were."""
    of_ranks = steps.rows_of_ranks(step)
    owners = range(ranks.count) if ranks.mesh is not None else [ranks.rank]
    return [(rank, steps.packed(of_ranks[rank], precision.device)) for rank in owners]


def _cured(
    model: Any, last_good: Mapping[str, Tensor] | None, is_finite: Callable[[], bool]
) -> Iterator[tuple[str, bool]]:
    """Roles that cure the step when put back alone, and whether their last good weights did it."""
    for role, ways in roles_put_back(model, last_good):
        for way in ways:
            with way.held():
                is_cured = is_finite()
            if is_cured:
                yield role, way.is_last_good
                break


def _alone(steps: Steps, row_id: int, precision: Precision) -> list[Batch]:
    return row_batches(
        steps.rows, [row_id], steps.rows.lengths_of([row_id])[0], precision.device, replace(steps.sparing, prefix=False)
    )


def _pass(
    model: Any, batches: Iterable[Batch], precision: Precision, factor: float, needs_backward: bool,
    is_any: Callable[[bool], bool],
) -> _Seen:  # fmt: skip
    """Forward and backward over the micro-batches as the loop does it, stopping at the first that is not finite.

    `is_any` tells whether a thing is so on any rank that takes part.
    """
    for number, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        with watching(model) as probe, torch.set_grad_enabled(needs_backward):
            loss = response_loss_sum(model, batch, precision, factor)
            if is_any(not math.isfinite(loss.item())):
                # The head is no module's call: what is finite until the loss broke there.
                place = int(batch.labelled_N[0]) if len(batch.labelled_N) else 0
                return _Seen(
                    False, False, probe.first_bad or BadTensor("forward", HEAD, place, 1, batch.num_tokens), number
                )
            if needs_backward:
                (loss * factor).backward()
        if needs_backward and is_any(not _gradients_finite(model)):
            return _Seen(True, False, probe.first_bad or BadTensor("backward", HEAD, 0, 1, batch.num_tokens), number)
    return _Seen()


def _gradients_finite(model: Any) -> bool:
    gradients = [own_part(p.grad) for p in model.parameters() if p.grad is not None]
    return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())


def _incident(
    steps: Steps,
    skipped: SkippedStep,
    cause: Class,
    bad_weight: str,
    batches: Sequence[Batch],
    shown: _Seen,
    first_new_id: int | None,
) -> Incident:
    bad = shown.first_bad
    found = Incident(skipped.step + 1, cause, skipped.loss_scale, bad_weight=bad_weight)
    if bad is None:
        return found
    batch = batches[shown.bad_batch]
    flat = _flat_place(batch, bad)
    token_id = int(batch.ids_1T[0, flat])
    row_id, place = _row_at(steps, batch, flat)
    return replace(
        found,
        phase=bad.phase,
        module=bad.module,
        row_id=row_id,
        token_id=token_id,
        is_new_token=first_new_id is not None and token_id >= first_new_id,
        is_answer=bool(steps.rows.row(row_id)[1][place]),
    )


def _flat_place(batch: Batch, bad: BadTensor) -> int:
    """The place in the packed micro-batch: of a tensor the last layer made, whose entries are labelled positions only,
    the position's own."""
    ends_at_N = batch.layout.ends_at_N
    if ends_at_N is None or bad.num_places != len(ends_at_N):
        return bad.place
    return int(ends_at_N[bad.place])


def _row_at(steps: Steps, batch: Batch, place: int) -> tuple[int, int]:
    """The row a place of the packed micro-batch belongs to, and its place there; the shared prefix is the first's.

    What the micro-batch is filled up with repeats its longest row.
    """
    shared = batch.layout.num_shared
    if place < shared:
        return batch.row_ids[0], place
    begins = shared
    for row_id in batch.row_ids:
        own = steps.rows.lengths_of([row_id])[0] - shared
        if place < begins + own:
            return row_id, place - begins + shared
        begins += own
    assert place < begins + batch.num_filled, f"no token {place} in a micro-batch of {batch.num_tokens}"
    longest = max(batch.row_ids, key=lambda row_id: steps.rows.lengths_of([row_id])[0])
    return longest, (place - begins) % (steps.rows.lengths_of([longest])[0] - shared) + shared
