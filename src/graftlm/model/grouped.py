"""Attention over groups of rows, with a backward pass of its own: what a CPU computes.

Owns which queries attend to which keys (`Piece`), and two ways to compute it. The plain one leaves the backward pass to
autograd, which keeps every group's padded float32 inputs and, going back, fills a buffer of zeros for each that was
cut out of the flat sequence. The other keeps the flat tensors alone, as they were projected, rotates and gathers them
once more, and writes gradients where they belong; it calls the kernels that torch's own attention calls on a CPU, so
its results are the same. Does not know how rows were grouped (`packed.py`) or what a labelled position is.

Shapes: B rows of a group, L queries and S keys of a row, both padded to the longest, P tokens of the shared prefix, N
queries and T keys in all, H heads (of queries, or fewer of keys), D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from graftlm.model.pointwise import AS_WRITTEN, Pointwise
from graftlm.model.rotary import Rotation, rotated

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Places:
    """Where a group's padded entries lie in the flat sequence: `gather_BL` finds each, `real_BL` marks no padding.

    `flat` is `gather_BL[real_BL]`. Padding points at an entry of its own row.
    """

    gather_BL: torch.Tensor
    real_BL: torch.Tensor
    flat: torch.Tensor

    @classmethod
    def of(cls, gather_BL: torch.Tensor, real_BL: torch.Tensor, device: torch.device) -> Places:
        """Put on `device`."""
        return cls(gather_BL.to(device), real_BL.to(device), gather_BL[real_BL].to(device))

    def take(self, x_THD: torch.Tensor) -> torch.Tensor:
        """The group's entries, (B, H, L, D)."""
        return x_THD[self.gather_BL].transpose(1, 2)

    def put(self, into_THD: torch.Tensor, x_BHLD: torch.Tensor) -> None:
        """Write what is not padding where it belongs."""
        into_THD[self.flat] = x_BHLD.transpose(1, 2)[self.real_BL]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that attend together to the shared prefix (`num_shared` keys, 0 for none) and to the keys of their rows.

    `seen` marks the P + S keys each query sees, (B, 1, L, P + S); None is causal: the prefix, and every key up to the
    query's own.
    """

    queries: Places
    keys: Places
    num_shared: int = 0
    seen: torch.Tensor | None = None

    @property
    def is_square(self) -> bool:
        """Whether query and key of a position have the same number, so that a kernel needs no mask."""
        return self.seen is None and not self.num_shared

    def mask(self) -> torch.Tensor | None:
        """What each query sees, as a mask; None where `is_square`."""
        if self.seen is not None or not self.num_shared:
            return self.seen
        length = self.queries.gather_BL.shape[1]
        here = self.queries.flat.device
        return torch.ones(length, self.num_shared + length, dtype=torch.bool, device=here).tril(self.num_shared)

    def keys_of(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Keys or values: the prefix, then each row's own, (B, H, P + S, D)."""
        own = self.keys.take(x_THD)
        if not self.num_shared:
            return own
        front = x_THD[: self.num_shared].transpose(0, 1)[None]
        return torch.cat([front.expand(len(own), -1, -1, -1), own], dim=2)


def attend_in_groups(
    query_NHD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    pieces: Sequence[Piece],
    scaling: float,
    dropout: float = 0.0,
    rotations: tuple[Rotation, Rotation] | None = None,
) -> torch.Tensor:
    """What every query attends to, (N, H, D); the pieces' queries are all N, each once.

    `rotations` are those of the queries and of the keys, where they are still to be rotated. On a CPU in float32 or
    wider whatever autocast says: more exact than torch's kernel for 16 bits, and on rows of dialogues faster
    (docs/log.md).
    """
    if query_NHD.device.type == "cpu" and not dropout:
        turns = () if rotations is None else (*rotations[0][:2], *rotations[1][:2])
        pointwise = AS_WRITTEN if rotations is None else rotations[0].pointwise
        return _Grouped.apply(query_NHD, key_THD, value_THD, pieces, scaling, pointwise, *turns)
    return attend_by_autograd(query_NHD, key_THD, value_THD, pieces, scaling, dropout, rotations)


def attend_by_autograd(
    query_NHD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    pieces: Sequence[Piece],
    scaling: float,
    dropout: float = 0.0,
    rotations: tuple[Rotation, Rotation] | None = None,
) -> torch.Tensor:
    """The plain way: torch's attention for every group, its backward left to autograd."""
    if rotations is not None:
        query_NHD, key_THD = rotated(query_NHD, rotations[0]), rotated(key_THD, rotations[1])
    parts = []
    with torch.autocast("cpu", enabled=False):
        for piece in pieces:
            query, key, value = piece.queries.take(query_NHD), piece.keys_of(key_THD), piece.keys_of(value_THD)
            if query.device.type == "cpu":
                query, key, value = (x.to(_wide(query_NHD)) for x in (query, key, value))
            attended_BHLD = scaled_dot_product_attention(
                query, key, value, attn_mask=piece.mask(), dropout_p=dropout, is_causal=piece.is_square,
                scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
            )  # fmt: skip
            parts.append(attended_BHLD.to(query_NHD.dtype).transpose(1, 2)[piece.queries.real_BL])
    joined = torch.cat([query_NHD[:0], *parts])
    places = [piece.queries.flat for piece in pieces]
    return torch.empty_like(joined).index_copy(0, torch.cat(places), joined) if places else joined


class _Grouped(torch.autograd.Function):
    """Each piece through torch's CPU kernel; keeps the flat inputs, the flat output and the log-sums of soft-max."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHD: torch.Tensor,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        pieces: Sequence[Piece],
        scaling: float,
        pointwise: Pointwise,
        *turns: torch.Tensor,
    ) -> torch.Tensor:
        wide = _wide(query_NHD)
        turned_NHD, turned_THD = _turned(query_NHD, key_THD, pointwise, turns)
        attended_NHD = torch.empty_like(query_NHD, dtype=wide, memory_format=torch.contiguous_format)
        log_sums = []
        for piece in pieces:
            inputs = _inputs(piece, turned_NHD, turned_THD, value_THD, wide)
            attended, log_sum = _forward_kernel(
                *inputs, 0.0, piece.is_square, attn_mask=_bias(piece, wide), scale=scaling
            )
            piece.queries.put(attended_NHD, attended)
            log_sums.append(log_sum)
        ctx.pieces, ctx.scaling, ctx.pointwise, ctx.num_turns = pieces, scaling, pointwise, len(turns)
        ctx.save_for_backward(query_NHD, key_THD, value_THD, attended_NHD, *turns, *log_sums)
        return attended_NHD.to(turned_NHD.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_NHD, key_THD, value_THD, attended_NHD, *others = ctx.saved_tensors
        turns, log_sums = others[: ctx.num_turns], others[ctx.num_turns :]
        turned_NHD, turned_THD = _turned(query_NHD, key_THD, ctx.pointwise, turns)
        wide = attended_NHD.dtype
        grad_NHD = grad_outputs[0].to(wide)
        grad_query, grad_key, grad_value = (x.new_zeros(x.shape, dtype=wide) for x in (query_NHD, key_THD, value_THD))
        for piece, log_sum in zip(ctx.pieces, log_sums, strict=True):
            inputs = _inputs(piece, turned_NHD, turned_THD, value_THD, wide)
            # Nothing comes back through padding.
            grad = piece.queries.take(grad_NHD).masked_fill(~piece.queries.real_BL[:, None, :, None], 0.0)
            query, key, value = _backward_kernel(
                grad, *inputs, piece.queries.take(attended_NHD), log_sum, 0.0, piece.is_square,
                attn_mask=_bias(piece, wide), scale=ctx.scaling,
            )  # fmt: skip
            piece.queries.put(grad_query, query)
            for total, part in ((grad_key, key), (grad_value, value)):
                _put_keys(piece, total, part)
        if turns:
            grad_query = ctx.pointwise.rotated_back(grad_query, *turns[:2])
            grad_key = ctx.pointwise.rotated_back(grad_key, *turns[2:])
        found = (grad_query.to(query_NHD.dtype), grad_key.to(key_THD.dtype), grad_value.to(value_THD.dtype))
        return (*found, None, None, None, *(None for _ in turns))


def _turned(
    query_NHD: torch.Tensor, key_THD: torch.Tensor, pointwise: Pointwise, turns: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, rotated where `turns` (cosines and sines of the ones, then of the others) says by how much."""
    if not turns:
        return query_NHD, key_THD
    return pointwise.rotated(query_NHD, *turns[:2]), pointwise.rotated(key_THD, *turns[2:])


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _inputs(
    piece: Piece, query_NHD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, wide: torch.dtype
) -> list[torch.Tensor]:
    """A piece's queries, keys and values as the kernel takes them, as many heads of each."""
    query = piece.queries.take(query_NHD).to(wide)
    shared_by = query_NHD.shape[1] // key_THD.shape[1]
    key, value = (piece.keys_of(x).to(wide) for x in (key_THD, value_THD))
    if shared_by > 1:
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
    return [query, key, value]


def _bias(piece: Piece, wide: torch.dtype) -> torch.Tensor | None:
    """The mask as the kernel takes it: added to the scores."""
    seen = piece.mask()
    return None if seen is None else torch.zeros(seen.shape, dtype=wide).masked_fill_(~seen, float("-inf"))


def _put_keys(piece: Piece, total_THD: torch.Tensor, part_BHSD: torch.Tensor) -> None:
    """Write the gradient of a piece's keys or values: each row's own belongs to it alone, the prefix's is summed."""
    heads = total_THD.shape[1]
    if part_BHSD.shape[1] != heads:
        part_BHSD = part_BHSD.unflatten(1, (heads, -1)).sum(2)
    piece.keys.put(total_THD, part_BHSD[:, :, piece.num_shared :])
    if piece.num_shared:
        total_THD[: piece.num_shared] += part_BHSD[:, :, : piece.num_shared].sum(0).transpose(0, 1)
