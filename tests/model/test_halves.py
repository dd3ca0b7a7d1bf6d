"""Weights in halves: the same bits back, autocast's own numbers in between, in the memory the weight had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from graftlm.model.causal import head_weight, new_causal
from graftlm.model.halves import Halves, joined_by_name, joined_halves, split_from
from graftlm.model.loss import linear_cross_entropy_sum
from graftlm.model.rows import head_rows, lay_rows_together, split_rows

FIRST_NEW_ID = 40


def tiny(tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    model = new_causal(
        num_rows=48, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, is_tied=tied
    )
    return model.to(dtype)


def halves_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    high, low = torch.empty_like(weight, dtype=torch.bfloat16), torch.empty_like(weight, dtype=torch.int16)
    split_from(weight.clone(), high, low)
    return high, low


def every_kind() -> Tensor:
    """Each pattern of upper 16 bits that is no NaN, with lower ones at and around every border."""
    upper = torch.arange(2**16)[:, None] << 16
    lower = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    weights = (upper + lower).to(torch.int32).view(torch.float32)
    return weights[~weights.isnan()]


def test_any_weight_comes_back_to_the_bit() -> None:
    weights = every_kind()
    assert len(weights) > 580_000
    assert torch.equal(joined_halves(*halves_of(weights)).view(torch.int32), weights.view(torch.int32))


def test_the_upper_half_is_the_rounded_weight_but_at_ties() -> None:
    """There it is the one farther from zero, as near as autocast's even one."""
    weights = every_kind()
    high, rounded = halves_of(weights)[0], weights.bfloat16()
    is_tie = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert is_tie.any()
    assert torch.equal(high[~is_tie], rounded[~is_tie])
    ties = weights[is_tie & high.isfinite()]
    high, rounded = halves_of(ties)[0].double(), ties.bfloat16().double()
    assert (high.abs() > ties.double().abs()).all()
    assert torch.equal((high - ties.double()).abs(), (rounded - ties.double()).abs())
    assert 0.4 < (high == rounded).double().mean() < 0.6


def test_what_is_not_finite_stays_so() -> None:
    weights = torch.tensor([float("inf"), -float("inf"), float("nan")])
    high = halves_of(weights)[0]
    assert high.tolist()[:2] == weights.tolist()[:2]
    assert high[2].isnan()
    assert joined_halves(*halves_of(weights))[2].isnan()


@pytest.mark.parametrize("is_grafted", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_split_and_what_is_put_back(tied: bool, is_grafted: bool) -> None:
    """Linear maps and a head of its own, in the memory they had; embedding, norms and what is frozen stay whole."""
    model = tiny(tied)
    if is_grafted:
        split_rows(model, FIRST_NEW_ID)
    frozen = "model.layers.0.mlp.up_proj.weight"
    dict(model.named_parameters())[frozen].requires_grad_(False)
    before = {name: (id(p), p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    halves = Halves()
    halves.split(model)
    names = {id(p): name for name, p in model.named_parameters()}
    split = {names[id(weight)] for weight in halves.low_of}
    maps = {name for name in before if "_proj." in name} - {frozen}
    rows = ("parametrizations.weight.original0", "parametrizations.weight.original1") if is_grafted else ("weight",)
    assert split == maps | (set() if tied else {f"lm_head.{name}" for name in rows})
    for name, parameter in model.named_parameters():
        identity, was, place = before[name]
        assert id(parameter) == identity
        assert parameter.dtype == (torch.bfloat16 if name in split else torch.float32)
        if name in split:
            whole = joined_halves(parameter.data, halves.low_of[parameter])
            assert torch.equal(whole, was)
            assert parameter.untyped_storage().data_ptr() == halves.low_of[parameter].untyped_storage().data_ptr()
            assert name.endswith("original1") or parameter.data_ptr() == place
    if is_grafted and not tied:
        first, second = head_rows(model)
        lay_rows_together(model)
        assert second.data_ptr() == first.data_ptr() + first.nbytes  # joined without a copy
    halves.restore()
    assert not halves.low_of
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, before[name][1])
        assert parameter.dtype == torch.float32


def loss_and_gradients(model: Any, is_mixed: bool) -> tuple[float, dict[str, Tensor]]:
    ids = torch.tensor([[1, 5, 45, 41, 7, 2]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        hidden = model.model(ids).last_hidden_state[0]
    dtype = torch.bfloat16 if is_mixed else hidden.dtype
    loss = linear_cross_entropy_sum(hidden[:-1], head_rows(model), ids[0, 1:], dtype)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_grafted", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_is_autocasts_to_the_bit(tied: bool, is_grafted: bool) -> None:
    """Where no weight is a tie: losses and float32 gradients."""
    whole, held = tiny(tied), tiny(tied)
    assert all(((p.view(torch.int32) & 0xFFFF) != 0x8000).all() for p in whole.parameters())
    for model in (whole, held) if is_grafted else ():
        split_rows(model, FIRST_NEW_ID)
    Halves().split(held)
    lay_rows_together(held)
    expected, gradients = loss_and_gradients(whole, True)
    found, own = loss_and_gradients(held, True)
    assert found == expected
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        assert gradient.dtype == torch.float32, name
        assert torch.equal(gradient, gradients[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_without_autocast_takes_the_rounded_weights_in_float32(tied: bool) -> None:
    """The doctor's passes, gradients of biases among them."""
    config = Qwen2Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    held = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(held.state_dict())
    halves = Halves()
    halves.split(held)
    names = {id(p): name for name, p in held.named_parameters()}
    split = {names[id(weight)] for weight in halves.low_of}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in split:
                parameter.copy_(parameter.bfloat16())
    expected, gradients = loss_and_gradients(plain, False)
    found, own = loss_and_gradients(held, False)
    assert found == pytest.approx(expected, rel=1e-6)
    assert own.keys() == gradients.keys()
    assert any(name.endswith("q_proj.bias") for name in own)
    for name, gradient in own.items():
        assert gradient.dtype == torch.float32, name
        scale = gradients[name].abs().max()
        assert ((gradient - gradients[name]).abs().max() <= 1e-6 * scale) or scale < 1e-9, name
    assert head_weight(held).shape == (48, 16)


def test_saved_halves_are_read_as_one_weight() -> None:
    weight, other = torch.randn(3, 5), torch.randn(4)
    high, low = halves_of(weight)
    read = joined_by_name({"a": high, "a|low": low, "b": other})
    assert read.keys() == {"a", "b"}
    assert torch.equal(read["a"], weight)
    assert read["b"] is other
