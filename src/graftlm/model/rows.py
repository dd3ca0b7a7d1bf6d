"""Rows of embedding and head as parameters of their own: those of old pieces apart from those of new ones.

Owns the split of a vocabulary matrix into old and new rows, its undoing, and the sorting of all parameters by
role. Does not know rates, decays or optimizers: `training` gives each role its own, or freezes it bit for
bit. On the road every stage splits before it trains and joins before it hands its model on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from graftlm.model.causal import is_tied, vocabulary_modules

Role = Literal["adapter", "body", "old_rows", "new_rows"]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices one above the other, (sum of rows, H): the memory they lie in where they are neighbours, else a copy.

    No gradient is kept; what is written into the result may show in the parts.
    """
    first = parts[0].detach()
    if len(parts) == 1:
        return first
    if not all(_is_followed(above, below) for above, below in pairwise(parts)):
        return torch.cat([part.detach() for part in parts])
    shape = (sum(len(part) for part in parts), first.shape[1])
    return first.new_empty(0).set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())


def _is_followed(above: Tensor, below: Tensor) -> bool:
    return (
        above.is_contiguous()
        and below.is_contiguous()
        and above.untyped_storage().data_ptr() == below.untyped_storage().data_ptr()
        and above.storage_offset() + above.numel() == below.storage_offset()
    )


class _Joined(torch.autograd.Function):
    """`joined`, with a gradient: each part's is its rows of the whole's; `_add_rows` takes them from a sparse one."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.parts = parts
        return joined(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        num_rows = [len(part) for part in ctx.parts]
        if not grad.is_sparse:
            grads = grad.split(num_rows)
            return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))
        starts = [sum(num_rows[:place]) for place in range(len(num_rows))]
        named = zip(ctx.parts, starts, ctx.needs_input_grad, strict=True)
        return tuple(_add_rows(part, grad, start) if needed else None for part, start, needed in named)


def _add_rows(part: Tensor, grad_VH: Tensor, start: int) -> Tensor | None:
    """Add a sparse gradient's rows from `start` on to the gradient the part has; where it has none, they are its first.

    Autograd would fill a matrix of zeros for each micro-batch and add it up whole.
    """
    rows, values = grad_VH._indices()[0] - start, grad_VH._values()
    is_own = (rows >= 0) & (rows < len(part))
    total = torch.zeros_like(part) if part.grad is None else part.grad
    total.index_add_(0, rows[is_own], values[is_own].to(total.dtype))
    return total if part.grad is None else None


class _OldAndNewRows(nn.Module):
    """weight_VH = old_rows above new_rows; the gradient of each is its part of the whole's."""

    def __init__(self, first_new_id: int) -> None:
        super().__init__()
        self.first_new_id = first_new_id

    def forward(self, old_rows: Tensor, new_rows: Tensor) -> Tensor:
        return _Joined.apply(old_rows, new_rows)

    def right_inverse(self, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        return weight_VH[: self.first_new_id], weight_VH[self.first_new_id :]


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


def lay_rows_together(model: nn.Module) -> None:
    """Put both parts of split rows into one piece of memory, as `split_rows` does, so that joining copies nothing.

    For a model moved to another device, where each parameter has become a tensor of its own.
    """
    embedding, head = vocabulary_modules(model)
    for module in (embedding,) if is_tied(model) else (embedding, head):
        if parametrize.is_parametrized(module, "weight"):
            parts = [module.parametrizations.weight.original0, module.parametrizations.weight.original1]
            whole = joined(parts)
            for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = rows


def touch_only_rows_read(model: nn.Module, is_on: bool) -> None:
    """Let the way back touch those rows of a split embedding's gradient alone that a micro-batch has read (`is_on`).

    Not on a GPU, where rows would be added in an order that is not the same each time, nor where something waits for a
    whole gradient of every micro-batch.
    """
    embedding = vocabulary_modules(model)[0]
    embedding.sparse = is_on and parametrize.is_parametrized(embedding, "weight")


def head_rows(model: nn.Module) -> tuple[Parameter, ...]:
    """The output head's matrix in its parts, one above the other: one where its rows are not split."""
    head = vocabulary_modules(model)[1]
    if not parametrize.is_parametrized(head, "weight"):
        return (head.weight,)
    return (head.parametrizations.weight.original0, head.parametrizations.weight.original1)


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
