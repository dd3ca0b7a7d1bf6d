"""Optimizer and schedule: every role its own rate and decay, the learning rate's shape by its formula."""

import math

import pytest
import torch
from tiny_training import FIRST_NEW_ID, make_stage, tiny_model

from graftlm.training.optim import (
    learning_rate_shape,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rates,
)
from graftlm.training.trainable import learning_roles, prepare_model, trainable_parameters

FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 2, "alpha": 4}


def test_every_role_has_its_own_rate_and_decay_and_vectors_never_decay() -> None:
    groups = {
        "adapter": {"peak_lr": 1e-3},
        "old_rows": {"peak_lr": 1e-5, "weight_decay": 0.0},
        "new_rows": {"weight_decay": 0.5},
    }
    stage = make_stage(LORA, peak_lr=2e-4, weight_decay=0.1, groups=groups, betas=[0.8, 0.9], eps=1e-6)
    model = prepare_model(tiny_model(), stage.trains, FIRST_NEW_ID, seed=0)
    roles = learning_roles(model)
    optimizer = make_optimizer(roles, stage)
    expected = {"adapter": (1e-3, 0.1), "old_rows": (1e-5, 0.0), "new_rows": (2e-4, 0.5)}
    found = {}
    for group in optimizer.param_groups:
        (role,) = {role for role, members in roles.items() for p in group["params"] if any(p is m for m in members)}
        found[role] = (group["peak_lr"], group["weight_decay"])
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-6, True)
    assert found == expected
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainable_parameters(model).values())
    full = prepare_model(tiny_model(), make_stage(FULL).trains, FIRST_NEW_ID, seed=0)
    for group in make_optimizer(learning_roles(full), stage).param_groups:
        assert all(p.ndim >= 2 for p in group["params"]) or group["weight_decay"] == 0.0


def test_rates_follow_one_factor_each_from_its_own_peak() -> None:
    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    stage = make_stage(FULL, peak_lr=1.0, groups={"new_rows": {"peak_lr": 3.0}})
    optimizer = make_optimizer({"adapter": [], "body": [a], "old_rows": [], "new_rows": [b]}, stage)
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5]


@pytest.mark.parametrize("warmup", [{"warmup_steps": 10}, {"warmup_ratio": 0.095, "warmup_steps": None}])
def test_warm_up_by_ratio_or_steps_then_the_schedule(warmup) -> None:
    """The ratio is rounded up: 0.095 of 100 steps are 10."""
    for schedule, half in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        rate = learning_rate_shape(make_stage(FULL, schedule=schedule, **warmup), 100)
        assert [rate(n) for n in range(10)] == pytest.approx([(n + 1) / 11 for n in range(10)])
        assert rate(10) == 1.0
        assert rate(55) == pytest.approx(half)
        assert rate(100) == pytest.approx(1.0 if schedule == "constant" else 0.0)
        assert rate(250) == rate(100)
    cosine = learning_rate_shape(make_stage(FULL, schedule="cosine", **warmup), 100)
    assert cosine(40) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_without_warm_up_the_first_update_has_the_peak_rate() -> None:
    rate = learning_rate_shape(make_stage(FULL, warmup_steps=0), 6)
    assert rate(0) == 1.0
    assert all(rate(n) > 0 for n in range(6)), "every update of the stage moves the weights"


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    def fresh():
        torch.manual_seed(1)
        named = {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.randn(5))}
        roles = {"adapter": [], "body": list(named.values()), "old_rows": [], "new_rows": []}
        return named, make_optimizer(roles, make_stage(FULL))

    def step(named, optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    named, optimizer = fresh()
    step(named, optimizer, 1)
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer, named).items()}
    assert sorted(saved) == [f"{name}|{key}" for name in "ab" for key in ("exp_avg", "exp_avg_sq", "step")]
    weights = {name: p.detach().clone() for name, p in named.items()}
    step(named, optimizer, 2)
    again, other = fresh()
    with torch.no_grad():
        for name, parameter in again.items():
            parameter.copy_(weights[name])
    restore_optimizer(other, again, saved)
    step(again, other, 2)
    assert all(torch.equal(named[name], again[name]) for name in named)
