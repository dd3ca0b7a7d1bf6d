"""Training seen by the person waiting for it: steps done, loss, tokens a second, time left.

Owns what is shown while a stage trains: one of the observers of `on_step`. Computes nothing a run depends on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from graftlm.run import ProgressShown
from graftlm.training.loop import StepRecord

SMOOTHING = 0.9


@contextlib.contextmanager
def steps_shown(label: str, num_steps: int, first: int) -> Iterator[Callable[[StepRecord], None]]:
    """Show a bar (or a line every 10 s) over a stage's steps, from `first` on where an earlier process left off.

    Yields the observer. The loss shown is a moving mean, since single ones jump; skipped steps count only as skipped.
    """
    loss: float | None = None
    num_tokens = 0
    began = time.monotonic()
    with ProgressShown(label, num_steps, first) as shown:

        def see(record: StepRecord) -> None:
            nonlocal loss, num_tokens
            if not record.skipped:
                loss = record.loss if loss is None else SMOOTHING * loss + (1 - SMOOTHING) * record.loss
            num_tokens += record.num_tokens
            rate = num_tokens / max(time.monotonic() - began, 1e-9)
            num_skipped = record.step - record.num_updates
            told = ["" if loss is None else f"loss {loss:.3f}", f"{rate:,.0f} tokens/s"]
            told.append(f"{num_skipped} skipped" if num_skipped else "")
            shown.reach(record.step, ", ".join(filter(None, told)))

        yield see
