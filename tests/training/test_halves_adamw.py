"""AdamW over halves moves every weight as torch's fused AdamW moves it whole, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from graftlm.model.halves import BLOCK, joined_halves, split_from
from graftlm.training.halves_adamw import HalvesAdamW

SHAPES = [(7, 33), (1000,), (64, 16), (3,)]
BETAS, EPS = (0.9, 0.99), 1e-8


def in_halves(weight: Parameter) -> Tensor:
    wide, low = weight.detach().clone(), torch.empty(weight.shape, dtype=torch.int16)
    weight.data, weight.grad_dtype = torch.empty(weight.shape, dtype=torch.bfloat16), torch.float32
    split_from(wide, weight.data, low)
    return low


def parameters() -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape)) for shape in SHAPES]


def groups_of(weights: list[Parameter]) -> list[dict]:
    return [
        {"params": weights[:2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": weights[2:], "lr": 3e-3, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("num_halves", [0, 2, 4])
@pytest.mark.parametrize("block", [16, 2**17])
def test_the_same_bits_as_torchs_own(monkeypatch: pytest.MonkeyPatch, num_halves: int, block: int) -> None:
    """Over steps with other rates, clipped gradients and a weight that has none; moments and counts as well."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    whole, held = parameters(), parameters()
    low_of = {weight: in_halves(weight) for weight in held[:num_halves]}
    plain = torch.optim.AdamW(groups_of(whole), betas=BETAS, eps=EPS, fused=True)
    ours = HalvesAdamW(groups_of(held), BETAS, EPS, low_of)
    for step in range(6):
        for number, (weight, twin) in enumerate(zip(whole, held, strict=True)):
            has_none = step == 2 and number == 1
            weight.grad = None if has_none else 10.0 ** (-step) * torch.randn(weight.shape)
            twin.grad = None if has_none else weight.grad.clone()
        for optimizer in (plain, ours):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        for weight, twin in zip(whole, held, strict=True):
            found = joined_halves(twin.data, low_of[twin]) if twin in low_of else twin.data
            assert torch.equal(found, weight.data), step
            expected, state = plain.state[weight], ours.state[twin]
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) and state[key].dtype == torch.float32 for key in state)


def test_what_lies_otherwise_in_memory_moves_alike() -> None:
    """A gradient as a product may leave it, turned."""
    whole, held = Parameter(torch.ones(5, 3)), Parameter(torch.ones(5, 3))
    low_of = {held: in_halves(held)}
    gradient = torch.randn(3, 5).T
    held.grad, whole.grad = gradient, gradient.contiguous()
    HalvesAdamW([{"params": [held], "lr": 0.1, "weight_decay": 0.0}], BETAS, EPS, low_of).step()
    torch.optim.AdamW([whole], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True).step()
    assert torch.equal(joined_halves(held.data, low_of[held]), whole.data)


def test_a_weight_may_be_put_together_between_steps() -> None:
    """A stage that goes on in another precision: the moments stay."""
    whole, held = Parameter(torch.ones(20)), Parameter(torch.ones(20))
    low_of = {held: in_halves(held)}
    group = {"lr": 0.1, "weight_decay": 0.0}
    ours = HalvesAdamW([{"params": [held], **group}], BETAS, EPS, low_of)
    plain = torch.optim.AdamW([{"params": [whole], **group}], betas=BETAS, eps=EPS, fused=True)
    for step in range(4):
        if step == 2:
            held.data = joined_halves(held.data, low_of.pop(held))
        gradient = torch.randn(20)
        held.grad, whole.grad = gradient.clone(), gradient
        ours.step()
        plain.step()
    assert torch.equal(held.data, whole.data)
