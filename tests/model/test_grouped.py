"""Attention with a backward pass of its own equals torch's, left to autograd."""

import pytest
import torch

from graftlm.model.grouped import attend_by_autograd, attend_in_groups
from graftlm.model.packed import make_layout

LENGTHS = [5, 1, 9, 4, 9, 2]
NUM_SHARED = 7
WITHIN = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def results(attend, num_shared: int, kv_heads: int, dtype: torch.dtype, at_labels: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    ends_at_N = torch.tensor([2, 3, 4, 9, 13, 14, 27, 29]) + num_shared  # one row has none
    layout = make_layout(LENGTHS, torch.device("cpu"), num_shared, ends_at_N)
    pieces = layout.labelled if at_labels else layout.whole
    num_tokens = num_shared + sum(LENGTHS)
    num_queries = len(ends_at_N) if at_labels else num_tokens
    query = torch.randn(num_queries, 4, 8, dtype=torch.float64).to(dtype).requires_grad_()
    key, value = (torch.randn(num_tokens, kv_heads, 8, dtype=torch.float64).to(dtype).requires_grad_() for _ in "kv")
    attended = attend(query, key, value, pieces, 0.4)
    weights = torch.randn(attended.shape, dtype=torch.float64).to(dtype)
    return [attended, *torch.autograd.grad((attended * weights).sum(), (query, key, value))]


@pytest.mark.parametrize("at_labels", [False, True])
@pytest.mark.parametrize("dtype", list(WITHIN))
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("num_shared", [0, NUM_SHARED])
def test_own_backward_equals_autograds(num_shared: int, kv_heads: int, dtype: torch.dtype, at_labels: bool) -> None:
    expected = results(attend_by_autograd, num_shared, kv_heads, dtype, at_labels)
    found = results(attend_in_groups, num_shared, kv_heads, dtype, at_labels)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == dtype
        assert (one - other).abs().max() <= WITHIN[dtype] * other.abs().max()


def test_a_number_that_is_not_finite_stays_in_its_row() -> None:
    """Padding of a group must not carry it into another row's gradients."""
    layout = make_layout([5, 4, 5], torch.device("cpu"))
    query, key, value = (torch.randn(14, 2, 8) for _ in range(3))
    key[6] = float("nan")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    attended = attend_in_groups(*leaves, layout.whole, 0.4)
    in_row = torch.zeros(14, dtype=torch.bool)
    in_row[5:9] = True
    for found in (attended, *torch.autograd.grad(attended.sum(), leaves)):
        assert not found[in_row].isfinite().all()
        assert found[~in_row].isfinite().all()


def test_without_labelled_positions_nothing_is_attended() -> None:
    layout = make_layout(LENGTHS, torch.device("cpu"), 0, torch.zeros(0, dtype=torch.long))
    query, keys = torch.zeros(0, 4, 8, requires_grad=True), torch.randn(30, 4, 8, requires_grad=True)
    attended = attend_in_groups(query, keys, keys, layout.labelled, 0.4)
    attended.sum().backward()
    assert attended.shape == (0, 4, 8)
    assert keys.grad is not None
    assert not keys.grad.any()
