"""Watching the loss while it is made: damage that does not crash is told as soon as it shows.

Owns two rules. The loss, smoothed by a median of ten steps, far above its best: the rule by which `curves.py` judges a
finished run. And a held-out reading worse than before the first step, while the training loss has not fallen either.
Pure state, saved with a checkpoint, so that a resumed run judges as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftlm.health.curves import WINDOW, is_far_above

# The watch's numbers, and what stands for one that is not known yet (JSON has neither nan nor inf).
_NUMBERS = {
    "first": math.nan, "best": math.inf, "last": math.nan, "heldout_first": math.nan, "heldout_best": math.inf,
}  # fmt: skip
WORSE_THAN_BEFORE = 0.2  # nats per answer token; a held-out reading has little noise


@dataclass(slots=True)
class LossWatch:
    """The last ten losses (nats per target token), and of their medians the first, the best and the last; of the
    held-out readings the one before the first step and the best."""

    recent: list[float] = field(default_factory=list)
    first: float = math.nan
    best: float = math.inf
    last: float = math.nan
    heldout_first: float = math.nan
    heldout_best: float = math.inf

    def see(self, loss: float) -> bool:
        """Take in a step's loss, if finite; returns whether the smoothed loss now lies far above its best."""
        if not math.isfinite(loss):
            return False
        self.recent = [*self.recent[1 - WINDOW :], loss]
        self.last = statistics.median(self.recent)
        if math.isnan(self.first):
            self.first = self.last
        self.best = min(self.best, self.last)
        return len(self.recent) == WINDOW and is_far_above(self.last, self.best, self.first)

    def see_heldout(self, loss: float) -> bool:
        """Take in a held-out reading (nats per answer token); returns whether it is alarming.

        Where the training loss fell all the same the stage learns its rows by heart: that is cured by keeping the best
        weights, not by a lower rate.
        """
        if math.isnan(self.heldout_first):
            self.heldout_first = loss
        self.heldout_best = min(self.heldout_best, loss)
        if self.last < self.first:
            return False
        is_worse_than_before = loss > self.heldout_first + WORSE_THAN_BEFORE
        return is_worse_than_before or is_far_above(loss, self.heldout_best, self.heldout_first)

    @property
    def is_calm(self) -> bool:
        """Whether a state saved now is one to go back to: the loss lies nearer to its best than half an alarm."""
        return not self.recent or not is_far_above(self.last, self.best, self.first, share_of_alarm=0.5)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {"recent": self.recent, **{name: x if math.isfinite(x) else None for name, x in numbers.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.recent = list(state["recent"])
        for name, unknown in _NUMBERS.items():
            setattr(self, name, unknown if state[name] is None else state[name])
