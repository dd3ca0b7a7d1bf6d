"""The plan of a stage on a device: does it fit, with which micro-batch, how long, and what to change.

Owns the choice of micro-batch and gradient checkpointing, and the verdict. Sizes come from `memory.py`, times from
`hours.py`; what a device cannot do is told by `hazards.py`. Takes plain values: recipes are read in `cli`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graftlm.device import wants_few_shapes
from graftlm.health.activations import Compute, Learns
from graftlm.health.devices import Device, precision_told
from graftlm.health.hours import Hours, flops_per_token, hours_of
from graftlm.health.memory import GIB, Moment, StageSize
from graftlm.health.row_facts import RowFacts
from graftlm.health.sharding import WHOLE, Share, peak_of
from graftlm.model.shapes import Shape

LOOK_ROWS, LOOK_TOKENS = 8, 2048  # as `training/look.py`
STEP_OF_TOKENS = 256
ENOUGH_TOKENS = {True: 1024, False: 4096}
"""Tokens of a micro-batch from which on a larger one is hardly faster, by whether it is a CPU: assumed."""
PROCESS_BYTES = int(0.6 * GIB)
"""Python, torch and the other libraries on a CPU, resident before a model is there."""
CONTEXT_BYTES = int(0.6 * GIB)
FRAGMENTS = 0.04
"""A GPU's context and the libraries' workspaces, and what the caching allocator cannot use: assumed, not measured."""


@dataclass(frozen=True, slots=True)
class StageWish:
    """What a recipe asks of one stage, and what it trains on; `place` is where the recipe says so."""

    name: str
    place: str
    shape: Shape
    learns: Learns
    num_new_rows: int
    rows: RowFacts
    precision: str
    epochs: float
    batch_rows: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    keeps_best: bool
    split_master: bool = False
    fp8: bool = False

    @property
    def shares_prefix(self) -> bool:
        """Whether what rows begin with alike is computed once: where adapters drop nothing, each row for itself."""
        return self.learns.dropout == 0

    @property
    def whole_step_tokens(self) -> int:
        """Tokens of the largest step, were it one micro-batch."""
        return math.ceil(self.rows.step_tokens(self.batch_rows, self.shares_prefix, self.num_steps))

    @property
    def num_steps(self) -> int:
        """Optimizer's steps of the stage."""
        return self.rows.num_steps(self.batch_rows, self.epochs)


@dataclass(frozen=True, slots=True)
class Sharded:
    """What full sharding over several devices (ranks.shard=full) takes: predicted, beside a plan without it."""

    num_devices: int
    peak_gib: float
    micro_batch_tokens: int | None
    gradient_checkpointing: bool
    holds_step: bool


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage on one device. `fits`: as the recipe has it. `peak`, `items` (bytes) and `moment` are the recipe's own;
    `micro_batch_tokens` is the largest that fits with `gradient_checkpointing`, None where none does. `hours`: were one
    such device to compute it all. Where `share` is not whole, memory is that of one of several devices over which the
    stage is shared out; `sharded`, where it is whole on each of several, tells what sharing it out would take.
    `has_fp8`: whether the device computes FP8; `has_precision`: whether it takes the precision asked for, which a CPU
    always does, be it by emulation."""

    wish: StageWish
    precision: str
    fits: bool
    peak_bytes: int
    moment: str
    items: dict[str, int]
    micro_batch_tokens: int | None
    gradient_checkpointing: bool
    hours: Hours
    size: StageSize
    sharded: Sharded | None
    share: Share = WHOLE
    has_fp8: bool = True
    has_precision: bool = True

    @property
    def runs_as_it_is(self) -> bool:
        """Whether it fits, and the device computes what it asks for."""
        return self.fits and self.has_precision and (self.has_fp8 or not self.wish.fp8)

    @property
    def holds_step(self) -> bool:
        """Whether a whole step fits in one micro-batch."""
        return (self.micro_batch_tokens or 0) >= self.wish.whole_step_tokens

    @property
    def changes(self) -> list[str]:
        """Overrides of the recipe that make it fit, or make better use of the device; empty where nothing is to change
        or nothing helps."""
        wish, at = self.wish, self.wish.place
        if self.micro_batch_tokens is None:
            return []
        is_other_way = self.gradient_checkpointing != wish.gradient_checkpointing
        lines = []
        if wish.precision not in ("auto", self.precision):
            lines.append(f"{at}.precision={self.precision}")
        if wish.fp8 and not self.has_fp8:
            lines.append(f"{at}.fp8=false")
        if not self.fits or (is_other_way and self.micro_batch_tokens < wish.micro_batch_tokens):
            lines.append(f"{at}.micro_batch_tokens={self.micro_batch_tokens}")
        if is_other_way:
            lines.append(f"{at}.gradient_checkpointing={str(self.gradient_checkpointing).lower()}")
        return lines


def size_of(wish: StageWish, precision: str, is_cpu: bool, budget: int, is_checkpointing: bool) -> StageSize:
    """A stage's size with this budget of tokens a micro-batch."""
    spares_last = not wants_few_shapes(is_cpu, precision != "fp32")
    how = wish.shares_prefix, wish.num_steps, spares_last
    batch, is_accumulating = wish.rows.fullest(budget, wish.batch_rows, *how)
    look, _ = wish.rows.fullest(max(LOOK_TOKENS, wish.rows.longest), LOOK_ROWS, wish.shares_prefix, 1, spares_last)
    return StageSize(
        shape=wish.shape,
        learns=wish.learns,
        compute=Compute(4 if precision == "fp32" else 2, is_cpu, wish.split_master and precision == "bf16"),
        num_new_rows=wish.num_new_rows,
        batch=batch,
        look=look,
        is_checkpointing=is_checkpointing,
        is_accumulating=is_accumulating,
        keeps_best=wish.keeps_best,
    )


def plan_stage(wish: StageWish, device: Device, num_devices: int = 1, share: Share = WHOLE) -> StagePlan:
    """The plan of one stage: on one device, rows shared out to `num_devices`, and sharded over them (predicted). Or,
    where it is to be shared out, on each of those devices."""
    precision, _ = precision_told(device, wish.precision)
    own = wish if share.is_whole else _of_each(wish, num_devices)
    size = size_of(own, precision, device.is_cpu, wish.micro_batch_tokens, wish.gradient_checkpointing)
    worst = peak_of(size, share)
    needed = with_overhead(worst, device)
    budget, is_checkpointing = best_setting(own, device, precision, share)
    fits = needed <= device.memory_bytes and wish.micro_batch_tokens >= wish.rows.longest
    hours = _hours(wish, device, precision, budget, is_checkpointing if budget else wish.gradient_checkpointing)
    is_parallel = num_devices > 1 and share.is_whole and not device.is_cpu
    return StagePlan(
        wish=wish,
        precision=precision,
        fits=fits,
        peak_bytes=needed,
        moment=worst.name,
        items={**worst.items, "framework": needed - worst.num_bytes},
        micro_batch_tokens=budget,
        gradient_checkpointing=is_checkpointing,
        hours=hours,
        size=size,
        sharded=_sharded(wish, device, num_devices, precision) if is_parallel else None,
        share=share,
        has_fp8=device.has_fp8,
        has_precision=device.is_cpu or wish.precision in ("auto", precision),
    )


def _of_each(wish: StageWish, num_devices: int) -> StageWish:
    """The stage as each of several devices has it, which takes its part of a step's rows."""
    return replace(wish, batch_rows=-(-wish.batch_rows // num_devices))


def with_overhead(moment: Moment, device: Device) -> int:
    """Bytes of a device that a moment takes, with what no tensor of ours accounts for."""
    own = moment.num_bytes
    if device.is_cpu:
        return own + PROCESS_BYTES
    return int(own * (1 + FRAGMENTS)) + CONTEXT_BYTES


def best_setting(wish: StageWish, device: Device, precision: str, share: Share = WHOLE) -> tuple[int | None, bool]:
    """The largest micro-batch that fits, and whether activations must be computed again for it.

    Without computing again where enough tokens fit so (or the whole step does); None where not even one row does.
    """
    plain = _largest(wish, device, precision, False, share)
    enough = min(ENOUGH_TOKENS[device.is_cpu], wish.whole_step_tokens, wish.micro_batch_tokens)
    if plain is not None and plain >= enough:
        return plain, False
    again = _largest(wish, device, precision, True, share)
    return (again, True) if again is not None else (plain, plain is None)


def _largest(wish: StageWish, device: Device, precision: str, is_checkpointing: bool, share: Share) -> int | None:
    """The most tokens that fit, by halving; a multiple of `STEP_OF_TOKENS`, at least the longest row's."""

    def fits(budget: int) -> bool:
        return fits_with(wish, device, precision, budget, is_checkpointing, share)

    low = -(-wish.rows.longest // STEP_OF_TOKENS)
    whole = -(-wish.whole_step_tokens // STEP_OF_TOKENS)
    high = max(low, whole)
    if not fits(low * STEP_OF_TOKENS):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP_OF_TOKENS) else (low, middle - 1)
    # More than a whole step is never filled: what the recipe has may stay.
    return max(low * STEP_OF_TOKENS, wish.micro_batch_tokens if low >= whole else 0)


def fits_with(
    wish: StageWish, device: Device, precision: str, budget: int, is_checkpointing: bool, share: Share = WHOLE
) -> bool:
    """Whether a device holds the stage with micro-batches of `budget` tokens."""
    size = size_of(wish, precision, device.is_cpu, budget, is_checkpointing)
    return with_overhead(peak_of(size, share), device) <= device.memory_bytes


def fits_at_all(wish: StageWish, device: Device) -> bool:
    """Whether one row of the longest fits a device, activations kept or computed again."""
    precision, _ = precision_told(device, wish.precision)
    return any(fits_with(wish, device, precision, wish.rows.longest, again) for again in (True, False))


def _hours(wish: StageWish, device: Device, precision: str, budget: int | None, is_checkpointing: bool) -> Hours:
    tokens = min(budget or wish.micro_batch_tokens, wish.rows.step_tokens(wish.batch_rows, wish.shares_prefix))
    shared = wish.rows.num_shared if wish.shares_prefix else 0
    rows_per_batch = max(1.0, (tokens - shared) / max(wish.rows.mean_tokens - shared, 1))
    flops = flops_per_token(
        wish.shape, wish.learns, wish.rows, is_checkpointing=is_checkpointing, rows_per_batch=rows_per_batch,
        shares_prefix=wish.shares_prefix, spares_last=not wants_few_shapes(device.is_cpu, precision != "fp32"),
    )  # fmt: skip
    size = size_of(wish, precision, device.is_cpu, wish.rows.longest, is_checkpointing)
    return hours_of(
        device, precision, wish.rows, flops, epochs=wish.epochs, num_steps=wish.num_steps,
        learning_parameters=size.learning_parameters,
    )  # fmt: skip


def _sharded(wish: StageWish, device: Device, num_devices: int, precision: str) -> Sharded:
    """Each device takes its part of a step's rows; memory is that of the recipe's micro-batch, or of what fits."""
    own, share = _of_each(wish, num_devices), Share("layers", num_devices)
    most, is_checkpointing = best_setting(own, device, precision, share)
    budget = min(most or wish.rows.longest, max(wish.micro_batch_tokens, wish.rows.longest))
    size = size_of(own, precision, device.is_cpu, budget, is_checkpointing)
    needed = with_overhead(peak_of(size, share), device)
    return Sharded(num_devices, needed / GIB, most, is_checkpointing, (most or 0) >= own.whole_step_tokens)
