"""Saving by all ranks: each writes its own part beside training, and rank 0 makes a checkpoint of the parts.

Owns the order in which that happens: rank 0 makes room, every rank's thread writes, flushes and hashes its files, the
ranks ask one another once a step whether all have done so, and only then rank 0's thread writes the manifest. Until
then there is no checkpoint, whoever fails. Does not know what a rank's part is (`parts.py`) nor its files' form
(`part_files.py`).
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.errors import UserError
from graftlm.run import Metrics, disk_errors, say
from graftlm.training.checkpoint import GROUPS, KEPT, Checkpoint, flushed, place_to_build, prune_checkpoints, publish
from graftlm.training.part_files import write_part
from graftlm.training.parts import Parts
from graftlm.training.ranks import Ranks, error_of, told_of
from graftlm.training.saving import EVENT, HostMemory, Job, Saver
from graftlm.training.zero_parts import ZeroParts


@dataclass(slots=True)
class _PartWrite:
    """One save, as this rank has it: its own files, and on rank 0, once all ranks' files are there, the checkpoint."""

    folder: Path
    checkpoint: Checkpoint
    num_kept: int
    temporary: Path
    num_bytes: int
    writing: Job = field(init=False)
    publishing: Job | None = None
    waited_seconds: float = 0.0
    part_bytes: list[int] = field(default_factory=list)
    slowest_seconds: float = 0.0


class PartSaver:
    """Saves the states of one stage in parts, one after another; all ranks call its methods together and may then go
    on: `in_background` from a copy of their part, otherwise each writes within the step."""

    def __init__(self, metrics: Metrics, in_background: bool, ranks: Ranks, parts: Parts) -> None:
        self.metrics, self.in_background, self.ranks, self.parts = metrics, in_background, ranks, parts
        self._memory = HostMemory()
        self._in_flight: _PartWrite | None = None

    def taken(self, parts: Parts | ZeroParts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank is to save of tensors that all ranks hold."""
        assert parts is self.parts
        return self.parts.to_write(tensors)

    def save(self, folder: Path, checkpoint: Checkpoint, num_kept: int = KEPT) -> None:
        """Save the checkpoint whose part on this rank is `checkpoint` as `folder`, and keep `num_kept` like it.

        The save before it is waited for; training may change the tensors once this returns. Raises DiskError of the
        save before it or of this one, on whichever rank it arose, and RankLost.
        """
        self.wait()
        began = time.perf_counter()
        num_bytes = int(self.ranks.total(checkpoint.num_bytes)[0])
        name = self.ranks.from_first(lambda: place_to_build(folder, num_bytes).name)
        held = self._memory.copied(checkpoint) if self.in_background else checkpoint
        self._in_flight = write = _PartWrite(folder, held, num_kept, folder.with_name(name), num_bytes)
        write.writing = Job(f"writing a part of {folder.name}", lambda: self._write(write))
        if self.in_background:
            write.writing.thread.start()
            write.waited_seconds = time.perf_counter() - began
        else:
            write.writing.work()
            self._agree(write)
            write.waited_seconds = time.perf_counter() - began
            self.wait()

    def look(self) -> None:
        """Once a step: note what has ended meanwhile. Raises the error of any rank's write; RankLost."""
        write = self._in_flight
        if write is None:
            return
        if write.publishing is None:
            began = time.perf_counter()
            if not self.ranks.any(write.writing.thread.is_alive()):
                self._agree(write)
            write.waited_seconds += time.perf_counter() - began
        elif not write.publishing.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written: for rank 0, what is on disk is then what was saved. Raises the error of any
        rank's write; RankLost."""
        write = self._in_flight
        if write is None:
            return
        began = time.perf_counter()
        if write.publishing is None:
            if write.writing.thread.ident is not None:
                write.writing.thread.join()
            self._agree(write)
        self._in_flight = None
        if write.publishing is not None:
            write.publishing.thread.join()
            write.waited_seconds += time.perf_counter() - began
            self._told(write, write.publishing)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """No thread of this rank writes where this ends, whatever ends it, but for a wish to stop at once.

        What ends one rank may be unknown to the others: parts that all have not agreed on are then no checkpoint.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._leave()
            raise
        else:
            self.wait()
        finally:
            self._memory.clear()

    def _write(self, write: _PartWrite) -> dict[str, Any]:
        groups = {
            group: {name: self.parts.laid_out(name, tensor) for name, tensor in named.items()}
            for group, named in write.checkpoint.tensors.items()
        }
        with disk_errors(write.folder.parent):
            return flushed(write_part(write.temporary, self.ranks.rank, groups))

    def _agree(self, write: _PartWrite) -> None:
        """Once every rank's writing has ended: tell one another how, and let rank 0 make a checkpoint of it."""
        job = write.writing
        told = self.ranks.gather(
            {"error": job.error and told_of(job.error), "files": job.given, "seconds": job.seconds}
        )
        self._in_flight = None
        wrong = [rank for rank, its in enumerate(told) if its["error"]]
        if wrong:
            if self.ranks.is_first:
                shutil.rmtree(write.temporary, ignore_errors=True)
            raise job.error or error_of(told[wrong[0]]["error"], f"Rank {wrong[0]}: ")
        if not self.ranks.is_first:
            return
        facts = {name: fact for its in told for name, fact in its["files"].items()}
        write.part_bytes = [sum(fact["bytes"] for fact in its["files"].values()) for its in told]
        write.slowest_seconds = max(its["seconds"] for its in told)
        write.publishing = Job(f"publishing {write.folder.name}", lambda: _publish(write, facts))
        write.publishing.thread.start()
        self._in_flight = write

    def _leave(self) -> None:
        """Wait for this rank's own threads alone."""
        write, self._in_flight = self._in_flight, None
        if write is None:
            return
        for job in (write.writing, write.publishing):
            if job is not None and job.thread.ident is not None:
                job.thread.join()
                if isinstance(job.error, UserError):
                    say(job.error.problem)  # what ended the stage is told after it

    def _told(self, write: _PartWrite, publishing: Job) -> None:
        if publishing.error is not None:
            raise publishing.error
        self.metrics.append(
            EVENT, step=write.checkpoint.values["step"], what=write.folder.parent.name,
            num_bytes=write.num_bytes, part_bytes=write.part_bytes, waited_seconds=write.waited_seconds,
            written_seconds=write.slowest_seconds + publishing.seconds,
        )  # fmt: skip


def _publish(write: _PartWrite, facts: Mapping[str, Any]) -> None:
    values = {**write.checkpoint.values, GROUPS: sorted(write.checkpoint.tensors)}
    publish(write.temporary, write.folder, values, facts)
    prune_checkpoints(write.folder.parent, write.num_kept)


def make_saver(
    metrics: Metrics, parts: Parts | ZeroParts, folder: Path, holds_copy: Callable[[int], bool]
) -> Saver | PartSaver:
    """How a stage in `folder` saves: in parts where its layers are shared out over ranks that all see one disk.

    `holds_copy` says whether this rank's memory holds a copy of what one of so many ranks saves. Raises RankLost.
    """
    ranks = parts.ranks
    if isinstance(parts, ZeroParts) or ranks.mesh is None:
        return Saver(metrics, holds_copy(1), is_writer=ranks.is_first)
    if not share_disk(ranks, folder):
        say(f"{folder} is not one folder for all ranks: rank 0 puts checkpoints together and writes them alone")
        # What is put together to be saved is memory of its own already.
        return Saver(metrics, holds_copy(1), copies=False, is_writer=ranks.is_first)
    return PartSaver(metrics, not ranks.any(not holds_copy(ranks.count)), ranks, parts)


def share_disk(ranks: Ranks, folder: Path) -> bool:
    """Whether a file that rank 0 makes in `folder` is seen by all. Raises DiskError, RankLost."""

    def made() -> str:
        name = f".seen-{uuid.uuid4().hex}"
        with disk_errors(folder):
            (folder / name).touch()
        return name

    seen = folder / ranks.from_first(made)
    is_missing = ranks.any(not seen.exists())
    if ranks.is_first:
        seen.unlink()
    return not is_missing
