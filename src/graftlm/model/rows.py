"""Rows of embedding and head as parameters of their own: those of old pieces apart from those of new ones.

Owns the split of a vocabulary matrix into old and new rows, its undoing, and the sorting of all parameters by
role. Does not know rates, decays or optimizers: `training` gives each role its own, or freezes it bit for
bit. On the road every stage splits before it trains and joins before it hands its model on.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from graftlm.model.causal import is_tied, vocabulary_modules

Role = Literal["adapter", "body", "old_rows", "new_rows"]


class _OldAndNewRows(nn.Module):
    """weight_VH = old_rows above new_rows; the gradient of each is its part of the whole's."""

    def __init__(self, first_new_id: int) -> None:
        super().__init__()
        self.first_new_id = first_new_id

    def forward(self, old_rows: Tensor, new_rows: Tensor) -> Tensor:
        return torch.cat([old_rows, new_rows])

    def right_inverse(self, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        return weight_VH[: self.first_new_id].clone(), weight_VH[self.first_new_id :].clone()


def split_rows(model: nn.Module, first_new_id: int) -> None:
    """Make the rows from `first_new_id` on parameters apart from those before, in embedding and head.

    A tied head keeps sharing both parts with the embedding. The model computes exactly what it did.
    """
    embedding, head = vocabulary_modules(model)
    assert not parametrize.is_parametrized(embedding), "the rows are split already"
    assert 0 < first_new_id < len(embedding.weight), f"no row to split at {first_new_id}"
    tied = is_tied(model)
    for module in (embedding, head):
        parametrize.register_parametrization(module, "weight", _OldAndNewRows(first_new_id))
    if tied:
        shared = embedding.parametrizations.weight
        head.parametrizations.weight.original0 = shared.original0
        head.parametrizations.weight.original1 = shared.original1


def join_rows(model: nn.Module) -> None:
    """Undo `split_rows`.

    One plain parameter again, tied as before; nothing changes but the parameters' identity.
    """
    embedding, head = vocabulary_modules(model)
    tied = is_tied(model)
    for module in (embedding,) if tied else (embedding, head):
        requires_grad = module.weight.requires_grad
        with torch.no_grad():  # else a frozen weight would come back as no parameter at all
            weight = Parameter(module.weight.detach(), requires_grad)
        _forget_split(module)
        module.weight = weight
    if tied:
        _forget_split(head)
        head.weight = embedding.weight


def parameter_groups_by_role(model: nn.Module) -> dict[Role, list[tuple[str, Parameter]]]:
    """Every parameter by what it is: adapter, rows of old pieces, rows of new pieces, or the body; each once.

    Rows that were not split are all old: where nothing was grafted there are no new ones.
    """
    rows: dict[int, Role] = {}
    for module in vocabulary_modules(model):
        if parametrize.is_parametrized(module, "weight"):
            parts = module.parametrizations.weight
            rows |= {id(parts.original0): "old_rows", id(parts.original1): "new_rows"}
        else:
            rows[id(module.weight)] = "old_rows"
    roles: dict[Role, list[tuple[str, Parameter]]] = {"adapter": [], "body": [], "old_rows": [], "new_rows": []}
    for name, parameter in model.named_parameters():
        role = rows.get(id(parameter)) or ("adapter" if ".lora_" in name else "body")
        roles[role].append((name, parameter))
    return roles


def _forget_split(module: Any) -> None:
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    module._parameters.pop("weight", None)
    module._buffers.pop("weight", None)
