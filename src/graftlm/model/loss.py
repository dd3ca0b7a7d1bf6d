"""The response loss: cross-entropy summed over labelled positions only.

Owns head and loss. Hidden states are picked at labelled positions before the head, and the head runs in chunks
whose gradient is taken at once, so a matrix of logits over the whole micro-batch never exists. Does not know
how rows were packed or what will be done with the gradient.

Shapes: N labelled positions, C positions of a chunk, V rows of the head, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.device import wants_few_shapes
from graftlm.model.rows import joined

# By device. Larger chunks make better products and hold more memory; soft-max and sums, in float32, go through a chunk
# in blocks that stay in a processor's cache (measured: docs/log.md). A GPU has no use for blocks, and its products want
# a thousand positions: an estimate, not measured.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
LIKE_ROWS = 32
"""Where few shapes are wanted a chunk has a multiple of so many positions, the last of them zeros."""


def chunk_rows(num_vocab_rows: int, logit_bytes: int, device_type: str) -> int:
    """Labelled positions per chunk, so that a chunk of logits of so many bytes each stays near `CHUNK_BYTES`."""
    return max(16, CHUNK_BYTES[device_type] // (logit_bytes * num_vocab_rows))


def block_rows(num_columns: int, device_type: str) -> int:
    """Rows of so many float32 columns to a block of `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES[device_type] // (4 * num_columns))


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, with gradients computed chunk by chunk in the forward.

    `expected_grad` is the factor backward will be called with (loss scale over number of labels). Taking it into
    the chunk keeps small probabilities alive in fp16: without it they would be flushed to zero before scaling.
    Gradients that were added to others in forward are bound to it.
    Source: the chunked fusion is that of Liger-Kernel, arXiv 2410.10989.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        compute_dtype: torch.dtype,
        expected_grad: float,
        adds_to_grads: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        needs_hidden, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        wide = torch.promote_types(compute_dtype, torch.float32)
        hidden, weight = hidden_NH.to(compute_dtype), joined(weights).to(compute_dtype)
        lying, made = _gradients_of(weights, needs_weights, wide, adds_to_grads)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Rounded as backward's own factor will be, so that the two compare equal.
        expected = torch.tensor(expected_grad, dtype=wide, device=hidden.device)
        size, filled = chunks_of(len(hidden), len(weight), hidden.itemsize, hidden.device.type)
        if filled > len(hidden):
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, filled - len(hidden)))
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        logits_CV = hidden.new_empty(size, len(weight))
        own_columns = logits_CV.split([len(part) for part in weights], dim=1)
        for start in range(0, len(hidden), size or 1):
            hidden_CH, targets_C = hidden[start : start + size], targets_N[start : start + size]
            torch.mm(hidden_CH, weight.T, out=logits_CV)
            total += _loss_and_gradient_(logits_CV[: len(targets_C)], targets_C, expected, wide)
            grad_CV = logits_CV
            grad_CV[len(targets_C) :] = 0.0  # of the zeros the last chunk is filled up with
            if grad_hidden is not None:
                torch.mm(grad_CV, weight, out=grad_hidden[start : start + size])
            for grad_CR, lying_RH, made_RH in zip(own_columns, lying, made, strict=True):
                if lying_RH is not None:
                    _add_product_(lying_RH, grad_CR.T, hidden_CH, is_first=False)
                elif made_RH is not None:
                    _add_product_(made_RH, grad_CR.T, hidden_CH, is_first=start == 0)
        if not len(hidden):
            made = [None if gradient is None else gradient.zero_() for gradient in made]
        ctx.expected, ctx.hidden_dtype = expected, hidden_NH.dtype
        ctx.is_bound = any(gradient is not None for gradient in lying)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[: len(targets_N)], *made)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.saved_tensors
        factor = (grad_outputs[0] / ctx.expected).item()
        if factor != 1.0:
            if ctx.is_bound:
                raise RuntimeError("backward's factor is not the one by which gradients were added up in forward")
            gradients = tuple(None if gradient is None else gradient * factor for gradient in gradients)
        grad_hidden, *made = gradients
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype)
        # Not in the weights' dtype: one held in 16 bits may have a gradient in 32 (`model/halves.py`). Autograd knows.
        return (grad_hidden, None, None, None, None, *made)


def _gradients_of(
    weights: Sequence[torch.Tensor], needed: Sequence[bool], wide: torch.dtype, adds_to_grads: bool
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """For each part of the head the gradient that lies there and is added to, or room for one; neither for a frozen."""
    lying: list[torch.Tensor | None] = [None] * len(weights)
    made = list(lying)
    for place, (weight, is_needed) in enumerate(zip(weights, needed, strict=True)):
        if is_needed and adds_to_grads and weight.grad is not None and weight.grad.dtype == wide:
            lying[place] = weight.grad
        elif is_needed:
            made[place] = torch.empty_like(weight, dtype=wide)
    return lying, made


def chunks_of(count: int, num_vocab_rows: int, logit_bytes: int, device_type: str) -> tuple[int, int]:
    """Positions of each of the chunks that share out `count` evenly, as short products are slow ones; and of all
    chunks, with the zeros that the last is filled up with."""
    most = chunk_rows(num_vocab_rows, logit_bytes, device_type)
    size = -(-count // max(1, -(-count // most)))
    if wants_few_shapes(device_type == "cpu", logit_bytes < torch.float32.itemsize):
        size = -(-size // LIKE_ROWS) * LIKE_ROWS
    return size, count + (-count % size if size else 0)


def _loss_and_gradient_(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, factor: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """The chunk's summed cross-entropy in `wide`; its logits are overwritten by their gradient times `factor`."""
    total = torch.zeros((), dtype=wide, device=logits_CV.device)
    size = block_rows(logits_CV.shape[1], logits_CV.device.type)
    for logits_RV, targets_R1 in zip(logits_CV.split(size), targets_C[:, None].split(size), strict=True):
        # One exponential of each logit: loss, soft-max and gradient are all made from it, in place.
        shares_RV = logits_RV.to(wide)
        shares_RV -= shares_RV.amax(-1, keepdim=True)
        picked_R1 = shares_RV.gather(1, targets_R1)
        sums_R1 = shares_RV.exp_().sum(-1, keepdim=True)
        total += (sums_R1.log() - picked_R1).sum()
        grad_RV = shares_RV.mul_(factor / sums_R1)
        grad_RV.scatter_add_(1, targets_R1, -factor.expand_as(targets_R1))
        if grad_RV is not logits_RV:
            logits_RV.copy_(grad_RV)
    return total


def _add_product_(total_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor, is_first: bool) -> None:
    """Add `left @ right` onto a float32 or float64 sum; the first overwrites it.

    A product rounded to 16 bits is added block by block: whole, it and its float32 twin would go through memory, which
    on a CPU takes longer than the product.
    """
    if total_VH.dtype == left_VC.dtype:
        total_VH.addmm_(left_VC, right_CH, beta=0 if is_first else 1)
        return
    size = block_rows(total_VH.shape[1], total_VH.device.type)
    for total_RH, left_RC in zip(total_VH.split(size), left_VC.split(size), strict=True):
        product_RH = left_RC @ right_CH
        total_RH.copy_(product_RH) if is_first else total_RH.add_(product_RH)


def linear_cross_entropy_sum(
    hidden_NH: torch.Tensor,
    head_rows: Sequence[torch.Tensor],
    targets_N: torch.Tensor,
    compute_dtype: torch.dtype,
    expected_grad: float = 1.0,
    *,
    adds_to_grads: bool = False,
) -> torch.Tensor:
    """Summed cross-entropy (nats) of the head's logits against `targets_N`; zero when there is no target.

    The head's matrix VH comes in parts, one above the other; a part that does not learn costs no gradient.
    Matrix products run in `compute_dtype`, soft-max and sum in float32 or wider. Backward may be called once.
    `adds_to_grads`: a part's gradient is added in forward to the wide one that lies at it already, as a second one
    would take as much memory again; backward must follow, with just `expected_grad`. Raises RuntimeError there if not.
    """
    adds_to_grads = adds_to_grads and torch.is_grad_enabled()  # else no backward can follow
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return _LinearCrossEntropySum.apply(
            hidden_NH, targets_N, compute_dtype, expected_grad, adds_to_grads, *head_rows
        )


@torch.no_grad()
def target_losses(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, compute_dtype: torch.dtype
) -> torch.Tensor:
    """Cross-entropy (nats) of each labelled position, (N,) float32 or wider; for held-out readings."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    hidden, weight = hidden_NH.to(compute_dtype), weight_VH.to(compute_dtype)
    size = chunk_rows(len(weight), wide.itemsize, hidden.device.type)
    losses = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            logits_CV = (hidden[start : start + size] @ weight.T).to(wide)
            picked_C = logits_CV.gather(1, targets_N[start : start + size, None])[:, 0]
            losses.append(logits_CV.logsumexp(-1) - picked_C)
    return torch.cat(losses) if losses else torch.zeros(0, dtype=wide, device=hidden.device)
