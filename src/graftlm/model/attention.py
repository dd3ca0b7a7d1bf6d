"""The attention layer of a Llama-like decoder over packed rows, at all positions or at the labelled ones alone.

Owns the way from a layer's normed input to what its heads attend to. Every map and norm of the layer is called, so that
hooks and adapters see it. Does not know which layer it is or how rows were packed.

Shapes: T tokens of the micro-batch, N positions of queries, H hidden size, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftlm.model.packed import PackedLayout, attend_rotating
from graftlm.model.pointwise import AS_WRITTEN, Pointwise
from graftlm.model.rotary import Rotation
from graftlm.model.rounded import rounded_once

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")


def attend(
    layer: Any, normed_1TH: Tensor, rotary: tuple[Tensor, Tensor], layout: PackedLayout, *, at_labels: bool
) -> Tensor:
    """The output of the attention layer, (1, N, H); `rotary` are cosines and sines, (1, T, D) each."""
    maps = layer.q_proj, layer.k_proj, layer.v_proj
    if at_labels:
        assert layout.ends_at_N is not None
        for_query = normed_1TH.index_select(1, layout.ends_at_N)
        for_key, for_value = rounded_once(normed_1TH, maps[1:])
    else:
        for_query, for_key, for_value = rounded_once(normed_1TH, maps)
    query, key, value = (_heads(layer, name, x)[0] for name, x in (("q", for_query), ("k", for_key), ("v", for_value)))
    rotation = Rotation(rotary[0][0], rotary[1][0], getattr(layer, "pointwise", AS_WRITTEN))
    attended_NHD = attend_rotating(query, key, value, rotation, layout, layer.scaling, at_labels=at_labels)
    return layer.o_proj(attended_NHD.flatten(1)[None])


def _heads(layer: Any, name: str, normed_1TH: Tensor) -> Tensor:
    """Queries, keys or values by head, (1, T, heads, D), before they are rotated; normed by head where a model does."""
    projected = getattr(layer, f"{name}_proj")(normed_1TH)
    # Not -1: of no labelled position at all it could be any number.
    by_head = projected.unflatten(-1, (projected.shape[-1] // layer.head_dim, layer.head_dim))
    norm = getattr(layer, f"{name}_norm", None)
    return by_head if norm is None else norm(by_head)


class PackedAttention(nn.Module):
    """Stands for a decoder's attention layer while packed rows are trained: the same maps and norms, `attend`."""

    def __init__(self, own: Any, pointwise: Pointwise) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.pointwise = own.head_dim, own.scaling, pointwise
        for name in (*MAPS, *HEAD_NORMS):
            if hasattr(own, name):
                setattr(self, name, getattr(own, name))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: PackedLayout, **_: Any
    ) -> tuple[Tensor, None]:
        """The layer's output, and no weights of attention."""
        return attend(self, hidden_states, position_embeddings, layout, at_labels=False), None

    def hand_on(self, own: Any) -> None:
        """Give maps and norms, adapters on them included, to the model's own layer."""
        for name, module in self.named_children():
            setattr(own, name, module)
