"""The run folder: its lock, its resolved recipe, metrics, progress, and how JSON and disk errors are handled.

Owns what every part of a run writes through. Does not know steps (`step.py`) or what any of them computes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from graftlm.errors import DiskError, UserError

T = TypeVar("T")

DONE = "done.json"
SECONDS_BETWEEN_LINES = 10
SECONDS_BEFORE_ESTIMATE = 5
"""Work that must have been timed before time left is told."""
RECIPE, LOCK = "recipe.json", ".lock"
NOT_TO_WRITE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}) | NOT_TO_WRITE


def say(text: str) -> None:
    """One line for the person watching, on stderr: stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def progress(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """Yield `items` while their progress is shown."""
    with ProgressShown(label, total) as shown:
        for count, item in enumerate(items, start=1):
            yield item
            shown.reach(count)


class ProgressShown:
    """Progress with time left: a bar in a terminal, gone when it is full, or a plain line every 10 s elsewhere.

    `first` is what was done before, in an earlier process. Time left is judged by what this one did from the first
    thing reached on: what comes before that one is often preparation, which says nothing about the rest.
    """

    def __init__(self, label: str, total: int | None, first: int = 0) -> None:
        self.label, self.total, self.first = label, total, first
        self._last_told = time.monotonic()
        self._timed_from: tuple[float, int] | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._task = _bars().add_task(self.label, total=self.total, completed=self.first, note="")
            _bars().start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            _bars().remove_task(self._task)
            if not _bars().tasks:
                _bars().stop()

    def reach(self, count: int, note: str = "") -> None:
        """Show that `count` are done, with a few words on how it goes."""
        if self._task is not None:
            _bars().update(self._task, completed=count, note=note)
            return
        now = time.monotonic()
        if self._timed_from is None and count > self.first:
            self._timed_from = now, count
        if now - self._last_told < SECONDS_BETWEEN_LINES:
            return
        self._last_told = now
        say(", ".join(filter(None, [f"{self.label}: {self._share(count)}", note, self._time_left(now, count)])))

    def _share(self, count: int) -> str:
        return f"{count:,}/{self.total:,}" if self.total else f"{count:,}"

    def _time_left(self, now: float, count: int) -> str:
        """Empty where the total is not known, all is done, or too little was timed to tell."""
        if self._timed_from is None or not self.total or count >= self.total:
            return ""
        begin, first = self._timed_from
        if count == first or now - begin < SECONDS_BEFORE_ESTIMATE:
            return ""
        return f"{duration(max(1, (now - begin) / (count - first) * (self.total - count)))} left"


@functools.cache
def _bars() -> Any:
    """The process's one live display: a bar shown while another is (held-out rows in training) stands below it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    names = ("graftlm", "torch", "transformers", "peft", "tokenizers", "sentencepiece", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, ensure_ascii=False, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read one of our own JSON files. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}.", "Run the recipe again; it redoes what is missing.") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON.", "Delete it and run the recipe again.") from None


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or broken disk below `folder` into a DiskError; it tells the free bytes where they matter.

    An error that names a file elsewhere (an input that may not be read, say) is none of the output's and passes.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not Path(error.filename).absolute().is_relative_to(folder.absolute())
        if error.errno not in DISK_ERRORS or elsewhere:
            raise
        what, again = os.strerror(error.errno or 0), "then run the same command again: finished work is kept."
        if error.errno in NOT_TO_WRITE:
            raise DiskError(
                f"Writing below {folder} failed: {what}.", f"Choose another --out or make it writable, {again}"
            ) from None
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free_bytes = shutil.disk_usage(existing).free
        raise DiskError(
            f"Writing below {folder} failed: {what} ({free_bytes:,} bytes free).",
            f"Free space or choose another --out, {again}",
        ) from None


def make_folder(folder: Path, *, may_exist: bool = True) -> None:
    """Make a folder and those it lies in. Raises UserError where none can be made, as in /proc."""
    try:
        folder.mkdir(parents=True, exist_ok=may_exist)
    except FileNotFoundError:
        raise UserError(f"No folder can be made in {folder.parent}.", "Choose another --out.") from None


class Metrics:
    """An append-only `metrics.jsonl`: one JSON object a line, flushed line by line, readable after kill -9.

    JSON has no number that is not finite: one is written as "NaN", "Infinity" or "-Infinity", and `read_metrics` gives
    it back. A null would not tell them apart, nor from what was not measured.

    Of several processes that train together one `is_writer`; the others' lines would be the same.
    """

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path, self.is_writer = path, is_writer

    def append(self, event: str, **values: Any) -> None:
        """Add one line. Raises DiskError."""
        if not self.is_writer:
            return
        line = _metrics_line({"event": event, **values})
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def cut_after(self, step: int, num_interventions: int = 0) -> None:
        """Drop lines of steps beyond `step`, interventions beyond the first `num_interventions` and a half-written last
        line: a resumed run writes them again."""
        if not self.is_writer or not self.path.exists():
            return
        lines = read_metrics(self.path)
        done = [place for place, line in enumerate(lines) if 0 < line.get("number", 0) <= num_interventions]
        kept = [
            line
            for place, line in enumerate(lines)
            # What led to an intervention that stands is kept with it: its steps were given up, not undone.
            if place <= max(done, default=-1)
            or (line.get("step", 0) <= step and line.get("number", 0) <= num_interventions)
        ]
        text = "".join(_metrics_line(line) + "\n" for line in kept)
        temporary = self.path.with_suffix(".tmp")
        with disk_errors(self.path.parent):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _metrics_line(values: Any) -> str:
    return json.dumps(json_values(values), ensure_ascii=False, allow_nan=False)


def json_values(value: Any) -> Any:
    """Plain values with numbers that are not finite as "NaN", "Infinity" and "-Infinity": JSON has none of them."""
    if isinstance(value, dict):
        return {key: json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _read(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_read(inner, key) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) and key != "text" else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a half-written last line is passed over.

    Numbers that are not finite come back as such, also from files of earlier versions, which wrote them bare.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(_read(json.loads(text)))
        except ValueError:
            continue
    return lines


def is_in_use(folder: Path) -> bool | None:
    """Whether a run is going on in `folder`; None where its lock does not tell (missing, of another machine's disk)."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


class RunFolder:
    """One run on disk. Use as a context: it holds the folder's lock from entry to exit."""

    def __init__(self, folder: Path, recipe_name: str) -> None:
        self.folder = folder
        self.recipe_name = recipe_name
        self._lock: Any = None

    def __enter__(self) -> Self:
        self._refuse_foreign()
        with disk_errors(self.folder):
            make_folder(self.folder)
            self._lock = (self.folder / LOCK).open("a+")
        try:
            self._take_lock()
            self._refuse_foreign()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise UserError(
                f"{self.folder} is in use by process {self._lock.read().strip() or 'unknown'}.",
                "Wait for it, stop it, or give this run another --out.",
            ) from None
        except OSError as error:
            say(f"{self.folder} cannot be locked ({error.strerror}): take care that no second run uses it.")
        with disk_errors(self.folder):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()

    def _refuse_foreign(self) -> None:
        """Refuse a place that is not ours to write in, before anything is made there. Raises UserError."""
        elsewhere = "Give --out a new or empty folder."
        if self.folder.is_symlink() and not self.folder.exists():
            raise UserError(f"{self.folder} is a link to nowhere ({self.folder.readlink()}).", elsewhere)
        file = next((p for p in (self.folder, *self.folder.parents) if p.exists() and not p.is_dir()), None)
        if file is not None:
            raise UserError(f"{file} is a file, not a folder.", elsewhere)
        if not self.folder.exists():
            return
        owner = _recipe_name_in(self.folder / RECIPE)
        if owner is None:
            # `write_json` may have been killed in the middle of the very first recipe.json.
            strangers = sorted(p.name for p in self.folder.iterdir() if p.name != LOCK and f".{RECIPE}." not in p.name)
            if strangers:
                raise UserError(f"{self.folder} is not a run folder: it holds {', '.join(strangers[:3])}.", elsewhere)
        elif owner != self.recipe_name:
            raise UserError(
                f"{self.folder} holds a run of recipe {owner}, not of {self.recipe_name}; nothing was touched.",
                f"Give --out another folder, or delete {self.folder} if you no longer need it.",
            )

    def write_recipe(self, recipe: dict[str, Any], inputs: Mapping[str, str]) -> None:
        """Keep the resolved recipe, the fingerprints of what it reads by path, and the versions it runs under."""
        path, content = self.folder / RECIPE, {"recipe": recipe, "inputs": dict(inputs), "versions": versions()}
        if not path.is_file() or read_json(path) != content:
            write_json(path, content)


def _recipe_name_in(path: Path) -> str | None:
    """The name of the recipe a run folder's recipe.json holds; None where there is none or it is another thing's."""
    if not path.is_file():
        return None
    content = read_json(path)
    recipe = content.get("recipe") if isinstance(content, dict) else None
    return recipe.get("name") if isinstance(recipe, dict) else None
