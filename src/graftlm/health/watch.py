"""Watching the loss while it is made: damage that does not crash is told as soon as it shows.

Owns two rules. The training loss far above its best (`rise.py`, by which a finished run's curve is judged too). And
held-out readings worse than before the first step that do not come back, while the training loss has not fallen either.
Pure state, saved with a checkpoint, so that a resumed run judges as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftlm.health.rise import Eye, quick_eye, slow_eye

WORSE_THAN_BEFORE = 0.2  # nats per answer token; a held-out reading has little noise


@dataclass(slots=True)
class LossWatch:
    """Two eyes on the training loss, the held-out loss (nats per answer token) before the first step, and the last
    reading where that was worse."""

    quick: Eye = field(default_factory=quick_eye)
    slow: Eye = field(default_factory=slow_eye)
    heldout_before: float | None = None
    heldout_worse: float | None = None

    def see(self, loss: float) -> Eye | None:
        """Take in a step's loss, if finite; returns the eye that sees it far above its best, if one does."""
        if not math.isfinite(loss):
            return None
        alarmed = [eye for eye in (self.quick, self.slow) if eye.see(loss)]
        return alarmed[0] if alarmed else None

    def see_heldout(self, loss: float) -> bool:
        """Take in a held-out reading; returns whether it is alarming.

        One worse reading is none: at the height of its rate a stage that goes well may lose for a while what it began
        with (measured: docs/log.md, "A rollback for a reading at the height of the rate"). Where the training loss fell
        all the same the stage learns its rows by heart: that is cured by keeping the best weights, not by a lower rate.
        """
        if self.heldout_before is None:
            self.heldout_before = loss
        is_worse = loss > self.heldout_before + WORSE_THAN_BEFORE and not self.quick.last < self.quick.first
        last, self.heldout_worse = self.heldout_worse, loss if is_worse else None
        return is_worse and last is not None and loss >= last

    @property
    def is_calm(self) -> bool:
        """Whether a state saved now is one to go back to: no rise is half an alarm, and enough was seen to say so.

        A rate far too high ruins the first steps' weights before the loss tells; nothing learned yet is good, too.
        """
        if 0 < len(self.quick.recent) < self.quick.window:
            return False
        return all(eye.rise <= 0.5 * eye.limit for eye in (self.quick, self.slow))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {"quick": self.quick.state(), "slow": self.slow.state(), "heldout_before": self.heldout_before,
                "heldout_worse": self.heldout_worse}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.quick.restore(state["quick"])
        self.slow.restore(state["slow"])
        self.heldout_before = state["heldout_before"]
        self.heldout_worse = state.get("heldout_worse")  # earlier versions had none
