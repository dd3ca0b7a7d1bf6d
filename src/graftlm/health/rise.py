"""When a loss that rises is an alarm: seen step by step, the same in a live run and in a finished one's log.

Owns the smoothing and the limits. A quick eye takes the median of ten steps and wants a great rise; a slow one takes
thirty and is content with half of it.

The limits are measured: in five healthy runs on real rows (batches of 16 to 128 short rows, where single steps differ
most) the median of ten rose by up to 1.18 nats above its best and came back, that of thirty by up to 0.56; in the four
published runs neither by more than 0.41. Rates that ruin a model raise the loss by several nats, and it stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Eye:
    """Medians of the last `window` losses (nats per target token): the first, the best, the last.

    The limit of a rise above the best is `nats`, or `share` of all that had been learned, whichever is more. The best
    may be the very first loss: a rate far too high does its damage in the first steps.
    """

    window: int
    nats: float
    share: float
    recent: list[float] = field(default_factory=list)
    first: float = math.nan
    best: float = math.inf
    last: float = math.nan

    @property
    def rise(self) -> float:
        """How far the last median lies above the best (nats); 0 before there is one."""
        return self.last - self.best if self.recent else 0.0

    @property
    def limit(self) -> float:
        """The rise that is an alarm (nats)."""
        return max(self.nats, self.share * max(self.first - self.best, 0.0)) if self.recent else self.nats

    def see(self, loss: float) -> bool:
        """Take in a finite loss; returns whether the rise is an alarm now."""
        self.recent = [*self.recent[1 - self.window :], loss]
        self.last = statistics.median(self.recent)
        if math.isnan(self.first):
            self.first = self.last
        self.best = min(self.best, self.last)
        return len(self.recent) == self.window and self.rise > self.limit

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {"recent": self.recent, "medians": [self.first, self.best, self.last] if self.recent else []}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.recent = list(state["recent"])
        self.first, self.best, self.last = state["medians"] or (math.nan, math.inf, math.nan)


def quick_eye() -> Eye:
    """Sees a great rise within ten steps."""
    return Eye(10, 2.0, 0.3)


def slow_eye() -> Eye:
    """Sees half of it within thirty."""
    return Eye(30, 1.0, 0.2)
