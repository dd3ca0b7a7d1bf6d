"""Attention over groups of rows, with a backward pass of its own: what a CPU computes.

Owns which queries attend to which keys (`Piece`), and two ways to compute it. The plain one leaves the backward pass to
autograd, which keeps every group's padded float32 inputs and, going back, fills a buffer of zeros for each that was
cut out of the flat sequence. The other keeps the flat tensors alone, as they were projected, and rotates and gathers
them once more, those of all groups at once; it calls the kernels that torch's own attention calls on a CPU, so its
results are the same. Does not know how rows were grouped (`packed.py`) or what a labelled position is.

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

    @property
    def key_shape(self) -> torch.Size:
        """(B, P + S)."""
        rows, own = self.keys.gather_BL.shape
        return torch.Size((rows, self.num_shared + own))

    def key_places(self) -> torch.Tensor:
        """Where the keys of each row lie in the flat sequence, the prefix before its own, (B, P + S)."""
        own = self.keys.gather_BL
        return torch.cat([torch.arange(self.num_shared, device=own.device).expand(len(own), -1), own], dim=1)

    def keys_of(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Keys or values: the prefix, then each row's own, (B, H, P + S, D)."""
        own = self.keys.take(x_THD)
        if not self.num_shared:
            return own
        front = x_THD[: self.num_shared].transpose(0, 1)[None]
        return torch.cat([front.expand(len(own), -1, -1, -1), own], dim=2)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces whose queries are all N, each once, and what gathers all of their padded entries, one piece after another.

    `queries` and `keys` are flat places, those of the shared prefix before each row's own keys; `padding` says which
    entries of `queries` are padding, `back_N` at which of them each query lies.
    """

    each: tuple[Piece, ...]
    queries: torch.Tensor
    padding: torch.Tensor
    back_N: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(cls, each: Sequence[Piece], device: torch.device) -> Pieces:
        """Gather these on `device`."""
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        queries = torch.cat([nothing, *(piece.queries.gather_BL.flatten() for piece in each)])
        is_real = torch.cat([nothing.bool(), *(piece.queries.real_BL.flatten() for piece in each)])
        keys = torch.cat([nothing, *(piece.key_places().flatten() for piece in each)])
        real = is_real.nonzero()[:, 0]
        back_N = torch.empty_like(real)
        back_N[queries[real]] = real
        return cls(tuple(each), queries, (~is_real).nonzero()[:, 0], back_N, keys)

    def by_query(self, entries: torch.Tensor) -> list[torch.Tensor]:
        """Gathered queries, or what is like them, for each piece: (B, H, L, D), where they lie."""
        return _cut(entries, [piece.queries.gather_BL.shape for piece in self.each])

    def by_key(self, entries: torch.Tensor) -> list[torch.Tensor]:
        """Gathered keys, or what is like them, for each piece: (B, H, P + S, D), where they lie."""
        return _cut(entries, [piece.key_shape for piece in self.each])


def _cut(entries: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    parts = entries.split([shape.numel() for shape in shapes]) if shapes else ()
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _end_to_end(entries: torch.Tensor, parts_BHLD: Sequence[torch.Tensor]) -> torch.Tensor:
    """What was cut by piece as one again, like the gathered `entries` it belongs to."""
    return torch.cat([entries[:0], *(part.transpose(1, 2).flatten(0, 1) for part in parts_BHLD)])


def attend_in_groups(
    query_NHD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    pieces: Pieces,
    scaling: float,
    dropout: float = 0.0,
    rotations: tuple[Rotation, Rotation] | None = None,
) -> torch.Tensor:
    """What every query attends to, (N, H, D).

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
    pieces: Pieces,
    scaling: float,
    dropout: float = 0.0,
    rotations: tuple[Rotation, Rotation] | None = None,
) -> torch.Tensor:
    """The plain way: torch's attention for every group, its backward left to autograd."""
    if rotations is not None:
        query_NHD, key_THD = rotated(query_NHD, rotations[0]), rotated(key_THD, rotations[1])
    parts = []
    with torch.autocast("cpu", enabled=False):
        for piece in pieces.each:
            query, key, value = piece.queries.take(query_NHD), piece.keys_of(key_THD), piece.keys_of(value_THD)
            if query.device.type == "cpu":
                query, key, value = (x.to(_wide(query_NHD)) for x in (query, key, value))
            attended_BHLD = scaled_dot_product_attention(
                query, key, value, attn_mask=piece.mask(), dropout_p=dropout, is_causal=piece.is_square,
                scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
            )  # fmt: skip
            parts.append(attended_BHLD.to(query_NHD.dtype).transpose(1, 2)[piece.queries.real_BL])
    joined = torch.cat([query_NHD[:0], *parts])
    places = [piece.queries.flat for piece in pieces.each]
    return torch.empty_like(joined).index_copy(0, torch.cat(places), joined) if places else joined


class _Grouped(torch.autograd.Function):
    """Each piece through torch's CPU kernel; keeps the flat inputs, the flat output and the log-sums of soft-max."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHD: torch.Tensor,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        pieces: Pieces,
        scaling: float,
        pointwise: Pointwise,
        *turns: torch.Tensor,
    ) -> torch.Tensor:
        wide = _wide(query_NHD)
        turned_NHD, turned_THD = _turned(query_NHD, key_THD, pointwise, turns)
        query, key, value = _gathered(pieces, turned_NHD, turned_THD, value_THD, wide)
        found, log_sums = [], []
        for piece, *inputs in zip(
            pieces.each, pieces.by_query(query), pieces.by_key(key), pieces.by_key(value), strict=True
        ):
            attended, log_sum = _forward_kernel(
                *inputs, 0.0, piece.is_square, attn_mask=_bias(piece, wide), scale=scaling
            )
            found.append(attended)
            log_sums.append(log_sum)
        attended_NHD = _end_to_end(query, found).index_select(0, pieces.back_N).to(query_NHD.dtype)
        ctx.pieces, ctx.scaling, ctx.pointwise, ctx.num_turns = pieces, scaling, pointwise, len(turns)
        # As it is given on, in 16 bits under autocast: the output projection keeps the very same memory.
        ctx.save_for_backward(query_NHD, key_THD, value_THD, attended_NHD, *turns, *log_sums)
        return attended_NHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_NHD, key_THD, value_THD, attended_NHD, *others = ctx.saved_tensors
        turns, log_sums = others[: ctx.num_turns], others[ctx.num_turns :]
        turned_NHD, turned_THD = _turned(query_NHD, key_THD, ctx.pointwise, turns)
        pieces, wide = ctx.pieces, _wide(query_NHD)
        query, key, value = _gathered(pieces, turned_NHD, turned_THD, value_THD, wide)
        attended = attended_NHD.to(wide).index_select(0, pieces.queries)
        # Nothing comes back through padding.
        grad = grad_outputs[0].to(wide).index_select(0, pieces.queries).index_fill_(0, pieces.padding, 0.0)
        by_piece = zip(
            pieces.each, log_sums, pieces.by_query(grad), pieces.by_query(query), pieces.by_key(key),
            pieces.by_key(value), pieces.by_query(attended), strict=True,
        )  # fmt: skip
        found = [
            _backward_kernel(*inputs, log_sum, 0.0, piece.is_square, attn_mask=_bias(piece, wide), scale=ctx.scaling)
            for piece, log_sum, *inputs in by_piece
        ]
        grad_query = _end_to_end(query, [one[0] for one in found]).index_select(0, pieces.back_N)
        grad_key, grad_value = (
            _added_up(pieces, like, _end_to_end(entries, [one[place] for one in found]))
            for place, like, entries in ((1, key_THD, key), (2, value_THD, value))
        )
        if turns:
            grad_query = ctx.pointwise.rotated_back(grad_query, *turns[:2])
            grad_key = ctx.pointwise.rotated_back(grad_key, *turns[2:])
        grads = (grad_query.to(query_NHD.dtype), grad_key.to(key_THD.dtype), grad_value.to(value_THD.dtype))
        return (*grads, None, None, None, *(None for _ in turns))


def _turned(
    query_NHD: torch.Tensor, key_THD: torch.Tensor, pointwise: Pointwise, turns: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, rotated where `turns` (cosines and sines of the ones, then of the others) says by how much."""
    if not turns:
        return query_NHD, key_THD
    return pointwise.rotated(query_NHD, *turns[:2]), pointwise.rotated(key_THD, *turns[2:])


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gathered(
    pieces: Pieces, query_NHD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, wide: torch.dtype
) -> list[torch.Tensor]:
    """All pieces' padded queries, keys and values as the kernel takes them, as many heads of each."""
    shared_by = query_NHD.shape[1] // key_THD.shape[1]
    query = query_NHD.to(wide).index_select(0, pieces.queries)
    key, value = (x.to(wide).index_select(0, pieces.keys) for x in (key_THD, value_THD))
    if shared_by > 1:
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
    return [query, key, value]


def _bias(piece: Piece, wide: torch.dtype) -> torch.Tensor | None:
    """The mask as the kernel takes it: added to the scores."""
    seen = piece.mask()
    return None if seen is None else torch.zeros(seen.shape, dtype=wide).masked_fill_(~seen, float("-inf"))


def _added_up(pieces: Pieces, like_THD: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of keys or values in float32 or wider: each row's own belongs to it alone, the prefix's is summed.

    What padding gives is 0, or, as NaN is, its own row's.
    """
    heads = like_THD.shape[1]
    if grad.shape[1] != heads:
        grad = grad.unflatten(1, (heads, -1)).sum(2)
    return grad.new_zeros(like_THD.shape).index_add_(0, pieces.keys, grad)
