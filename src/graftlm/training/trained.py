"""What a finished stage leaves: one checkpoint of trained tensors, put onto the model the stage began with.

Owns where it lies and the way back onto a model. Does not know how the stage was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.recipe import Stage
from graftlm.training.checkpoint import load_checkpoint
from graftlm.training.trainable import copy_weights, prepare_model, restore_model, trainable_parameters

TRAINED = "trained"


def apply_stage(model: Any, stage: Stage, folder: Path, first_new_id: int | None) -> Any:
    """Put the result of a finished stage onto the model it began with; returns a plain model in float32."""
    return restore_model(attach_stage(model, stage, folder, first_new_id), stage.trains, first_new_id)


def attach_stage(model: Any, stage: Stage, folder: Path, first_new_id: int | None) -> Any:
    """The model as it stood at the end of a finished stage: adapters attached, not merged."""
    model = prepare_model(model, stage.trains, first_new_id, stage.seed)
    copy_weights(trainable_parameters(model), load_checkpoint(folder / TRAINED).tensors["weights"])
    return model
