"""What a training log tells, whoever wrote it: one record a step, and a run's curves and events.

Owns the common form and what HF Trainer's fields mean in it. Reads no files (`logs.py`, `console.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_FALLS_TO_ZERO = 0.1  # nats; rows learned by heart may end at 0.0000, but from below this


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One step (from 1) as far as it was logged: nats per target token, norm before clipping, scale before the step.

    `by_role` holds grad_norms, update_rms, weight_rms and zero_gradient_share, each by role (adapter, new_rows, …).
    `is_filtered`: not finite, and printed as 0.0 (HF Trainer's `logging_nan_inf_filter`).
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    is_filtered: bool = False
    by_role: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def is_bad(self) -> bool:
        """Whether the loss was not finite."""
        return self.loss is not None and not math.isfinite(self.loss)


@dataclass(slots=True)
class RunLog:
    """A run's curves. `heldout` holds (step, loss) of the language judged by, `readings` the same of each language;
    `scales` (step, scale after) at each overflow; `ending` what was said last when the run stopped by itself: an
    error's text. `records` are the run's own course; attempts it rolled back from lie in `abandoned`, in order.
    `events` are what else happened, on those attempts too, as it was written: incidents, interventions, notes."""

    name: str
    records: list[LogRecord] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    readings: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    scales: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    abandoned: list[list[LogRecord]] = field(default_factory=list)
    ending: str = ""

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The steps that were replayed, as written."""
        return [line for line in self.events if line["event"] == "incident"]

    @property
    def interventions(self) -> list[dict[str, Any]]:
        """The times it was rolled back, as written."""
        return [line for line in self.events if line["event"] == "intervention"]

    @property
    def last_step(self) -> int:
        """The last step anything was logged of."""
        return max((*(r.step for r in self.records), *(step for step, _ in self.scales)), default=0)


def add_hf_line(log: RunLog, line: Mapping[str, Any], step: int) -> None:
    """Add what a dict of HF Trainer's log says of `step`. Raises ValueError or TypeError where a number is none."""
    if "eval_loss" in line:
        log.heldout.append((step, float(line["eval_loss"])))
    elif "loss" in line:
        loss, norm = float(line["loss"]), line.get("grad_norm")
        norm = None if norm is None else float(norm)
        is_filtered = loss == 0.0 and _hides_a_loss(log, norm)
        loss = math.nan if is_filtered else loss
        log.records.append(LogRecord(step, loss, line.get("learning_rate"), norm, is_filtered=is_filtered))


def _hides_a_loss(log: RunLog, norm: float | None) -> bool:
    """Whether a loss of 0.0 stands for one that was not finite: its norm says so, or none fell so far in one step."""
    if norm is not None:
        return not math.isfinite(norm)
    before = next((record for record in reversed(log.records) if record.loss is not None), None)
    # No model begins at a loss of nothing, and what is not a number is no small loss either.
    return before is None or before.is_filtered or not (before.loss or 0.0) <= _FALLS_TO_ZERO


def finite_losses(records: Iterable[LogRecord]) -> Iterator[tuple[int, float]]:
    """(step, loss) of every record that has a finite loss."""
    return ((r.step, r.loss) for r in records if r.loss is not None and not r.is_bad)
