"""Decoder layers whose weights are shared out: each rank holds a part, and a layer is whole only while it is computed.

Owns which weights are shared out and how torch's FSDP2 is asked to do it: one unit a decoder layer. Embedding, head and
last norm stay whole on every rank: rows are split, tied, and read in chunks by the loss. The only file importing FSDP.
Does not know stages, optimizers or which ranks there are. From here on every forward and backward pass of the body is
work in common: all ranks must take equally many.

Source: FSDP, arXiv 2304.11277; its second form, `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from graftlm.model.causal import body_of
from graftlm.model.packed import make_layout


def is_shared_out(tensor: Tensor) -> bool:
    """Whether other ranks hold other parts of this tensor."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, without a copy or a gradient: all of it where it is whole."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, cut as the parameter `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local().clone()


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole of which every rank gives its part, cut as the parameter `like` is. All ranks must call it together."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    cut = DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return cut.full_tensor()


def on_host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks, cut and copied alike, for tensors on the CPU."""
    if mesh.device_type == "cpu":
        return mesh
    groups: Any = mesh.get_all_groups()
    one_or_all = groups[0] if mesh.ndim == 1 else groups
    return DeviceMesh.from_group(one_or_all, "cpu", mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def as_cut(part: Tensor, like: Tensor, mesh: DeviceMesh) -> Tensor:
    """A rank's plain part as what tells where in the whole it lies: cut as the parameter `like` is, over `mesh`."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share the decoder layers' weights out over `mesh`: over its last dimension, with copies along a first one.

    A gradient becomes its rank's part of the sum over all ranks. The model must attend over packed rows already.
    """
    body = body_of(model)
    units = [fully_shard(layer, mesh=mesh, reshard_after_forward=True) for layer in body.layers[:-1]]
    # `body.py` calls the last layer's modules one by one: the unit is opened by the first of them.
    units.append(fully_shard(_modules_called(body.layers[-1]), mesh=mesh, reshard_after_forward=True)[0])
    whole = {p for p in model.parameters() if not is_shared_out(p)}
    root: Any = fully_shard(body, mesh=mesh, ignored_params=whole)
    for unit in units:
        # One denominator for the whole step: gradients are added up, not averaged.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    _open(root, mesh)


def _modules_called(layer: Any) -> list[nn.Module]:
    """What `body.py` calls of a decoder layer: attention's own modules, norms, MLP."""
    return [*layer.self_attn.children(), *(child for child in layer.children() if child is not layer.self_attn)]


@torch.no_grad()
def _open(body: Any, mesh: DeviceMesh) -> None:
    """One token through the body: FSDP makes one whole of its units where the body runs before any of them does."""
    layout = make_layout([1], torch.device(mesh.device_type))
    body(
        input_ids=torch.zeros_like(layout.positions_1T),
        position_ids=layout.positions_1T,
        use_cache=False,
        layout=layout,
    )
