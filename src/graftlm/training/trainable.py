"""What of a model a stage trains: made trainable before, put back into a plain model after.

Owns the meaning of `trains` (full, lora, new-rows) in parameters. Does not know steps, files or schedules: a
stage prepares its model here, and restores it here from the weights it kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch.nn import Parameter

from graftlm.errors import UserError
from graftlm.model.halves import split_from
from graftlm.model.lora import attach_lora, merge_lora
from graftlm.model.rows import Role, join_rows, parameter_groups_by_role, split_rows
from graftlm.recipe import Full, Lora, NewRows


def prepare_model(model: Any, trains: Full | Lora | NewRows, first_new_id: int | None, seed: int) -> Any:
    """Make exactly what `trains` names trainable; returns the model (wrapped by PEFT for LoRA).

    Rows of the embedding and head are split at `first_new_id`, so that old and new rows are parameters of their
    own: they take their own rate, or stay bit for bit as they were.
    """
    rows = _learning_rows(trains)
    if rows == "new" and first_new_id is None:
        raise UserError(
            f"A {trains.kind} stage that trains new rows needs a grafted tokenizer, and this one has no new pieces.",
            "Graft pieces (tokenizer.mode), or choose another kind of stage (for lora: rows all or none).",
        )
    model.requires_grad_(isinstance(trains, Full))
    if isinstance(trains, Lora):
        model = attach_lora(
            model,
            rank=trains.rank,
            alpha=trains.alpha,
            dropout=trains.dropout,
            targets=trains.targets,
            rslora=trains.rslora,
            dora=trains.dora,
            seed=seed,
        )
    if first_new_id is not None and rows != "none":
        split_rows(model, first_new_id)
    roles = parameter_groups_by_role(model)
    learns: dict[Role, bool] = {"old_rows": rows == "all", "new_rows": rows in ("all", "new")}
    for role, does_learn in learns.items():
        for _, parameter in roles[role]:
            parameter.requires_grad_(does_learn)
    return model


def restore_model(model: Any, trains: Full | Lora | NewRows, first_new_id: int | None) -> Any:
    """Undo `prepare_model` keeping what was learned: adapters are merged, rows joined."""
    if isinstance(trains, Lora):
        model = merge_lora(model)
    if first_new_id is not None and _learning_rows(trains) != "none":
        join_rows(model)
    return model.requires_grad_(False).eval()


def _learning_rows(trains: Full | Lora | NewRows) -> Literal["all", "new", "none"]:
    if isinstance(trains, Lora):
        return trains.rows
    return "all" if isinstance(trains, Full) else "new"


def trainable_parameters(model: Any) -> dict[str, Parameter]:
    """Everything that learns, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_roles(model: Any) -> dict[str, list[Parameter]]:
    """What learns, by role: adapter, body, old_rows, new_rows."""
    roles = parameter_groups_by_role(model)
    return {role: [p for _, p in named if p.requires_grad] for role, named in roles.items()}


def copy_weights(
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, torch.Tensor],
    low_of: Mapping[Parameter, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Put saved weights into what learns, and into the lower halves of those held in halves.

    Raises UserError where names or shapes differ.
    """
    different = sorted(parameters.keys() ^ tensors.keys())
    if different:
        raise UserError(
            f"The saved weights are not those this stage trains: {different[0]} is on one side only.",
            "Delete the stage's folder and run the recipe again.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"The saved {name} has shape {list(tensors[name].shape)}, this model's {list(parameter.shape)}.",
                    "Delete the stage's folder and run the recipe again.",
                )
            if parameter in low_of:
                split_from(tensors[name].to(parameter.device, torch.float32, copy=True), parameter, low_of[parameter])
            else:
                parameter.copy_(tensors[name])
