"""Precision: the loss scale follows its table, non-finite steps touch nothing, memory and threads as asked."""

import random
from pathlib import Path

import pytest
import torch

from graftlm import device
from graftlm.device import LossScaler, Precision, forget_peak_memory, num_cores, peak_memory_bytes, use_all_cores
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


def overflows(seed: int, num_steps: int = 600, share: float = 0.2) -> list[bool]:
    """Bad stretches of 40 steps in every hundred, calm ones between."""
    dice = random.Random(seed)
    return [dice.random() < (share if step % 100 < 40 else 0.002) for step in range(num_steps)]


@pytest.mark.parametrize("seed", range(3))
def test_torchs_defaults_give_the_trace_of_torchs_scaler(seed: int) -> None:
    """N3: against torch.amp.GradScaler itself, with a window short enough to see it grow."""
    theirs = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=20)
    ours = LossScaler(65536.0, growth_interval=20, hysteresis=1, floor=1e-30)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflowed in overflows(seed):
        assert theirs.get_scale() == ours.scale
        weight.grad = torch.full((1,), float("inf") if overflowed else 1.0)
        theirs.scale(torch.zeros(1))
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed)


@pytest.mark.parametrize("seed", range(3))
def test_deepspeeds_defaults_give_the_trace_of_its_rule(seed: int) -> None:
    """N3: DeepSpeed's dynamic scale written out: growth counted from the last overflow, hysteresis given back by it."""
    scale, hysteresis, last_overflow = 65536.0, 2, -1
    ours = LossScaler(65536.0, growth_interval=100, hysteresis=2, floor=1e-10)
    grown = 0
    for step, overflowed in enumerate(overflows(seed, num_steps=1500, share=0.03)):
        assert ours.scale == scale
        ours.update(overflowed)
        if overflowed:
            if hysteresis == 1:
                scale = max(scale / 2, 1e-10)
            else:
                hysteresis -= 1
            last_overflow = step
        elif (step - last_overflow) % 100 == 0:
            hysteresis, scale, grown = 2, scale * 2, grown + 1
    assert grown > 0


def test_the_cards_exit_takes_52_overflows_in_a_row() -> None:
    """From 65,536 with a floor of 1e-10, as the published logs have it."""
    scaler = LossScaler(65536.0, growth_interval=100, hysteresis=2, floor=1e-10)
    for _ in range(51):
        scaler.update(True)
    assert scaler.scale == 1e-10
    with pytest.raises(NumericalStop, match="loss scale 1e-10, the floor"):
        scaler.update(True)


def test_a_restored_scaler_goes_on_with_the_same_trace() -> None:
    first = LossScaler(8.0, growth_interval=3, hysteresis=2, floor=1e-6)
    sequence = overflows(5, 60)
    for overflowed in sequence[:25]:
        first.update(overflowed)
    second = LossScaler(1.0, growth_interval=3, hysteresis=2, floor=1e-6)
    second.restore(first.state())
    for overflowed in sequence[25:]:
        first.update(overflowed)
        second.update(overflowed)
        assert second.scale == first.scale


def test_threads_are_left_alone_where_the_system_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_all_cores()
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_all_cores()
    assert asked == [num_cores()]


def test_peak_memory_is_that_since_it_was_forgotten() -> None:
    """On Linux; elsewhere a process cannot forget."""
    cpu = torch.device("cpu")
    large = torch.ones(2**26)
    held = peak_memory_bytes(cpu)
    assert held > 2**28
    del large
    forget_peak_memory(cpu)
    assert peak_memory_bytes(cpu) <= held


def test_memory_that_caches_would_give_back_is_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(device, "Path", lambda _: told)
    assert device.available_memory_bytes() == 8000 * 1024
    told.write_text("MemTotal: 9000 kB\n")
    assert device.available_memory_bytes() is None


def test_non_finite_step_leaves_weights_untouched() -> None:
    """N1: a NaN gradient changes no weight; too many in a row stop the run."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    precision = Precision(torch.float32, torch.device("cpu"), max_skips_in_a_row=2)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    norm, _ = precision.unscale_and_clip({"body": [weight]}, 1.0)
    assert not precision.step(optimizer, norm)
    assert torch.equal(weight.detach(), torch.ones(3))
    with pytest.raises(NumericalStop, match="2 steps in a row"):
        precision.step(optimizer, norm)


def test_clipping_scales_all_groups_by_the_global_norm() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    precision = Precision(torch.float16, torch.device("cpu"), LossScaler(2.0, 10, 1, 1.0))
    total, norms = precision.unscale_and_clip({"body": [a], "adapter": [b]}, 1.0)
    assert total == pytest.approx(2.5)
    assert norms == pytest.approx({"body": 1.5, "adapter": 2.0})
    assert (a.grad.item(), b.grad.item()) == pytest.approx((0.6, 0.8))
