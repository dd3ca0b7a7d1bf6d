"""Hidden states at the positions a loss is taken at: the body of a Llama-like decoder, run no further than needed.

Owns the last layer's short cut. What a position computes in the last layer is read by no other position, so only
labelled ones need its query, attention, output and MLP, and the final norm; keys and values are needed of all. Losses
and gradients are those of the whole layer (`layout.ends_at_N` None computes it). Does not know losses or how rows were
packed.

Shapes: T tokens and N labelled positions of the micro-batch, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from graftlm.model.attention import attend
from graftlm.model.causal import body_of
from graftlm.model.packed import PackedLayout, attends_packed


def labelled_hidden_states(
    model: torch.nn.Module, ids_1T: torch.Tensor, layout: PackedLayout, labelled_N: torch.Tensor
) -> torch.Tensor:
    """The body's output (after its last norm) at `labelled_N`, (N, H), adapters included."""
    body = body_of(model)
    assert attends_packed(body), "rows would see those before them: attend_packed first"
    if layout.ends_at_N is None:
        output = body(input_ids=ids_1T, position_ids=layout.positions_1T, use_cache=False, layout=layout)
        return output.last_hidden_state[0, labelled_N]
    hidden_1TH = body.embed_tokens(ids_1T)
    rotary = body.rotary_emb(hidden_1TH, position_ids=layout.positions_1T)
    for layer in body.layers[:-1]:
        hidden_1TH = layer(
            hidden_1TH, attention_mask=None, position_embeddings=rotary, position_ids=layout.positions_1T, layout=layout
        )
    return body.norm(_last_layer(body.layers[-1], hidden_1TH, rotary, layout))[0]


def _last_layer(
    layer: Any, hidden_1TH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], layout: PackedLayout
) -> torch.Tensor:
    """A decoder layer's output at `layout.ends_at_N`, (1, N, H). Every module is called: hooks and adapters see it."""
    assert layout.ends_at_N is not None
    attended_1NH = attend(layer.self_attn, layer.input_layernorm(hidden_1TH), rotary, layout, at_labels=True)
    hidden_1NH = hidden_1TH.index_select(1, layout.ends_at_N) + attended_1NH
    return hidden_1NH + layer.mlp(layer.post_attention_layernorm(hidden_1NH))
