"""The trained model, merged one tensor at a time: the grown base with what each stage learned put onto it.

Owns how a stage's kept tensors (plain, rows split into old and new, adapters) change one tensor of the model before
it. The result is bit for bit that of `training.trainable.restore_model`, in the memory of one matrix. Does not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graftlm.errors import UserError
from graftlm.model.lora import merged_matrix
from graftlm.model.tensors import TensorSource, read_stored
from graftlm.model.weights import StoredTensor, read_header, verify_manifest
from graftlm.recipe import Lora, Stage
from graftlm.training.trained import TRAINED

_PEFT, _ROWS = "base_model.model.", ".parametrizations.weight.original"


def after_stage(before: TensorSource, stage: Stage, folder: Path) -> TensorSource:
    """The model after a finished stage that began with `before`.

    Raises UserError when the stage's kept tensors are missing, damaged or of another model.
    """
    kept = _kept_tensors(folder / TRAINED)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in kept.items():
        target, part = _place(name.removeprefix(_PEFT))
        if target not in before.shapes:
            raise UserError(
                f"{folder / TRAINED} holds {name}, which the model before this stage has no place for.",
                f"Delete {folder} and run the recipe again.",
            )
        parts.setdefault(target, {})[part] = stored
    return TensorSource(before.config, before.shapes, partial(_merged, before, stage, parts))


def _kept_tensors(folder: Path) -> dict[str, StoredTensor]:
    weights = folder / "weights.safetensors"
    if not weights.is_file() or not verify_manifest(folder):
        raise UserError(
            f"{folder} is not the whole result of a stage.", f"Delete {folder.parent} and run the recipe again."
        )
    return read_header(weights)


def _place(name: str) -> tuple[str, str]:
    """The model's tensor that a kept one changes, and which part of it: all, rows 0 or 1, or an adapter's own name."""
    if _ROWS in name:
        module, _, part = name.partition(_ROWS)
        return f"{module}.weight", part
    module, found, rest = name.partition(".lora_")
    return (f"{module}.weight", f"lora_{rest}") if found else (name, "all")


def _merged(before: TensorSource, stage: Stage, parts: Mapping[str, Mapping[str, StoredTensor]], name: str) -> Tensor:
    kept = {part: read_stored(stored) for part, stored in parts.get(name, {}).items()}
    if not kept:
        return before.read(name)
    if "all" in kept:
        return kept["all"]
    trains = stage.trains
    if isinstance(trains, Lora) and not kept.keys() <= {"0", "1"}:
        return merged_matrix(
            before.read(name), kept, rank=trains.rank, alpha=trains.alpha, rslora=trains.rslora, dora=trains.dora
        )
    rows = kept.get("0")
    new_rows = kept["1"]
    if rows is None:  # only the new rows learned
        rows = before.read(name)[: -len(new_rows)]
    return torch.cat([rows, new_rows])
