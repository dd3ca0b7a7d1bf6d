"""A frozen base in 8 or 4 bits: what is computed is that of the rounded matrices, and the exact ones come back."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.device import Precision
from graftlm.errors import UserError
from graftlm.health.memory import peak
from graftlm.health.plan import size_of
from graftlm.model.causal import body_of
from graftlm.model.frozen import hold_frozen_as
from graftlm.model.packed import attend_packed
from graftlm.model.quantised import BYTES_A_NUMBER, Bits, QuantisedLinear
from graftlm.model.shapes import shape_of
from graftlm.recipe import Lora, NewRows, Stage
from graftlm.training.batches import row_batches
from graftlm.training.loop import response_loss_sum
from graftlm.training.room import facts_of, wish_of
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model
from tests.training.tiny_training import FIRST_NEW_ID, make_rows, stage_of, tiny_model

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8}
BITS: list[Bits] = ["int8", "nf4"]


def layer_of(bits: Bits, rows: int = 64, columns: int = 96) -> tuple[nn.Linear, QuantisedLinear]:
    torch.manual_seed(1)
    layer = nn.Linear(columns, rows).requires_grad_(False)
    return layer, QuantisedLinear(layer, bits)


@pytest.mark.parametrize(("bits", "most"), [("int8", 0.02), ("nf4", 0.12)])
def test_the_error_is_that_of_the_format(bits: Bits, most: float) -> None:
    """Of uniform weights; neither exact nor worse than the format gives."""
    layer, held = layer_of(bits)
    wide = held.wide_weight(torch.float32)
    assert wide.shape == layer.weight.shape
    assert 0.001 < (wide - layer.weight).norm() / layer.weight.norm() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_the_rounded_matrix_to_the_bit(bits: Bits, dtype: torch.dtype) -> None:
    layer, held = layer_of(bits)
    plain = nn.Linear(96, 64).requires_grad_(False)
    plain.load_state_dict({"weight": held.wide_weight(dtype).float(), "bias": layer.bias})
    inputs = [torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = [module(x) for module, x in zip((held, plain), inputs, strict=True)]
        assert outputs[0].dtype == dtype
        assert torch.equal(*outputs)
        for output in outputs:
            output.float().square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "trains", [Lora(**LORA, rows="none"), Lora(**LORA, rows="new"), NewRows(kind="new-rows")], ids=lambda t: t.kind
)
def test_gradients_are_those_of_the_model_with_rounded_matrices(trains: Lora | NewRows, bits: Bits, tied: bool) -> None:
    rows, found = make_rows(), []
    for is_plain in (False, True):
        model = prepare_model(tiny_model(tied), trains, FIRST_NEW_ID, 0).train()
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(5))
        attend_packed(body_of(model))
        held = hold_frozen_as(model, torch.float32, bits)
        assert len(held.replaced) == 14  # the head stays as it is
        if is_plain:
            wide = [getattr(parent, name).wide_weight(torch.float32) for parent, name, _ in held.replaced]
            held.restore()
            for (_, _, layer), weight in zip(held.replaced, wide, strict=True):
                layer.weight.data.copy_(weight)
        (batch,) = row_batches(rows, range(len(rows)), 1000, CPU)
        loss = response_loss_sum(model, batch, Precision(torch.float32, CPU))
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (plain_loss, plain_gradients) = found
    assert torch.equal(loss, plain_loss)
    assert gradients.keys() == plain_gradients.keys()
    assert all(torch.equal(gradient, plain_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", BITS)
def test_a_stage_trains_and_merges_into_the_exact_base(tmp_path: Path, bits: Bits, precision: str) -> None:
    trains = {**LORA, "targets": ["q_proj", "v_proj"], "rows": "none"}
    stage = stage_of(trains, precision=precision, frozen_base=bits, epochs=2, peak_lr=1e-2)
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = StageRun(model, stage, make_rows(), {}, tmp_path, CPU, None)
    run.run()
    after = dict(run.finished_model().named_parameters())
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in before if not torch.equal(after[name], before[name])
    }
    assert changed == {"q_proj", "v_proj"}
    # What was added is the adapter alone, a matrix of its rank: nothing of the rounding.
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank((after[q_proj] - before[q_proj]).double(), rtol=1e-4) <= 4


@pytest.mark.parametrize("bits", BITS)
def test_a_plan_counts_what_is_held(bits: Bits) -> None:
    _, held = layer_of(bits)
    a_number = sum(held.get_buffer(name).nbytes for name in ("codes", "largest")) / (64 * 96)
    assert a_number == BYTES_A_NUMBER[bits]
    rows, shape = make_rows(), shape_of(tiny_model().config.to_dict(), "tiny")
    items = {}
    for form in ("exact", bits):
        stage = stage_of({**LORA, "rows": "none"}, precision="bf16", frozen_base=form)
        wish = wish_of(stage, "stages.0", shape, 0, facts_of(rows, "test"))
        items[form] = peak(size_of(wish, "bf16", False, 64, False)).items
    matrices = shape.num_layers * sum(inner * outer for inner, outer in shape.projections.values())
    head = shape.num_rows * shape.hidden_size * 2
    assert items["exact"]["frozen weights in 16 bits"] == 2 * matrices + head
    name = {"int8": "frozen weights in 8 bits", "nf4": "frozen weights in 4 bits"}[bits]
    assert items[bits][name] == int(matrices * BYTES_A_NUMBER[bits]) + head
    assert items[bits]["weights fp32"] == items["exact"]["weights fp32"]


@pytest.mark.parametrize("trains", [{"kind": "full"}, {**LORA, "dora": True}])
def test_a_base_that_learns_is_refused(trains: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen_base"):
        Stage.model_validate({"name": "sft", "trains": trains, "frozen_base": "nf4"})


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError) as told:
        QuantisedLinear(nn.Linear(64, 64), "nf4")
    assert "graftlm[quantised]" in told.value.fix
