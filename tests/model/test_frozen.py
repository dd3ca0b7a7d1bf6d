"""Frozen matrices in 16 bits: the same products to the bit under autocast, and the exact weights back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.device import Precision
from graftlm.model.causal import body_of
from graftlm.model.frozen import hold_frozen_as
from graftlm.model.packed import attend_packed
from graftlm.recipe import Lora, NewRows
from graftlm.training.batches import row_batches
from graftlm.training.look import take_look
from graftlm.training.loop import response_loss_sum
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model
from tests.training.tiny_training import FIRST_NEW_ID, make_rows, stage_of, tiny_model

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8}
KINDS = [
    pytest.param(Lora(**LORA, rows="none"), id="lora"),
    pytest.param(Lora(**LORA, rows="new"), id="lora-new-rows"),
    pytest.param(NewRows(kind="new-rows"), id="new-rows"),
]


def prepared(trains: Lora | NewRows, tied: bool = False):
    model = prepare_model(tiny_model(tied), trains, FIRST_NEW_ID, 0).train()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    attend_packed(body_of(model))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", KINDS)
def test_loss_and_gradients_are_the_same_bits(trains: Lora | NewRows, dtype: torch.dtype, tied: bool) -> None:
    rows, precision, found = make_rows(), Precision(dtype, CPU), []
    for holds in (False, True):
        model = prepared(trains, tied)
        if holds:
            held = hold_frozen_as(model, dtype)
            # Seven products of each of two layers; the head too where it is frozen and a matrix of its own.
            has_own_head = not tied and isinstance(trains, Lora) and trains.rows == "none"
            assert len(held.replaced) == 14 + has_own_head
        (batch,) = row_batches(rows, range(len(rows)), 1000, CPU)
        loss = response_loss_sum(model, batch, precision)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss, gradients))
    (loss, gradients), (held_loss, held_gradients) = found
    assert torch.equal(loss, held_loss)
    assert gradients.keys() == held_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, held_gradients[name]), name


def test_a_pass_without_autocast_multiplies_the_rounded_weights() -> None:
    layer = torch.nn.Linear(8, 4).requires_grad_(False)
    model = tiny_model()
    model.get_decoder().layers[0].mlp.up_proj = layer
    hold_frozen_as(model.requires_grad_(False), torch.bfloat16)
    held = model.get_decoder().layers[0].mlp.up_proj
    expected = torch.nn.Linear(8, 4)
    expected.load_state_dict({"weight": layer.weight.bfloat16().float(), "bias": layer.bias})
    input = torch.randn(3, 8)
    inputs = [input.clone().requires_grad_() for _ in range(2)]
    outputs = [product(x) for product, x in zip((held, expected), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize(
    ("trains", "dtype"), [(Lora(**LORA, dora=True), torch.bfloat16), (Lora(**LORA), torch.float32)]
)
def test_nothing_is_replaced_where_it_would_not_be_exact_or_save_nothing(trains: Lora, dtype: torch.dtype) -> None:
    replaced = hold_frozen_as(prepared(trains), dtype).replaced
    assert not [name for _, name, _ in replaced if name != "lm_head"]


def test_a_stage_gives_exact_weights_back(tmp_path: Path) -> None:
    """Also where it is only looked at, in float32 while its frozen weights are rounded."""
    stage = stage_of({**LORA, "rows": "none"}, precision="bf16", epochs=1, keep="last")
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = StageRun(model, stage, make_rows(), {}, tmp_path, CPU, None)
    assert run.prepared.held.replaced
    assert take_look(run.model, run.steps, stage, run.precision, None).first_loss
    after = run.untrained_model()
    assert all(torch.equal(p, before[name]) for name, p in after.named_parameters())
