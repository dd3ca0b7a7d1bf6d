"""Checkpoints that are whole or absent, and resume exactly.

Owns the layout of a checkpoint folder: tensors as safetensors, plain values as JSON, and a manifest of sizes and
sha256 written last. A checkpoint is built in a temporary folder, flushed, then renamed, so a process killed at
any moment leaves the newest complete one intact. Does not know what the tensors mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftlm.errors import DiskError, UserError
from graftlm.model.weights import system_errors
from graftlm.run import disk_errors, read_json, say

MANIFEST, VALUES = "manifest.json", "values.json"
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


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as `folder`, replacing an older one of that name. Raises DiskError; the old one stays."""
    needed = checkpoint.num_bytes
    temporary, before = folder.with_name(f".{folder.name}.{os.getpid()}"), folder.with_name(f".{folder.name}{BEFORE}")
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
        try:
            _write(temporary, checkpoint)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            folder.rename(before)  # and not removed: it may be the only whole one
        temporary.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(before, ignore_errors=True)


def _write(temporary: Path, checkpoint: Checkpoint) -> None:
    temporary.mkdir()
    for name, group in checkpoint.tensors.items():
        with system_errors():
            save_file(
                {key: tensor.cpu().contiguous() for key, tensor in group.items()}, temporary / f"{name}.safetensors"
            )
    (temporary / VALUES).write_text(json.dumps(checkpoint.values), encoding="utf-8")
    manifest = {file.name: _facts(file) for file in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        _flush(file)
    _flush(temporary)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against its manifest. Raises UserError naming the bad file."""
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
    tensors = {Path(name).stem: load_file(folder / name) for name in manifest if name.endswith(".safetensors")}
    return Checkpoint(tensors, read_json(folder / VALUES))


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


def newest_good_weights(checkpoints: Path) -> Checkpoint | None:
    """The weights of the newest state to roll back to, and nothing else of it; None when there is none."""
    good = good_checkpoints(checkpoints)
    return Checkpoint({"weights": load_checkpoint(good[-1]).tensors["weights"]}, {}) if good else None


def load_newest_checkpoint(checkpoints: Path, groups: Sequence[str]) -> Checkpoint | None:
    """The newest checkpoint that is whole and holds `groups`; None when there is none at all.

    Damaged ones are told of and, once an older one has taken their place, deleted. Raises UserError when every
    one is damaged: starting anew in silence would throw the work away.
    """
    _put_back_replaced(checkpoints)
    damaged: list[Path] = []
    problem: UserError | None = None
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            checkpoint = load_checkpoint(folder)
            lacking = [name for name in groups if name not in checkpoint.tensors]
            if lacking:
                raise UserError(f"Checkpoint {folder} lacks {lacking[0]}.safetensors.", "Use an older one.")
        except UserError as error:
            say(f"{error.problem} Looking for an earlier checkpoint.")
            problem = problem or error
            damaged.append(folder)
            continue
        for bad in damaged:
            shutil.rmtree(bad, ignore_errors=True)
        return checkpoint
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
