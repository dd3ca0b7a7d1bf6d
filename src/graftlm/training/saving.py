"""Saving beside training: a step copies what must be kept, and a thread writes it while the next steps are taken.

Owns the copy, the one write in flight, its error, and what a save took. A checkpoint's files and pruning are
`checkpoint.py`'s; when to save is the stage's. Without a copy the step itself writes: the same bytes, and it waits.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import UserError
from graftlm.run import Metrics, say
from graftlm.training.checkpoint import KEPT, Checkpoint, prune_checkpoints, save_checkpoint

EVENT = "saved"


@dataclass(slots=True)
class _Write:
    """One save: what is written where, and how it went."""

    folder: Path
    checkpoint: Checkpoint
    num_kept: int
    waited_seconds: float = 0.0
    written_seconds: float = 0.0
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # A wish to stop at once, uttered twice, does not wait for it: a checkpoint is whole or absent.
        self.thread = threading.Thread(target=self.work, daemon=True, name=f"writing {self.folder.name}")

    def work(self) -> None:
        """Write, then remove what is old; an error is kept for whoever waits."""
        began = time.perf_counter()
        try:
            save_checkpoint(self.folder, self.checkpoint)
            prune_checkpoints(self.folder.parent, self.num_kept)
        except BaseException as error:
            self.error = error
        self.written_seconds = time.perf_counter() - began

    def line(self) -> dict[str, Any]:
        """What it took, for the metrics."""
        return {
            "step": self.checkpoint.values["step"],
            "what": self.folder.parent.name,
            "num_bytes": self.checkpoint.num_bytes,
            "waited_seconds": self.waited_seconds,
            "written_seconds": self.written_seconds,
        }


class Saver:
    """Saves the states of one stage, one after another: `in_background` from a copy, otherwise within the step.

    `copies` is false where what is given is memory of its own, made for the save alone.
    """

    def __init__(self, metrics: Metrics, in_background: bool, copies: bool = True) -> None:
        self.metrics, self.in_background, self.copies = metrics, in_background, copies
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._in_flight: _Write | None = None

    def save(self, folder: Path, checkpoint: Checkpoint, num_kept: int = KEPT) -> None:
        """Save `checkpoint` as `folder`, and keep `num_kept` like it; the save before it is waited for.

        Training may change its tensors once this returns. Raises DiskError of the save before it, or of this one.
        """
        self.wait()
        began = time.perf_counter()
        if self.in_background:
            held = self._copied(checkpoint) if self.copies else checkpoint
            self._in_flight = write = _Write(folder, held, num_kept)
            write.waited_seconds = time.perf_counter() - began
            write.thread.start()
            return
        write = _Write(folder, checkpoint, num_kept)
        write.work()
        self._told(write, began)

    def look(self) -> None:
        """Note a save that has ended meanwhile. Raises its error."""
        if self._in_flight is not None and not self._in_flight.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written: what is on disk is then what was saved. Raises the error of the save."""
        write, self._in_flight = self._in_flight, None
        if write is not None:
            began = time.perf_counter()
            write.thread.join()
            self._told(write, began)

    def wait_for_room(self) -> None:
        """Before memory is made for a save: until that of the one before it is free. Raises its error."""
        if not self.copies:
            self.wait()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Nothing is being written where this ends, whatever ends it, but for a wish to stop at once."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            try:
                self.wait()
            except UserError as error:
                say(error.problem)  # what ended the stage is told after it
            raise
        else:
            self.wait()
        finally:
            self._memory.clear()

    def _told(self, write: _Write, began: float) -> None:
        write.waited_seconds += time.perf_counter() - began
        if write.error is not None:
            raise write.error
        self.metrics.append(EVENT, **write.line())

    @torch.no_grad()
    def _copied(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in memory of its own, which is taken once and used again by the next."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, found in checkpoint.tensors.items():
            held = self._memory.setdefault(group, {})
            for name, tensor in found.items():
                if name not in held or held[name].shape != tensor.shape or held[name].dtype != tensor.dtype:
                    held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                held[name].copy_(tensor)
            tensors[group] = {name: held[name] for name in found}
        return Checkpoint(tensors, copy.deepcopy(checkpoint.values))


def facts_of_saves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a stage's metrics: how many saves, the largest one's bytes, and seconds over all of them."""
    saves = [line for line in lines if line["event"] == EVENT]
    return {
        "num_saves": len(saves),
        "largest_save_bytes": max((line["num_bytes"] for line in saves), default=0),
        "waited_for_saves_seconds": round(sum(line["waited_seconds"] for line in saves), 3),
        "written_saves_seconds": round(sum(line["written_seconds"] for line in saves), 3),
    }
