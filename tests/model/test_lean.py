"""Layers that keep less: the same bits forward, equal gradients, fewer bytes kept, and the own modules back."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Qwen3Config

from graftlm.device import Precision
from graftlm.model.causal import body_of
from graftlm.model.lean import make_lean
from graftlm.model.packed import attend_packed
from graftlm.recipe import Full, Lora, NewRows
from graftlm.training.batches import row_batches
from graftlm.training.loop import response_loss_sum
from graftlm.training.trainable import prepare_model
from tests.model.test_body import CONFIGS, LABELLED, NUM_SHARED, assert_equal, causal, hidden_and_gradients
from tests.training.tiny_training import FIRST_NEW_ID, make_rows, tiny_model

CPU = torch.device("cpu")
KINDS = [
    pytest.param(Full(kind="full"), id="full"),
    pytest.param(Lora(kind="lora", rank=4, alpha=8, rows="none"), id="lora"),
    pytest.param(Lora(kind="lora", rank=4, alpha=8, rows="all", targets=("q_proj",)), id="lora-on-queries"),
    pytest.param(NewRows(kind="new-rows"), id="new-rows"),
]
# Of a gradient's largest entry: the norm's is added up in another order, and that may round a 16-bit number otherwise.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("num_shared", [0, NUM_SHARED])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("config_class", CONFIGS)
def test_float64_equals_the_plain_layers(config_class: type, is_sparse: bool, num_shared: int) -> None:
    plain = causal(config_class).train()
    model = AutoModelForCausalLM.from_config(plain.config).double().train()
    model.load_state_dict(plain.state_dict())
    lean = make_lean(body_of(model))
    assert len(lean.replaced) == (13 if config_class is Qwen3Config else 9)
    for one in (plain, model):
        attend_packed(body_of(one))
    ends_at_N = torch.tensor(LABELLED) + num_shared if is_sparse else None
    # The plain one computes all of its last layer: as transformers does it, but for the attention function.
    expected = hidden_and_gradients(plain, num_shared, None)
    assert_equal(hidden_and_gradients(model, num_shared, ends_at_N), expected)


def kept_bytes(compute: Any) -> tuple[Any, int]:
    """What `compute` gives, and the bytes of all memory that is kept for the way back."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        return compute(), sum(kept.values())


@pytest.mark.parametrize("trains", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_losses_are_the_same_bits_gradients_close_and_less_is_kept(dtype: torch.dtype, trains: Any) -> None:
    rows, precision = make_rows(), Precision(dtype, CPU)
    plain = prepare_model(tiny_model(), trains, FIRST_NEW_ID, 0).train()
    attend_packed(body_of(plain))
    model = deepcopy(plain)
    make_lean(body_of(model))
    (batch,) = row_batches(rows, range(len(rows)), 1000, CPU)
    (expected, kept_by_plain), (loss, kept) = (
        kept_bytes(lambda one=one: response_loss_sum(one, batch, precision)) for one in (plain, model)
    )
    assert torch.equal(loss, expected)
    assert kept < kept_by_plain
    for one in (loss, expected):
        one.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= TOLERANCES[dtype] * gradient.abs().max(), name


def test_the_models_own_modules_come_back_with_what_was_learned() -> None:
    model = tiny_model()
    names, own = list(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    lean = make_lean(body_of(model))
    assert list(model.state_dict()) == names
    replaced = torch.nn.Linear(1, 1)
    body_of(model).layers[1].mlp.up_proj = replaced
    body_of(model).norm.weight = torch.nn.Parameter(torch.tensor([7.0]))
    lean.restore()
    back = {name: type(module) for name, module in model.named_modules()}
    assert back == own
    assert body_of(model).layers[1].mlp.up_proj is replaced
    assert body_of(model).norm.weight.item() == 7.0


def test_an_mlp_gated_otherwise_stays_as_it_is() -> None:
    model = tiny_model()
    for layer in body_of(model).layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert {name for _, name, _ in make_lean(body_of(model)).replaced} == {
        "input_layernorm", "post_attention_layernorm", "norm", "self_attn",
    }  # fmt: skip


def test_squares_too_large_are_told_by_the_gradient() -> None:
    model = tiny_model()
    make_lean(body_of(model))
    x = torch.ones(2, model.config.hidden_size)
    x[1] = 1e20
    x.requires_grad_()
    normed = body_of(model).norm(x)
    assert (normed[1] == 0).all()
    normed.sum().backward()
    assert x.grad is not None
    assert x.grad[0].isfinite().all()
    assert x.grad[1].isnan().all()
    assert body_of(model).norm.weight.grad.isnan().all()


def test_attention_with_dropout_stays_as_it_is() -> None:
    model = tiny_model()
    for layer in body_of(model).layers:
        layer.self_attn.attention_dropout = 0.1
    assert "self_attn" not in {name for _, name, _ in make_lean(body_of(model)).replaced}
