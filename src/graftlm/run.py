"""The run folder: names, locks, marks of finished steps, metrics, progress.

Owns how a run is laid out on disk. Does not know what any step computes. Every step of the road writes its
output through here, so that "finished", "unchanged" and "interrupted" mean the same everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from graftlm.errors import DiskError, UserError

T = TypeVar("T")

WHOLE_FILE_BYTES = 64 * 2**20
DONE = "done.json"


def say(text: str) -> None:
    """One line for the person watching, on stderr: stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


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
            say(f"{label}: {count}{f'/{total}' if total else ''}{left}")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    names = ("graftlm", "torch", "transformers", "peft", "tokenizers", "sentencepiece", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def fingerprint(path: str | Path) -> str:
    """A sha256 over the contents of a file or of every file below a folder; a hub id is its own fingerprint.

    A file beyond 64 MiB is read at its first and last MiB and by its size: enough to notice another file, and
    weights carry manifests of their own.
    """
    path = Path(path)
    if not path.exists():
        return f"hub:{path}"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{size_bytes}\n".encode())
        with file.open("rb") as stream:
            if size_bytes <= WHOLE_FILE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """A sha256 over plain values: what a step was asked to do and what it was given."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it. Raises DiskError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path.parent):
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
    """Turn a full, read-only or broken disk into a DiskError that tells the free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO):
            raise
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free_bytes = shutil.disk_usage(existing).free
        raise DiskError(
            f"Writing below {folder} failed: {os.strerror(error.errno or 0)} ({free_bytes:,} bytes free).",
            "Free space or choose another --out, then run the same command again: finished work is kept.",
        ) from None


class Metrics:
    """An append-only `metrics.jsonl`: one JSON object a line, flushed line by line, readable after kill -9."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **values: Any) -> None:
        """Add one line. Raises DiskError."""
        line = json.dumps({"event": event, **values}, ensure_ascii=False)
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def cut_after(self, step: int) -> None:
        """Drop lines of steps beyond `step` and a half-written last line: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        temporary = self.path.with_suffix(".tmp")
        with disk_errors(self.path.parent):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a half-written last line is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class RunFolder:
    """One run on disk. Use as a context: it holds the folder's lock from entry to exit."""

    def __init__(self, folder: Path, recipe_name: str) -> None:
        self.folder = folder
        self.recipe_name = recipe_name
        self._lock: Any = None

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise UserError(
                f"{self.folder} is in use by process {self._lock.read().strip() or 'unknown'}.",
                "Wait for it, stop it, or give this run another --out.",
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._refuse_foreign()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _refuse_foreign(self) -> None:
        resolved = self.folder / "recipe.json"
        if resolved.exists():
            owner = read_json(resolved)["recipe"]["name"]
            if owner != self.recipe_name:
                raise UserError(
                    f"{self.folder} holds a run of recipe {owner}, not of {self.recipe_name}; nothing was touched.",
                    f"Give --out another folder, or delete {self.folder} if you no longer need it.",
                )
            return
        strangers = sorted(p.name for p in self.folder.iterdir() if p.name != ".lock")
        if strangers:
            raise UserError(
                f"{self.folder} is not a run folder: it holds {', '.join(strangers[:3])}.",
                "Give --out a new or empty folder.",
            )

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Keep the resolved recipe with the versions it runs under."""
        write_json(self.folder / "recipe.json", {"recipe": recipe, "versions": versions()})

    def step(self, name: str) -> Step:
        """The step folder `name`, for example `1-tokenizer`."""
        return Step(self.folder / name)


class Step:
    """One step's folder: finished when it holds a done mark with the key of what it was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The folder's name, for example `2-base`."""
        return self.folder.name

    def is_done(self, key: str) -> bool:
        """Whether the step finished with exactly this key."""
        mark = self.folder / DONE
        return mark.exists() and read_json(mark)["key"] == key

    def begin(self, key: str, asked: dict[str, Any]) -> None:
        """Make the folder ready: an outdated result is cleared, an interrupted one with this key is continued.

        Raises UserError when the folder holds unfinished training asked for otherwise: going on would change the
        maths, and clearing it would lose work.
        """
        started = self.folder / "started.json"
        if started.exists():
            before = read_json(started)
            if before["key"] == key:
                return
            if not (self.folder / DONE).exists() and (self.folder / "checkpoints").exists():
                changed = sorted(_changed_keys(before["asked"], asked)) or ["its inputs"]
                raise UserError(
                    f"{self.folder} holds unfinished training, begun with other values of: {', '.join(changed)}.",
                    f"Put those back to continue it, or delete {self.folder} to start the stage anew.",
                )
        with disk_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        write_json(started, {"key": key, "asked": asked})

    def finish(self, key: str, seconds: float, **facts: Any) -> None:
        """Leave the done mark; `facts` are small values worth reading later."""
        write_json(self.folder / DONE, {"key": key, "seconds": round(seconds, 3), **facts})

    def seconds(self) -> float:
        """How long the finished step took."""
        return float(read_json(self.folder / DONE)["seconds"])


def _changed_keys(before: Any, after: Any, prefix: str = "") -> set[str]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return set() if before == after else {prefix.rstrip(".")}
    return {
        name
        for key in before.keys() | after.keys()
        for name in _changed_keys(before.get(key), after.get(key), f"{prefix}{key}.")
    }
