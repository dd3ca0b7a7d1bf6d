"""Precision: the loss scale follows its table, non-finite steps touch nothing."""

import pytest
import torch

from graftlm.device import LossScaler, Precision
from graftlm.errors import NumericalStop


def test_scale_follows_deepspeeds_table() -> None:
    """N3: hysteresis 2, window 3: the first overflow is forgiven, the next halve, three good steps double."""
    scaler = LossScaler(8.0, growth_interval=3, hysteresis=2, floor=2.0)
    trace = []
    for overflowed in (True, True, True, False, False, False, True, True):
        scaler.update(overflowed)
        trace.append(scaler.scale)
    assert trace == [8, 4, 2, 2, 2, 4, 4, 2]
    with pytest.raises(NumericalStop, match="floor"):
        scaler.update(True)


def test_non_finite_step_leaves_weights_untouched() -> None:
    """N1: a NaN gradient changes no weight; too many in a row stop the run."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    precision = Precision(torch.float32, torch.device("cpu"), max_skips_in_a_row=2)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    norm, _ = precision.unscale_and_clip({"body": [weight]}, 1.0)
    assert not precision.step(optimizer, norm)
    assert torch.equal(weight.detach(), torch.ones(3))
    precision.step(optimizer, norm)
    with pytest.raises(NumericalStop, match="3 steps in a row"):
        precision.step(optimizer, norm)


def test_clipping_scales_all_groups_by_the_global_norm() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    precision = Precision(torch.float16, torch.device("cpu"), LossScaler(2.0, 10, 1, 1.0))
    total, norms = precision.unscale_and_clip({"body": [a], "adapter": [b]}, 1.0)
    assert total == pytest.approx(2.5)
    assert norms == pytest.approx({"body": 1.5, "adapter": 2.0})
    assert (a.grad.item(), b.grad.item()) == pytest.approx((0.6, 0.8))
