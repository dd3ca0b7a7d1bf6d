"""Attention over packed rows: many rows lie end to end in one sequence and none sees another.

Owns the layout of a packed micro-batch and the attention function transformers calls for it. Does not know
losses, optimizers or text. Rows are gathered into groups of similar length, padded inside the group only, and
attended causally: a padding position comes after every real one of its row, so no real position can see it and
the result equals attention over each row alone.

Rows that begin with the same tokens (a chat template's opening words) may share them: the prefix lies once at the front
and every row attends to its keys and values as to its own. What a prefix position computes depends on the prefix alone,
so the result is the same; its gradient is the sum over the rows.

Shapes: B rows of a group, L positions of a group, P tokens of the shared prefix, T tokens of the micro-batch, H heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

PACKED = "graftlm_packed"
MAX_PADDING_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows attended together. `gather_BL` finds each position in the flat sequence; `real_BL` marks no padding."""

    gather_BL: torch.Tensor
    real_BL: torch.Tensor
    flat_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each row of a packed micro-batch lies: its groups, and positions that restart in every row.

    The first `num_shared` tokens are the prefix all rows begin with; a row's own positions go on after them.
    """

    groups: tuple[RowGroup, ...]
    positions_1T: torch.Tensor
    num_shared: int = 0


def make_layout(lengths: Sequence[int], device: torch.device, num_shared: int = 0) -> PackedLayout:
    """Lay out rows of these own lengths (tokens) in the order in which they lie end to end, behind `num_shared`."""
    starts = [num_shared]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    groups: list[list[int]] = []
    filled = 0
    for row in order:
        filled += lengths[row]
        if groups and filled >= (1 - MAX_PADDING_SHARE) * lengths[row] * (len(groups[-1]) + 1):
            groups[-1].append(row)
        else:
            groups.append([row])
            filled = lengths[row]
    built = tuple(_group([(starts[row], lengths[row]) for row in group], device) for group in groups)
    own = [torch.arange(num_shared, num_shared + length) for length in lengths]
    positions = torch.cat([torch.arange(num_shared), *own]).to(device)
    return PackedLayout(built, positions[None], num_shared)


def _group(rows: list[tuple[int, int]], device: torch.device) -> RowGroup:
    longest = max(length for _, length in rows)
    offsets_L = torch.arange(longest)
    starts_B = torch.tensor([start for start, _ in rows])
    lengths_B = torch.tensor([length for _, length in rows])
    real_BL = offsets_L[None] < lengths_B[:, None]
    gather_BL = torch.where(real_BL, starts_B[:, None] + offsets_L[None], starts_B[:, None])
    return RowGroup(gather_BL.to(device), real_BL.to(device), gather_BL[real_BL].to(device))


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    layout: PackedLayout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row of `layout`; returns (1, T, H, D) as transformers expects.

    `attention_mask` is unused: transformers makes none for an attention it does not know.
    """
    del attention_mask
    heads_are_shared = key_1HTD.shape[1] != query_1HTD.shape[1]
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    num_shared = layout.num_shared
    shared = [x[:num_shared].transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD)]
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=heads_are_shared)
    parts = [attend(*shared, is_causal=True)[0].transpose(0, 1)] if num_shared else []
    for group in layout.groups:
        query, key, value = (x[group.gather_BL].transpose(1, 2) for x in (query_THD, key_THD, value_THD))
        if num_shared:
            key, value = (
                torch.cat([front.expand(len(own), -1, -1, -1), own], dim=2)
                for front, own in zip(shared[1:], (key, value), strict=True)
            )
            seen_LK = _prefix_and_past(query.shape[2], num_shared, query.device)
            attended_BHLD = attend(query, key, value, attn_mask=seen_LK)
        else:
            attended_BHLD = attend(query, key, value, is_causal=True)
        parts.append(attended_BHLD.transpose(1, 2)[group.real_BL])
    attended_NHD = torch.cat(parts)
    order_N = torch.cat([torch.arange(num_shared, device=attended_NHD.device), *(g.flat_N for g in layout.groups)])
    attended_THD = torch.empty_like(attended_NHD).index_copy(0, order_N, attended_NHD)
    return attended_THD[None], None


def _prefix_and_past(num_own: int, num_shared: int, device: torch.device) -> torch.Tensor:
    """Which of P + L keys each of L own positions sees: the whole prefix and its own row up to itself."""
    return torch.ones(num_own, num_shared + num_own, dtype=torch.bool, device=device).tril(num_shared)


def attend_packed(model: PreTrainedModel) -> None:
    """Make `model` attend over packed rows; its forward then needs `layout=`."""
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


def attend_plain(model: PreTrainedModel) -> None:
    """Make `model` attend as transformers does, for generation."""
    model.set_attn_implementation("sdpa")
