"""Checkpoints that are whole or absent, and resume exactly.

Owns the layout of a checkpoint folder: tensors as safetensors (one file a group, or parts as several ranks wrote them),
plain values as JSON, and a manifest of sizes and sha256 written last. A checkpoint is built in a temporary folder,
flushed, then renamed, so a process killed at any moment leaves the newest complete one intact. Does not know what the
tensors mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftlm.errors import DiskError, UserError
from graftlm.model.halves import joined_by_name
from graftlm.model.weights import system_errors
from graftlm.run import disk_errors, read_json, say
from graftlm.training.part_files import PREFIX, read_parts

MANIFEST, VALUES = "manifest.json", "values.json"
GROUPS = "groups"  # of values: the groups of tensors, of which one without tensors leaves no part
BEFORE = ".before"  # ends the name of one whose place another is about to take
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Named groups of tensors (weights, optimizer, random states) and plain values (step, scale, ...)."""

    tensors: dict[str, dict[str, torch.Tensor]]
    values: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for group in self.tensors.values() for tensor in group.values())


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint on disk, each of its files as its manifest says; its tensors, by `groups`, are not read yet."""

    folder: Path
    values: dict[str, Any]
    groups: tuple[str, ...]
    is_in_parts: bool

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """The tensors of one of its groups, whole."""
        if not self.is_in_parts:
            return joined_by_name(load_file(self.folder / f"{group}.safetensors"))
        return read_parts(self.folder, group, lambda _, whole: torch.empty_like(whole, device="cpu"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as `folder`, replacing an older one of that name. Raises DiskError; the old one stays."""
    temporary = place_to_build(folder, checkpoint.num_bytes)
    with disk_errors(folder.parent):
        try:
            _write(temporary, checkpoint)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _take_place(temporary, folder)


def place_to_build(folder: Path, needed: int) -> Path:
    """A new empty folder beside `folder`, where a checkpoint of `needed` bytes is to be built; what a kill left there
    is cleared away. Raises DiskError."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(".*.*"):
            shutil.rmtree(stale, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise DiskError(
                f"A checkpoint needs {needed:,} bytes below {folder.parent} and {free:,} are free.",
                "Free space and run the same command again: the last checkpoint is intact.",
            )
        temporary.mkdir()
    return temporary


def publish(temporary: Path, folder: Path, values: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Make a checkpoint of the flushed files in `temporary`, whose `facts` (sizes and hashes) are known by name.

    Raises DiskError; an older one named `folder` then stays.
    """
    with disk_errors(folder.parent):
        _seal(temporary, values, facts)
        _take_place(temporary, folder)


def _write(temporary: Path, checkpoint: Checkpoint) -> None:
    files = []
    for name, group in checkpoint.tensors.items():
        files.append(temporary / f"{name}.safetensors")
        with system_errors():
            save_file({key: tensor.cpu().contiguous() for key, tensor in group.items()}, files[-1])
    _seal(temporary, checkpoint.values, flushed(files))


def _seal(temporary: Path, values: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write plain values, and last the manifest of all."""
    (temporary / VALUES).write_text(json.dumps(values), encoding="utf-8")
    manifest = dict(sorted({**facts, **flushed([temporary / VALUES])}.items()))
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(temporary / MANIFEST)
    _flush(temporary)


def _take_place(temporary: Path, folder: Path) -> None:
    before = folder.with_name(f".{folder.name}{BEFORE}")
    if folder.exists():
        folder.rename(before)  # and not removed: it may be the only whole one
    temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def flushed(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash by name of files that lie safely on disk once this returns."""
    facts = {}
    for file in files:
        facts[file.name] = _facts(file)
        _flush(file)
    return facts


def stored_checkpoint(folder: Path) -> Stored:
    """A checkpoint whose every file was checked against its manifest. Raises UserError naming the bad file."""
    manifest = read_json(folder / MANIFEST)
    for name, facts in manifest.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"Checkpoint {folder} lacks {name}.", f"Delete {folder}; the one before it is used then.")
        if _facts(file) != facts:
            raise UserError(
                f"{file} does not match its manifest: it is damaged.",
                f"Delete {folder}; the checkpoint before it is used then.",
            )
    files = {name for name in manifest if name.endswith(".safetensors")}
    added = sorted({file.name for file in folder.glob("*.safetensors")} - files)
    if added:  # parts are found by looking into every such file of the folder
        raise UserError(f"{folder / added[0]} is not in the checkpoint's manifest.", f"Move it out of {folder}.")
    is_in_parts = any(name.startswith(PREFIX) for name in files)
    values = read_json(folder / VALUES)
    groups = values.get(GROUPS, ()) if is_in_parts else [Path(name).stem for name in files]
    return Stored(folder, values, tuple(sorted(groups)), is_in_parts)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, in parts or not, after checking every file. Raises UserError naming the bad file."""
    stored = stored_checkpoint(folder)
    return Checkpoint({group: stored.tensors(group) for group in stored.groups}, stored.values)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:08d}"


def whole_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Incomplete ones (no manifest) are passed over."""
    return [folder for folder in sorted(checkpoints.glob("step-*")) if (folder / MANIFEST).exists()]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(whole_checkpoints(checkpoints)), None)


def good_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints whose `is_good` value is true, oldest first: states to roll back to."""
    return [folder for folder in whole_checkpoints(checkpoints) if read_json(folder / VALUES).get("is_good")]


def precision_begun_in(checkpoints: Path) -> str | None:
    """The precision of the newest complete checkpoint whose values can be read; None when there is none."""
    for folder in reversed(whole_checkpoints(checkpoints)):
        with contextlib.suppress(UserError):
            return read_json(folder / VALUES)["precision"]
    return None


def newest_good_weights(checkpoints: Path) -> Stored | None:
    """The weights of the newest state to roll back to, and nothing else of it; None when there is none."""
    good = good_checkpoints(checkpoints)
    return replace(stored_checkpoint(good[-1]), values={}, groups=("weights",)) if good else None


def newest_stored(checkpoints: Path, groups: Sequence[str]) -> Stored | None:
    """The newest checkpoint that is whole and holds `groups`; None when there is none at all.

    Damaged ones are told of and, once an older one has taken their place, deleted. Raises UserError when every
    one is damaged: starting anew in silence would throw the work away.
    """
    _put_back_replaced(checkpoints)
    damaged: list[Path] = []
    problem: UserError | None = None
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            stored = stored_checkpoint(folder)
            lacking = [name for name in groups if name not in stored.groups]
            if lacking:
                raise UserError(f"Checkpoint {folder} lacks {lacking[0]}.safetensors.", "Use an older one.")
        except UserError as error:
            say(f"{error.problem} Looking for an earlier checkpoint.")
            problem = problem or error
            damaged.append(folder)
            continue
        for bad in damaged:
            shutil.rmtree(bad, ignore_errors=True)
        return stored
    if problem is None:
        return None
    raise UserError(
        f"{problem.problem} No earlier checkpoint is whole.",
        f"Put the damaged file back, or delete {checkpoints.parent} to train this stage anew.",
    )


def _put_back_replaced(checkpoints: Path) -> None:
    """Where a kill came between a checkpoint's removal and the next one taking its place, it is still good."""
    for before in checkpoints.glob(f".*{BEFORE}"):
        place = before.with_name(before.name.removeprefix(".").removesuffix(BEFORE))
        if not place.exists():
            before.rename(place)


def prune_checkpoints(checkpoints: Path, num_kept: int = KEPT) -> None:
    """Keep the newest `num_kept` complete checkpoints and as many good ones: the newest good one may yet fail."""
    good = good_checkpoints(checkpoints)[-num_kept:]
    for folder in whole_checkpoints(checkpoints)[:-num_kept]:
        if folder in good:
            continue
        try:
            shutil.rmtree(folder)
        except OSError as error:
            say(f"Could not remove the old checkpoint {folder}: {error}")


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
