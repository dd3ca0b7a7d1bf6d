"""One step's folder: what it was asked and given, and whether it is finished, unchanged, begun or damaged.

Owns the key of a step, its two marks (`started.json`, `done.json`) and what may be cleared. Does not know what a
step computes or which steps a road has; `pipeline` plans those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.recipe_values import files_named, folder_of_pattern, is_pattern
from graftlm.run import DONE, disk_errors, read_json, write_json

STARTED = "started.json"
WHOLE_FILE_BYTES = 64 * 2**20
LINKED_BYTES = 2**20
# Several times the size of the model or of the text, and needed only until the step is finished.
ONLY_WHILE_UNFINISHED = ("checkpoints", "best", "shelf")


@dataclass(frozen=True, slots=True)
class Order:
    """What a step is asked (`asked`: its part of the recipe, by section) and given (`given`: fingerprints by path).

    `key` also holds every step before it. Two orders of one key ask for the same result.
    """

    asked: Mapping[str, Any]
    given: Mapping[str, str]
    key: str


def make_order(name: str, asked: Mapping[str, Any], given: Mapping[str, str], before: str, version: int) -> Order:
    """The order of step `name` that follows the step with key `before`; `version` is that of its output's form.

    Where files lie is no part of the key, only what they hold: a run goes on where its inputs were moved to.
    """
    return Order(asked, given, key_of(name, version, _by_content(asked, given), sorted(given.values()), before))


def _by_content(value: Any, given: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _by_content(one, given) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(one, given) for one in value]
    return given.get(value, value) if isinstance(value, str) else value


def key_of(*parts: Any) -> str:
    """A sha256 over plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint(path: str | Path) -> str:
    """A sha256 over the contents of a file, of every file below a folder or of all that a pattern names; a hub id is
    its own fingerprint.

    A file beyond 64 MiB is read at its first and last MiB and by its size: enough to notice another file, and
    weights carry manifests of their own. Raises UserError when a file cannot be read.
    """
    path = Path(path)
    folder = folder_of_pattern(path) if is_pattern(path) else path
    if not folder.exists():
        return f"hub:{path}"
    if folder != path:
        files = files_named(path)
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            size_bytes = file.stat().st_size
            digest.update(f"{file.relative_to(folder) if folder.is_dir() else ''}:{size_bytes}\n".encode())
            with file.open("rb") as stream:
                if size_bytes <= WHOLE_FILE_BYTES:
                    digest.update(stream.read())
                else:
                    digest.update(stream.read(2**20))
                    stream.seek(-(2**20), os.SEEK_END)
                    digest.update(stream.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the path of a readable file.") from None
    return digest.hexdigest()


class Step:
    """One step's folder: finished when it holds a done mark with the key of what it was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The folder's name, for example `2-base`."""
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """Whether it holds a done mark, whatever it was asked then."""
        return (self.folder / DONE).exists()

    @property
    def holds_unfinished_training(self) -> bool:
        """Whether hours may lie here that no done mark speaks for yet."""
        return not self.is_finished and (self.folder / "checkpoints").exists()

    @property
    def _holds_unfinished_work(self) -> bool:
        return not self.is_finished and any((self.folder / name).exists() for name in ONLY_WHILE_UNFINISHED)

    def is_done(self, key: str) -> bool:
        """Whether the step finished with exactly this key. Raises UserError when a file of its result is gone."""
        if not self.is_finished:
            return False
        mark = read_json(self.folder / DONE)
        if mark["key"] != key:
            return False
        for name, size_bytes in mark["files"].items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size_bytes:
                what = "is missing" if found is None else f"has {found:,} bytes, not {size_bytes:,}"
                raise UserError(
                    f"{file} {what}: the finished step {self.name} is damaged.",
                    f"Put the file back, or delete {self.folder} to do this step again.",
                )
        return True

    def changes(self, order: Order) -> list[str]:
        """What differs between what was asked when this step began and `order`: dotted keys, then files."""
        started = self.folder / STARTED
        if not started.exists():
            return []
        before = read_json(started)
        if before["key"] == order.key:
            return []
        files = sorted(path for path, mark in order.given.items() if before["given"].get(path, mark) != mark)
        return sorted(changed_keys(before["asked"], order.asked)) + [f"the contents of {path}" for path in files]

    def is_begun_with_another(self, key: str) -> bool:
        """Whether the folder was begun for an order of another key."""
        started = self.folder / STARTED
        return started.exists() and read_json(started)["key"] != key

    def begin(self, order: Order) -> None:
        """Make the folder ready: what was interrupted under this key is continued, anything else is cleared.

        Raises UserError when the folder holds unfinished training asked for otherwise: going on would change the
        maths, and clearing it would lose work.
        """
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(
                f"{self.folder} is a link or a file, not a folder made by a run; it was not touched.",
                "Move it away. To use another disk, give --out a folder there.",
            )
        if self.is_begun_with_another(order.key):
            self.refuse_lost_training(self.changes(order))
        elif (self.folder / STARTED).exists() and self._holds_unfinished_work:
            return
        with disk_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        write_json(self.folder / STARTED, {"key": order.key, "asked": order.asked, "given": order.given})

    def refuse_lost_training(self, changes: list[str]) -> None:
        """Raise UserError when going on would throw unfinished training away; `changes` is what was changed."""
        if self.holds_unfinished_training:
            raise UserError(
                f"{self.folder} holds unfinished training, begun with other values of: "
                f"{', '.join(changes) or 'the steps before it'}.",
                f"Put those back to continue it, or delete {self.folder} to start the stage anew.",
            )

    def move_below(self, name: str) -> str:
        """Move the folder into the folder `name` beside it, numbered if one lies there; returns its name there."""
        place = self.folder.parent / name
        with disk_errors(place):
            place.mkdir(exist_ok=True)
            number = sum(1 for _ in place.glob(f"{self.name}*"))
            target = place / (f"{self.name}.{number}" if number else self.name)
            self.folder.rename(target)
        return target.name

    def take_over(self, finished: Path) -> None:
        """Become what the finished step in `finished` is, without its work. Raises DiskError.

        Large files are linked, which nothing writes into once a step is finished; small ones are copied, as a model's
        card is written anew.
        """
        scratch = self.folder.with_name(f".{self.name}.taken-over")
        with disk_errors(self.folder):
            shutil.rmtree(scratch, ignore_errors=True)  # of a kill in the middle
            shutil.copytree(finished, scratch, copy_function=_link_or_copy)
            scratch.rename(self.folder)

    def finish(self, key: str, seconds: float, **facts: Any) -> None:
        """Leave the done mark with `facts`, small values worth reading later; what was for resuming is deleted."""
        files = {
            str(file.relative_to(self.folder)): file.stat().st_size
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and not _is_passing(file.relative_to(self.folder))
        }
        write_json(self.folder / DONE, {"key": key, "seconds": round(seconds, 3), **facts, "files": files})
        self.free_space()

    def free_space(self) -> None:
        """Delete what only resuming needed; of a finished step only."""
        for name in ONLY_WHILE_UNFINISHED:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def seconds(self) -> float:
        """How long the finished step took."""
        return float(read_json(self.folder / DONE)["seconds"])


def _link_or_copy(source: str, target: str) -> None:
    if os.path.getsize(source) >= LINKED_BYTES:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _is_passing(place: Path) -> bool:
    return place.parts[0] in ONLY_WHILE_UNFINISHED or place.name.startswith(".") or str(place) in (STARTED, DONE)


def changed_keys(before: Any, after: Any, prefix: str = "") -> set[str]:
    """Dotted keys of nested mappings and lists whose values differ; an item of a list goes by its name or number."""
    before, after = _keyed(before), _keyed(after)
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return set() if before == after else {prefix.rstrip(".")}
    return {
        name
        for key in before.keys() | after.keys()
        for name in changed_keys(before.get(key), after.get(key), f"{prefix}{key}.")
    }


def _keyed(value: Any) -> Any:
    """A list of mappings as a mapping; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(item.get("name", number)): item for number, item in enumerate(value)}
    return value
