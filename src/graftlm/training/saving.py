"""Saving beside training: a step copies what must be kept, and a thread writes it while the next steps are taken.

Owns the copy, the one write in flight, its error, and what a save took. A checkpoint's files and pruning are
`checkpoint.py`'s; when to save is the stage's; where each of several ranks writes its part, see `saving_parts.py`.
Without a copy the step itself writes: the same bytes, and it waits.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import UserError
from graftlm.run import Metrics, say
from graftlm.training.checkpoint import KEPT, Checkpoint, prune_checkpoints, save_checkpoint
from graftlm.training.parts import Parts
from graftlm.training.zero_parts import ZeroParts

EVENT = "saved"


class Job:
    """Work done beside training, or at once: what it gave, or the error, is kept for whoever waits."""

    def __init__(self, name: str, do: Callable[[], Any]) -> None:
        self._do = do
        self.given: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        # A wish to stop at once, uttered twice, does not wait for it: a checkpoint is whole or absent.
        self.thread = threading.Thread(target=self.work, daemon=True, name=name)

    def work(self) -> None:
        """Do it here and now."""
        began = time.perf_counter()
        try:
            self.given = self._do()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - began


@dataclass(slots=True)
class _Write:
    """One save: what is written where, and how it goes."""

    folder: Path
    checkpoint: Checkpoint
    num_kept: int
    waited_seconds: float = 0.0
    job: Job = field(init=False)

    def __post_init__(self) -> None:
        self.job = Job(f"writing {self.folder.name}", self._write)

    def _write(self) -> None:
        save_checkpoint(self.folder, self.checkpoint)
        prune_checkpoints(self.folder.parent, self.num_kept)

    def line(self) -> dict[str, Any]:
        """What it took, for the metrics."""
        return {
            "step": self.checkpoint.values["step"],
            "what": self.folder.parent.name,
            "num_bytes": self.checkpoint.num_bytes,
            "waited_seconds": self.waited_seconds,
            "written_seconds": self.job.seconds,
        }


class HostMemory:
    """The copy of what is being saved: memory taken once, and used again by the next save."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def copied(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in memory of its own, its values too."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, found in checkpoint.tensors.items():
            held = self._held.setdefault(group, {})
            for name, tensor in found.items():
                if name not in held or held[name].shape != tensor.shape or held[name].dtype != tensor.dtype:
                    held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                held[name].copy_(tensor)
            tensors[group] = {name: held[name] for name in found}
        return Checkpoint(tensors, copy.deepcopy(checkpoint.values))

    def clear(self) -> None:
        """Give it back."""
        self._held.clear()


class Saver:
    """Saves the states of one stage, one after another: `in_background` from a copy, otherwise within the step.

    `copies` is false where what is given is memory of its own, made for the save alone. `is_writer` is false on ranks
    that only help to put together what another saves.
    """

    def __init__(self, metrics: Metrics, in_background: bool, copies: bool = True, is_writer: bool = True) -> None:
        self.metrics, self.in_background, self.copies, self.is_writer = metrics, in_background, copies, is_writer
        self._memory = HostMemory()
        self._in_flight: _Write | None = None

    def taken(self, parts: Parts | ZeroParts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is to be saved of tensors that all ranks hold: whole. All ranks call it together. Raises the error of
        the save before."""
        if not self.copies:
            self.wait()  # its memory comes free before more is made
        return parts.wholes(tensors)

    def save(self, folder: Path, checkpoint: Checkpoint, num_kept: int = KEPT) -> None:
        """Save `checkpoint` as `folder`, and keep `num_kept` like it; the save before it is waited for.

        Training may change its tensors once this returns. Raises DiskError of the save before it, or of this one.
        """
        if not self.is_writer:
            return
        self.wait()
        began = time.perf_counter()
        if self.in_background:
            held = self._memory.copied(checkpoint) if self.copies else checkpoint
            self._in_flight = write = _Write(folder, held, num_kept)
            write.waited_seconds = time.perf_counter() - began
            write.job.thread.start()
            return
        write = _Write(folder, checkpoint, num_kept)
        write.job.work()
        self._told(write, began)

    def look(self) -> None:
        """Note a save that has ended meanwhile. Raises its error."""
        if self._in_flight is not None and not self._in_flight.job.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written: what is on disk is then what was saved. Raises the error of the save."""
        write, self._in_flight = self._in_flight, None
        if write is not None:
            began = time.perf_counter()
            write.job.thread.join()
            self._told(write, began)

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
        if write.job.error is not None:
            raise write.job.error
        self.metrics.append(EVENT, **write.line())


def facts_of_saves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a stage's metrics: how many saves, the largest one's bytes, and seconds over all of them."""
    saves = [line for line in lines if line["event"] == EVENT]
    return {
        "num_saves": len(saves),
        "largest_save_bytes": max((line["num_bytes"] for line in saves), default=0),
        "waited_for_saves_seconds": round(sum(line["waited_seconds"] for line in saves), 3),
        "written_saves_seconds": round(sum(line["written_seconds"] for line in saves), 3),
    }
