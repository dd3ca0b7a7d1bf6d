"""Watching the loss while it is made: damage that does not crash is told as soon as it shows.

Owns one rule, the same by which `curves.py` judges a finished run: the loss, smoothed by a median of ten steps, far
above its best. Pure state, saved with a checkpoint, so that a resumed run judges as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftlm.health.curves import WINDOW, is_far_above


@dataclass(slots=True)
class LossWatch:
    """The last ten losses (nats per target token), and of their medians the first, the best and the last."""

    recent: list[float] = field(default_factory=list)
    first: float = math.nan
    best: float = math.inf
    last: float = math.nan

    def see(self, loss: float) -> bool:
        """Take in a step's loss, if finite; returns whether the smoothed loss now lies far above its best."""
        if not math.isfinite(loss):
            return False
        self.recent = [*self.recent[1 - WINDOW :], loss]
        if len(self.recent) < WINDOW:
            return False
        self.last = statistics.median(self.recent)
        if math.isnan(self.first):
            self.first = self.last
        self.best = min(self.best, self.last)
        return is_far_above(self.last, self.best, self.first)

    @property
    def is_calm(self) -> bool:
        """Whether a state saved now is one to go back to: the loss lies nearer to its best than half an alarm."""
        return len(self.recent) < WINDOW or not is_far_above(self.last, self.best, self.first, share_of_alarm=0.5)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {
            "recent": self.recent,
            "medians": [None if not math.isfinite(x) else x for x in (self.first, self.best, self.last)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.recent = list(state["recent"])
        first, best, last = state["medians"]
        self.first = math.nan if first is None else first
        self.best = math.inf if best is None else best
        self.last = math.nan if last is None else last
