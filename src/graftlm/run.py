"""The run folder: names, marks of finished steps, metrics, progress.

Owns how a run is laid out on disk. Does not know what any step computes. Every step of the road writes its
output through here, so that "finished", "unchanged" and "interrupted" mean the same everywhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """Yield `items` while showing a bar with time left on stderr, or a plain line every 10 s without a terminal."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=label, total=total, console=Console(stderr=True))
        return
    started = last_told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last_told >= 10:
            last_told = now
            left = "" if not total else f", {(now - started) / count * (total - count):.0f} s left"
            print(f"{label}: {count}{f'/{total}' if total else ''}{left}", file=sys.stderr, flush=True)
