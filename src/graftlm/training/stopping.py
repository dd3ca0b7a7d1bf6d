"""A wish to stop, heard between steps: SIGINT and SIGTERM while a stage trains, or the end of what started a rank.

Owns the handlers and nothing else: what is saved, and when, is the stage's.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from graftlm.run import say
from graftlm.training.place import is_orphan


class StopAsked:
    """Whether somebody asked to stop. `is_asked` stays true; a second wish interrupts at once."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """While this holds, SIGINT and SIGTERM are wishes; what they did before is put back."""
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def is_heard(self) -> bool:
        """Whether somebody asked, or can no more: the launcher of this rank is gone."""
        if not self.is_asked and is_orphan():
            self.is_asked = True
            say("What started this rank is gone: finishing this step, then saving")
        return self.is_asked

    def _ask(self, number: int, _: Any) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        say(f"{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)")
