"""Attention over packed rows: many rows lie end to end in one sequence and none sees another.

Owns the layout of a packed micro-batch and the attention function transformers calls for it. Does not know
losses, optimizers or text. Rows are gathered into groups of similar length, padded inside the group only, and
attended causally: a padding position comes after every real one of its row, so no real position can see it and
the result equals attention over each row alone.

Rows that begin with the same tokens (a chat template's opening words) may share them: the prefix lies once at the front
and every row attends to its keys and values as to its own. What a prefix position computes depends on the prefix alone,
so the result is the same; its gradient is the sum over the rows.

Where the last layer is computed at labelled positions only (`body.py`), their queries alone attend: to the keys of the
whole row, as causality has it.

On GPUs that have it, torch's variable-length kernel takes the groups' place (`varlen.py`) where all positions attend.

Shapes: B rows of a group, L positions of a group, M labelled positions of a group's row, P tokens of the shared prefix,
T tokens and N labelled positions of the micro-batch, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from graftlm.errors import UserError
from graftlm.model.grouped import Piece, Pieces, Places, attend_in_groups
from graftlm.model.rotary import Rotation, rotated
from graftlm.model.varlen import Bounds, make_bounds, runs_varlen, varlen_attention

PACKED = "graftlm_packed"
MAX_PADDING_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each row of a packed micro-batch lies: its groups, its bounds, and positions that restart in every row.

    `whole` is attended at all positions, `labelled` (groups that have any) at the labelled ones. The first `num_shared`
    tokens are the prefix all rows begin with, attended as a row of its own before the groups; a row's own positions go
    on after them. `ends_at_N` are the positions the last layer is computed at; None means all.
    """

    whole: Pieces
    labelled: Pieces
    bounds: Bounds
    positions_1T: torch.Tensor
    num_shared: int = 0
    ends_at_N: torch.Tensor | None = None

    @property
    def groups(self) -> tuple[Piece, ...]:
        """Groups of rows at all positions, without the prefix."""
        return self.whole.each[1:] if self.num_shared else self.whole.each


def make_layout(
    lengths: Sequence[int], device: torch.device, num_shared: int = 0, ends_at_N: torch.Tensor | None = None
) -> PackedLayout:
    """Lay out rows of these own lengths (tokens) in the order in which they lie end to end, behind `num_shared`.

    `ends_at_N` are rising positions, none in the prefix, to which alone the last layer is to be computed.
    """
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
    places = [[(starts[row], lengths[row]) for row in group] for group in groups]
    pieces = [_pieces(group, device, num_shared, ends_at_N) for group in places]
    front = (_pieces([(0, num_shared)], device, 0, None)[0],) if num_shared else ()
    own = [torch.arange(num_shared, num_shared + length) for length in lengths]
    positions = torch.cat([torch.arange(num_shared), *own]).to(device)
    bounds = make_bounds(lengths, num_shared, device)
    return PackedLayout(
        Pieces.of([*front, *(whole for whole, _ in pieces)], device),
        Pieces.of([labelled for _, labelled in pieces if labelled is not None], device),
        bounds, positions[None], num_shared, None if ends_at_N is None else ends_at_N.to(device),
    )  # fmt: skip


def _pieces(
    rows: list[tuple[int, int]], device: torch.device, num_shared: int, ends_at_N: torch.Tensor | None
) -> tuple[Piece, Piece | None]:
    """A group of rows (start, length), attended in full and at its labelled positions alone; None where it has none."""
    longest = max(length for _, length in rows)
    offsets_L = torch.arange(longest)
    starts_B = torch.tensor([start for start, _ in rows])
    lengths_B = torch.tensor([length for _, length in rows])
    real_BL = offsets_L[None] < lengths_B[:, None]
    own = Places.of(torch.where(real_BL, starts_B[:, None] + offsets_L[None], starts_B[:, None]), real_BL, device)
    whole = Piece(own, own, num_shared)
    if ends_at_N is None:
        return whole, None
    first_B, end_B = (torch.searchsorted(ends_at_N, at_B) for at_B in (starts_B, starts_B + lengths_B))
    offsets_M = torch.arange(int((end_B - first_B).max()))
    if not len(offsets_M):
        return whole, None
    gather_BM = first_B[:, None] + offsets_M[None]
    real_BM = gather_BM < end_B[:, None]
    # A query of padding is its row's first labelled one (any, where it has none) and sees the row's first key, so that
    # no soft-max is over nothing.
    gather_BM = torch.where(real_BM, gather_BM, first_B[:, None].clamp(max=len(ends_at_N) - 1))
    own_BM = torch.where(real_BM, ends_at_N[gather_BM] - starts_B[:, None], 0)
    seen_BMK = torch.arange(num_shared + longest) <= num_shared + own_BM[..., None]
    return whole, Piece(Places.of(gather_BM, real_BM, device), own, num_shared, seen_BMK[:, None].to(device))


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
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    computed = _computed(query_THD)
    if not dropout and runs_varlen(query_THD.device, computed, query_THD.shape[2]):
        query_THD, key_THD, value_THD = (x.to(computed) for x in (query_THD, key_THD, value_THD))
        return varlen_attention(query_THD, key_THD, value_THD, layout.bounds, scaling)[None], None
    return attend_in_groups(query_THD, key_THD, value_THD, layout.whole, scaling, dropout)[None], None


def attend_rotating(
    query_NHD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    rotation: Rotation,
    layout: PackedLayout,
    scaling: float,
    *,
    at_labels: bool,
) -> torch.Tensor:
    """What `packed_attention` gives of queries and keys that `rotation` (of all T positions) is still to turn, (N, H,
    D); `at_labels`: of queries at `layout.ends_at_N` alone."""
    if at_labels:
        assert layout.ends_at_N is not None
        rotations = rotation.at(layout.ends_at_N), rotation
        return attend_in_groups(query_NHD, key_THD, value_THD, layout.labelled, scaling, rotations=rotations)
    computed = _computed(query_NHD)
    if runs_varlen(query_NHD.device, computed, query_NHD.shape[2]):
        query, key, value = (
            x.to(computed) for x in (rotated(query_NHD, rotation), rotated(key_THD, rotation), value_THD)
        )
        return varlen_attention(query, key, value, layout.bounds, scaling)
    return attend_in_groups(query_NHD, key_THD, value_THD, layout.whole, scaling, rotations=(rotation, rotation))


def _computed(x: torch.Tensor) -> torch.dtype:
    """What products of x are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attend_packed(model: PreTrainedModel) -> None:
    """Make `model` attend over packed rows; its forward then needs `layout=`."""
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


def attention_in_words(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """How `packed_attention` attends in `model` there, computing in `dtype`: for the log."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not getattr(config, "attention_dropout", 0.0) and runs_varlen(device, dtype, head_size):
        return "torch's variable-length kernel"
    return "groups of rows of like length"


def refuse_longer_rows(model: PreTrainedModel, longest: int) -> None:
    """Raise UserError where a row of `longest` tokens passes the model's sliding window, which packed rows ignore.

    Up to its length a window hides nothing, so that attention without one is the same.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise UserError(
            f"A row has {longest:,} tokens, and the model's attention reaches {window:,} back (sliding_window): rows "
            "longer than that cannot be trained on.",
            f"Set data.max_tokens={window} or less.",
        )


def attends_packed(model: PreTrainedModel) -> bool:
    """Whether `attend_packed` was the last to be asked: otherwise `layout=` is passed over in silence, and packed rows
    see one another."""
    return model.config._attn_implementation == PACKED


def attend_plain(model: PreTrainedModel) -> None:
    """Make `model` attend as transformers does, for generation."""
    model.set_attn_implementation("sdpa")
