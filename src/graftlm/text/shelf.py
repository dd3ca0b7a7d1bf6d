"""Dialogues on disk while the data step works on them, and what becomes of each.

Owns the file and its index: memory holds one byte a dialogue, whatever their number. Does not know why a dialogue is
dropped. Between reading (`readers.py`) and rendering (`fit.py`) on the road.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graftlm.run import disk_errors, read_json, write_json
from graftlm.text.dialogue import Conversation, Message
from graftlm.text.tally import NUM_EXAMPLES, Tally

CHUNK = 8192
"""Dialogues whose places in the file are read at a time."""


FATES, KEPT = "fates.npy", "kept.json"


class Fate(IntEnum):
    """What a dialogue is for, or why it is dropped."""

    LEARN = 0
    HELD_OUT = 1
    NOT_DRAWN = 2
    DUPLICATE = 3
    NEAR = 4
    LEAK = 5


STILL_THERE = (Fate.LEARN, Fate.HELD_OUT)
REASONS = {
    Fate.NOT_DRAWN: "not drawn into the sample",
    Fate.DUPLICATE: "exact duplicate",
    Fate.NEAR: "near duplicate",
    Fate.LEAK: "also held out",
}


class Shelf:
    """N dialogues in the order they were put there; `fates` (N,) is what becomes of each, once all are there."""

    def __init__(self, folder: Path, fates: np.ndarray | None = None) -> None:
        self.folder = folder
        self.fates = np.zeros(0, np.uint8) if fates is None else fates
        self._num, self._size = len(self.fates), 0
        self._recent = array("q", [0])
        mode = "wb" if fates is None else "rb"  # one that was kept is only read
        self._dialogues = (folder / "dialogues.jsonl").open(mode)
        self._offsets = (folder / "offsets").open(mode)

    def __len__(self) -> int:
        return self._num

    def put(self, conversation: Conversation) -> None:
        """Add one at the end."""
        said = [(m.role, m.content, m.input) for m in conversation.messages]
        line = json.dumps((conversation.source, conversation.language, said), ensure_ascii=False)
        raw = line.encode("utf-8", "surrogatepass") + b"\n"  # a path may hold surrogates
        self._dialogues.write(raw)
        self._num += 1
        self._size += len(raw)
        self._recent.append(self._size)
        if len(self._recent) >= CHUNK:
            self._write_offsets()

    def _write_offsets(self) -> None:
        self._offsets.write(self._recent.tobytes())
        self._recent = array("q")

    def finish(self) -> None:
        """No more are added: from here on they can be read, and have fates."""
        self._write_offsets()
        self.close()
        self.fates = np.concatenate([self.fates, np.zeros(self._num - len(self.fates), np.uint8)])

    def keep(self, account: dict[str, Any]) -> None:
        """Make it last beyond this process, fates and `account` with it: `kept_shelf` finds it. Raises OSError."""
        np.save(self.folder / FATES, self.fates)
        for name in ("dialogues.jsonl", "offsets", FATES):
            with (self.folder / name).open("rb") as stream:
                os.fsync(stream.fileno())
        write_json(self.folder / KEPT, account)  # last of all: where it lies, all else is whole

    def forget(self) -> None:
        """Delete it: first that it was kept, so that a kill leaves none that seems whole."""
        (self.folder / KEPT).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files."""
        self._dialogues.close()
        self._offsets.close()

    def count(self, *fates: Fate) -> int:
        """How many dialogues have one of these fates."""
        return sum(int(np.count_nonzero(self.fates == fate)) for fate in fates)  # np.isin would take 8 bytes a row

    def read(self, *fates: Fate) -> Iterator[tuple[int, Conversation]]:
        """Dialogues with one of these fates, in order, each with its place. Fates may be changed meanwhile."""
        with self._open() as stream:
            for begin in range(0, self._num, CHUNK):
                places = begin + np.flatnonzero(np.isin(self.fates[begin : begin + CHUNK], fates))
                if len(places):
                    offsets = self._bounds(begin, CHUNK)
                    for place in places.tolist():
                        start, end = offsets[place - begin], offsets[place - begin + 1]
                        stream.seek(start)  # within what is buffered it costs nothing
                        yield place, _conversation(stream.read(end - start))

    def at(self, place: int) -> Conversation:
        """The dialogue at `place`."""
        start, end = self._bounds(place, 1)
        with self._open() as stream:
            stream.seek(start)
            return _conversation(stream.read(end - start))

    def tell_dropped(self, dropped: Tally) -> None:
        """Count all that are dropped by now under their reasons."""
        for fate, reason in REASONS.items():
            if number := self.count(fate):
                first = [found.source for _, found in islice(self.read(fate), NUM_EXAMPLES)]
                dropped.merge(Tally({reason: number}, {reason: first}))

    def _open(self) -> BinaryIO:
        return (self.folder / "dialogues.jsonl").open("rb")

    def _bounds(self, begin: int, number: int) -> list[int]:
        """Where dialogues from `begin` on start, and where the last ends."""
        return np.fromfile(self.folder / "offsets", np.int64, number + 1, offset=8 * begin).tolist()


def _conversation(raw: bytes) -> Conversation:
    source, language, said = json.loads(raw.decode("utf-8", "surrogatepass"))
    return Conversation(tuple(Message(*message) for message in said), source, language)


def kept_shelf(folder: Path) -> tuple[Shelf, dict[str, Any]] | None:
    """The shelf that was kept in `folder`, as it was then, and its account; None where none was. Raises UserError."""
    if not (folder / KEPT).exists():
        return None
    return Shelf(folder, np.load(folder / FATES)), read_json(folder / KEPT)


@contextlib.contextmanager
def shelf_in(folder: Path) -> Iterator[Shelf]:
    """An empty shelf in a folder of its own below `folder`, gone afterwards whatever happens. Raises DiskError."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".shelf-", dir=folder))
        shelf = Shelf(place)
        try:
            yield shelf
        finally:
            with contextlib.suppress(OSError):  # of a full disk: what stopped the step matters more
                shelf.close()
            shutil.rmtree(place, ignore_errors=True)
