"""The last layer at labelled positions only: the same hidden states and gradients as the whole layer's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from graftlm.model.body import labelled_hidden_states
from graftlm.model.causal import body_of, recompute_activations
from graftlm.model.lean import make_lean
from graftlm.model.lora import attach_lora
from graftlm.model.packed import attend_packed, attend_plain, make_layout
from tests.training.tiny_training import exact_norms

LENGTHS = [5, 1, 9, 4, 9, 2]
NUM_SHARED = 3
# Rows 0 and 2 have labels in two stretches, row 1 and 3 none, row 4 all, row 5 its last.
LABELLED = [1, 2, 4, 6, 7, 8, 13, *range(19, 28), 29]
CONFIGS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


def causal(config_class: type, **keys: object):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=None, **keys,
    )  # fmt: skip
    model = exact_norms(AutoModelForCausalLM.from_config(config).double())
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def hidden_and_gradients(model, num_shared: int, ends_at_N: torch.Tensor | None):
    generator = torch.Generator().manual_seed(1)
    labelled_N = torch.tensor(LABELLED) + num_shared
    ids = torch.randint(0, 40, (1, num_shared + sum(LENGTHS)), generator=generator)
    weights = torch.randn(len(LABELLED), 32, generator=generator, dtype=torch.float64)
    layout = make_layout(LENGTHS, torch.device("cpu"), num_shared, ends_at_N)
    model.zero_grad()
    hidden_NH = labelled_hidden_states(model, ids, layout, labelled_N)
    (hidden_NH * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_NH.detach(), gradients


def assert_equal(found, expected) -> None:
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        largest = expected[1][name].abs().max()
        assert (gradient - expected[1][name]).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("num_shared", [0, NUM_SHARED])
@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_short_cut_equals_the_whole_layer(config_class: type, num_shared: int) -> None:
    model = causal(config_class).train()
    attend_packed(body_of(model))
    ends_at_N = torch.tensor(LABELLED) + num_shared
    whole, short = (hidden_and_gradients(model, num_shared, ends) for ends in (None, ends_at_N))
    assert_equal(short, whole)


def test_it_holds_with_adapters_and_with_activations_computed_again() -> None:
    model = attach_lora(causal(LlamaConfig), rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj"),
                        rslora=False, dora=False, seed=0)  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    attend_packed(body_of(model.double().train()))
    ends_at_N = torch.tensor(LABELLED) + NUM_SHARED
    whole = hidden_and_gradients(model, NUM_SHARED, None)
    assert any("lora_A" in name for name in whole[1])
    assert_equal(hidden_and_gradients(model, NUM_SHARED, ends_at_N), whole)
    recompute_activations(model, True)
    assert_equal(hidden_and_gradients(model, NUM_SHARED, ends_at_N), whole)


def test_it_holds_for_whatever_adapters_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped at a position without a label is read by no one: with the same dropped elsewhere, the same loss.

    What stands for the draw depends on the position's own numbers alone.
    """
    num_dropped = []

    def drop(x: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
        is_zeroed = (x.detach() * 1e3).floor() % 5 == 0
        num_dropped.append(int(is_zeroed.sum()))
        return x.masked_fill(is_zeroed, 0.0), 1 - share

    monkeypatch.setattr("graftlm.model.adapted.dropped", drop)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = attach_lora(causal(LlamaConfig), rank=3, alpha=6, dropout=0.2, targets=names, seed=0).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    make_lean(body_of(model))
    attend_packed(body_of(model))
    model.train()
    whole, short = (hidden_and_gradients(model, 0, ends) for ends in (None, torch.tensor(LABELLED)))
    assert_equal(short, whole)
    assert 0 < sum(num_dropped[14:]) < sum(num_dropped[:14])


def test_the_last_mlp_sees_labelled_positions_only() -> None:
    """Were the whole layer computed, every law above would hold as well."""
    model = causal(LlamaConfig)
    attend_packed(body_of(model))
    seen: list[int] = []
    body_of(model).layers[-1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    hidden_and_gradients(model, 0, torch.tensor(LABELLED))
    assert seen == [len(LABELLED)]


def test_no_label_at_all_is_no_error() -> None:
    model = causal(LlamaConfig)
    attend_packed(body_of(model))
    none = torch.tensor([], dtype=torch.long)
    layout = make_layout(LENGTHS, torch.device("cpu"), 0, none)
    hidden_NH = labelled_hidden_states(model, torch.ones(1, sum(LENGTHS), dtype=torch.long), layout, none)
    assert hidden_NH.shape == (0, 32)


def test_rows_that_would_see_one_another_are_refused() -> None:
    """Transformers' own attention passes `layout=` over: a loss over packed rows would be wrong in silence."""
    model = causal(LlamaConfig)
    attend_packed(body_of(model))
    attend_plain(body_of(model))
    layout = make_layout(LENGTHS, torch.device("cpu"))
    with pytest.raises(AssertionError, match="attend_packed first"):
        labelled_hidden_states(model, torch.ones(1, sum(LENGTHS), dtype=torch.long), layout, torch.tensor([1]))
