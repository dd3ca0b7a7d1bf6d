"""The response loss: cross-entropy summed over labelled positions only.

Owns head and loss. Hidden states are picked at labelled positions before the head, and the head runs in chunks
whose gradient is taken at once, so a matrix of logits over the whole micro-batch never exists. Does not know
how rows were packed or what will be done with the gradient.

Shapes: N labelled positions, C positions of a chunk, V rows of the head, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from graftlm.model.rows import joined

# By device: on a CPU larger chunks lose more in the soft-max, which leaves the cache, than products gain (docs/log.md).
# A GPU's products want a thousand positions: an estimate, not measured.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


def chunk_rows(num_vocab_rows: int, device_type: str) -> int:
    """Labelled positions per chunk, so that a chunk of float32 logits stays near `CHUNK_BYTES`."""
    return max(16, CHUNK_BYTES[device_type] // (4 * num_vocab_rows))


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, with gradients computed chunk by chunk in the forward.

    `expected_grad` is the factor backward will be called with (loss scale over number of labels). Taking it into
    the chunk keeps small probabilities alive in fp16: without it they would be flushed to zero before scaling.
    Source: the chunked fusion is that of Liger-Kernel, arXiv 2410.10989.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        compute_dtype: torch.dtype,
        expected_grad: float,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        needs_hidden, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        learned, ctx.rows_of = _learned_rows([len(weight) for weight in weights], needs_weights)
        needs_weight, weight_VH = any(needs_weights), joined(weights)
        wide = torch.promote_types(compute_dtype, torch.float32)
        hidden, weight = hidden_NH.to(compute_dtype), weight_VH.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight[learned], dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Rounded as backward's own factor will be, so that the two compare equal.
        expected = torch.tensor(expected_grad, dtype=wide, device=hidden.device)
        size = chunk_rows(len(weight), hidden.device.type)
        for start in range(0, len(hidden), size):
            hidden_CH = hidden[start : start + size]
            targets_C = targets_N[start : start + size]
            # One fused pass over the logits; soft-max, loss and gradient are all made from it.
            log_share_CV = (hidden_CH @ weight.T).to(wide).log_softmax(-1)
            total -= log_share_CV.gather(1, targets_C[:, None]).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad_CV = log_share_CV.exp_()
            grad_CV.scatter_add_(1, targets_C[:, None], grad_CV.new_full((len(targets_C), 1), -1.0))
            grad_CV = grad_CV.mul_(expected).to(compute_dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight, out=grad_hidden[start : start + size])
            if grad_weight is not None and wide == compute_dtype:
                grad_weight.addmm_(grad_CV[:, learned].T, hidden_CH)
            elif grad_weight is not None:
                grad_weight += grad_CV[:, learned].T @ hidden_CH
        ctx.expected = expected
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = (grad_outputs[0] / ctx.expected).item()
        hidden_dtype, weight_dtype = ctx.dtypes
        if factor != 1.0:
            grad_hidden = None if grad_hidden is None else grad_hidden * factor
            grad_weight = None if grad_weight is None else grad_weight * factor
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden_dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(weight_dtype)
        parts = (None if rows is None or grad_weight is None else grad_weight[rows] for rows in ctx.rows_of)
        return (grad_hidden, None, None, None, *parts)


def _learned_rows(counts: Sequence[int], needed: Sequence[bool]) -> tuple[slice, list[slice | None]]:
    """The span of rows that holds every part that learns, and where in that span each such part lies."""
    ends = list(accumulate(counts))
    spans = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
    learned = [span for span, is_needed in zip(spans, needed, strict=True) if is_needed]
    first, last = (learned[0][0], learned[-1][1]) if learned else (0, 0)
    rows_of = [
        slice(start - first, end - first) if is_needed else None
        for (start, end), is_needed in zip(spans, needed, strict=True)
    ]
    return slice(first, last), rows_of


def linear_cross_entropy_sum(
    hidden_NH: torch.Tensor,
    head_rows: Sequence[torch.Tensor],
    targets_N: torch.Tensor,
    compute_dtype: torch.dtype,
    expected_grad: float = 1.0,
) -> torch.Tensor:
    """Summed cross-entropy (nats) of the head's logits against `targets_N`; zero when there is no target.

    The head's matrix VH comes in parts, one above the other; a part that does not learn costs no gradient.
    Matrix products run in `compute_dtype`, soft-max and sum in float32 or wider. Backward may be called once.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return _LinearCrossEntropySum.apply(hidden_NH, targets_N, compute_dtype, expected_grad, *head_rows)


@torch.no_grad()
def target_losses(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, compute_dtype: torch.dtype
) -> torch.Tensor:
    """Cross-entropy (nats) of each labelled position, (N,) float32 or wider; for held-out readings."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    hidden, weight = hidden_NH.to(compute_dtype), weight_VH.to(compute_dtype)
    size = chunk_rows(len(weight), hidden.device.type)
    losses = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            logits_CV = (hidden[start : start + size] @ weight.T).to(wide)
            picked_C = logits_CV.gather(1, targets_N[start : start + size, None])[:, 0]
            losses.append(logits_CV.logsumexp(-1) - picked_C)
    return torch.cat(losses) if losses else torch.zeros(0, dtype=wide, device=hidden.device)
