"""Attention over packed rows in one call of torch's variable-length kernel: GPUs of compute capability 8.0 on, 16 bits.

Owns where each row's queries and keys begin, whether the kernel can run, and the call. Rows that share a prefix see its
keys before their own; the kernel's causal mask ends at the lower right, so that a row's first own position sees the
whole prefix and itself. `packed.py` computes the same by groups of rows wherever the kernel cannot: the reference.

Shapes: R rows, the prefix being one more where there is one, S keys of all rows with the prefix in each, T tokens of
the micro-batch, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

CAUSAL = (-1, 0)  # everything before, nothing after
SINCE = (8, 0)  # compute capability. Source: torch.nn.attention.varlen, which calls FlashAttention 2
LARGEST_HEAD = 256  # entries. Source: as above


@dataclass(frozen=True, slots=True)
class Bounds:
    """Row r's queries lie from `queries_R1[r]` to before `queries_R1[r + 1]` of the T tokens; its keys likewise of S.

    `gather_S` finds every key among the tokens; None where keys are the tokens in their order.
    """

    queries_R1: torch.Tensor
    keys_R1: torch.Tensor
    most_queries: int
    most_keys: int
    gather_S: torch.Tensor | None


def make_bounds(lengths: Sequence[int], num_shared: int, device: torch.device) -> Bounds:
    """Of rows with these own lengths (tokens), end to end behind `num_shared` tokens that each begins with."""
    front = [num_shared] if num_shared else []
    queries, keys = [*front, *lengths], [*front, *(num_shared + length for length in lengths)]
    gather = None
    if num_shared:
        prefix = torch.arange(num_shared)
        own = torch.arange(num_shared, num_shared + sum(lengths)).split(list(lengths))
        gather = torch.cat([prefix, *(torch.cat([prefix, row]) for row in own)]).to(device)
    queries_R1, keys_R1 = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (queries, keys)
    )
    return Bounds(queries_R1, keys_R1, max(queries), max(keys), gather)


def runs_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's kernel takes tensors of this kind there."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= SINCE
        and dtype in (torch.float16, torch.bfloat16)
        and head_size <= LARGEST_HEAD
        and head_size % 8 == 0
    )


def varlen_attention(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    bounds: Bounds,
    scaling: float,
    kernel: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Causal attention inside each row, (T, H, D); `kernel` is torch's where none is given."""
    if kernel is None:
        from torch.nn.attention.varlen import varlen_attn as kernel  # where it lies, nothing else needs it
    if bounds.gather_S is not None:
        key_THD, value_THD = key_THD[bounds.gather_S], value_THD[bounds.gather_S]
    return kernel(
        query_THD, key_THD, value_THD, bounds.queries_R1, bounds.keys_R1, bounds.most_queries, bounds.most_keys,
        scale=scaling, window_size=CAUSAL, enable_gqa=key_THD.shape[1] != query_THD.shape[1],
    )  # fmt: skip
