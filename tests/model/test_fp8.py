"""Products in FP8, emulated: the numbers are those of the formula, the parameters stay what they were, and what cannot
be is refused before a road begins. No GPU has run it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.device import Precision
from graftlm.errors import UserError
from graftlm.model.causal import body_of, load_causal, new_causal, save_causal
from graftlm.model.fp8 import Fp8Linear, hold_in_fp8
from graftlm.model.lean import make_lean
from graftlm.model.packed import attend_packed
from graftlm.recipe import Full, Lora, NewRows, Stage
from graftlm.run import read_metrics
from graftlm.training.batches import row_batches
from graftlm.training.loop import response_loss_sum
from graftlm.training.precision import refuse_fp8_where_it_cannot_be
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model
from tests.training.tiny_training import FIRST_NEW_ID, make_rows, spoken_rows, stage_of, tiny_model

CPU = torch.device("cpu")
BF16 = Precision(torch.bfloat16, CPU)
LORA: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 8}  # adapters whose sizes divide by 16 too
NUM_MAPS = 14


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_of_16s(seed: int = 0) -> Any:
    """Two layers whose every map divides by 16."""
    return new_causal(
        num_rows=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, is_tied=False,
        seed=seed,
    )  # fmt: skip


def rounded(x: Tensor, dim: int | None) -> Tensor:
    """q of the module's docstring, in float32: written here anew, after the paper and the recipe's words."""
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = 2.0 ** torch.floor(torch.log2(448 / largest.double().clamp(min=1e-12))).float()
    return (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        with torch.autocast("cpu", enabled=False):
            return (rounded(input, -1) @ rounded(weight, 1).T).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        grad_input = (rounded(grad, -1) @ rounded(weight, None)).to(input.dtype).view_as(input)
        return grad_input, (grad.T @ input.flatten(0, -2)).float()


class ReferenceLinear(nn.Linear):
    """A linear layer by the formula, in autocast's dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        output = _Reference.apply(input.to(torch.bfloat16), self.weight)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def learning_model(trains: Full | Lora | NewRows) -> Any:
    """Adapters, where there are some, add something."""
    model = prepare_model(model_of_16s(), trains, FIRST_NEW_ID, 0).train()
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    make_lean(body_of(model))  # as in a stage: what adapters give is added in place
    attend_packed(body_of(model))
    return model


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    rows = make_rows()
    (batch,) = row_batches(rows, range(len(rows)), 1000, CPU)
    with BF16.autocast():
        loss = response_loss_sum(model, batch, BF16)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_those_of_the_formula(learns: bool, bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(32, 48, bias=bias).requires_grad_(learns)
    layer.weight.data *= torch.logspace(-3, 3, 48)[:, None]  # rows of the matrix far apart, each with its own scale
    parent = nn.ModuleDict({"layer": layer})
    model = nn.Module()
    model.get_decoder = lambda: parent  # type: ignore[assignment]
    hold_in_fp8(model, emulate=True)
    grads, outputs = [], []
    for module in (parent["layer"], ReferenceLinear(layer)):
        layer.weight.grad = None
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with BF16.autocast():
            outputs.append(module(x))
        weighing = torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(3))
        (outputs[-1].float() * weighing).sum().backward()
        grads.append((x.grad, layer.weight.grad))
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2**-8, atol=0)
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=2**-8, atol=1e-6)
    assert (grads[0][1] is not None) is learns
    if learns:
        torch.testing.assert_close(grads[0][1], grads[1][1], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "trains",
    [Full(kind="full"), Lora(**LORA, rows="none"), Lora(**LORA, rows="new", dora=True), NewRows(kind="new-rows")],
    ids=["full", "lora", "dora", "new-rows"],
)
def test_a_model_computes_what_the_formula_says(trains: Full | Lora | NewRows) -> None:
    """The formula's numbers. Beside bf16 the loss differs: by 1.4e-5 to 4.7e-5 of it, as measured."""
    plain_loss, plain = loss_and_gradients(learning_model(trains))
    found = []
    for is_reference in (False, True):
        model = learning_model(trains)
        held = hold_in_fp8(model, emulate=True)
        assert len(held.replaced) == NUM_MAPS
        if is_reference:
            for parent, name, layer in held.replaced:
                setattr(parent, name, ReferenceLinear(layer))
        found.append(loss_and_gradients(model))
    (loss, gradients), (reference_loss, reference) = found
    assert abs(loss - reference_loss) <= 1e-6 * reference_loss
    assert gradients.keys() == reference.keys() == plain.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - reference[name]).norm() <= 1e-4 * reference[name].norm(), name
    assert 0 < abs(loss - plain_loss) < 5e-4 * plain_loss


def test_what_a_token_gives_does_not_depend_on_its_neighbours() -> None:
    """A loud one in the micro-batch would take a scale of all its precision."""
    torch.manual_seed(1)
    model = model_of_16s()
    hold_in_fp8(model, emulate=True)
    layer = body_of(model).layers[0].mlp.up_proj
    quiet, loud = torch.randn(4, 32), 1e6 * torch.randn(3, 32)
    together, alone = torch.cat([quiet, loud]).requires_grad_(), quiet.clone().requires_grad_()
    outputs = layer(together)[:4], layer(alone)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(together.grad[:4], alone.grad, rtol=1e-5, atol=1e-5)
    assert layer(quiet[:0]).shape == (0, 48)  # a micro-batch without labels asks the last layer for nothing


def test_a_frozen_weight_costs_neither_its_gradient_nor_its_input() -> None:
    model = model_of_16s().requires_grad_(False)
    hold_in_fp8(model, emulate=True)
    layer = body_of(model).layers[0].mlp.up_proj
    kept: list[Tensor] = []
    x = torch.randn(7, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert kept == []
    assert layer.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("trains", [Full(kind="full"), Lora(**LORA, rows="new")], ids=["full", "lora"])
def test_parameters_keep_their_names_and_adapters_their_layers(trains: Full | Lora) -> None:
    model = learning_model(trains)
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    held = hold_in_fp8(model, emulate=True)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert {p.dtype for p in after.values()} == {torch.float32}
    in_fp8 = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(in_fp8) == NUM_MAPS
    assert all(("layers." in name) and "lora_" not in name for name in in_fp8)
    held.restore()
    assert all(modules[name] is module for name, module in model.named_modules())
    assert all(before[name] is p for name, p in model.named_parameters())


def test_sizes_that_do_not_divide_by_16_stay_as_they_are() -> None:
    """The tiny model of other tests: heads of 8 for keys and values, an MLP of 24."""
    held = hold_in_fp8(tiny_model(), emulate=True)
    assert {name for _, name, _ in held.replaced} == {"q_proj", "o_proj"}


@pytest.mark.parametrize(
    "trains",
    [{"kind": "full"}, {**LORA, "rows": "new"}, {**LORA, "rows": "none", "dora": True}, {"kind": "new-rows"}],
    ids=["full", "lora", "dora", "new-rows"],
)
def test_a_stage_hands_on_the_ordinary_model(
    tmp_path: Path, trains: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stage_of(trains, precision="bf16", fp8=True, epochs=2, peak_lr=1e-2, gradient_checkpointing=True)
    before = {name: t.clone() for name, t in model_of_16s().state_dict().items()}
    run = StageRun(model_of_16s(), stage, make_rows(), {}, tmp_path / "stage", CPU, FIRST_NEW_ID)
    assert sum(isinstance(module, Fp8Linear) for module in run.model.modules()) == NUM_MAPS
    run.run()
    assert "sft: bf16 on cpu, " in (told := capsys.readouterr().err)
    assert ", linear layers in FP8, lossy" in told
    learned = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    model = run.finished_model()
    after = model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    projection = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(after[projection], before[projection]) is (trains["kind"] == "new-rows")
    if trains["kind"] == "full":
        assert torch.equal(after[projection], learned[projection])  # the master weight itself
    save_causal(model, tmp_path / "saved")
    again = load_causal(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_thirty_steps_learn_about_as_bf16_does(tmp_path: Path) -> None:
    """Of answers that repeat their question: the loss falls as far as in bf16 (2.69 and 2.70 of 3.88)."""
    last = {}
    for fp8 in (False, True):
        folder = tmp_path / str(fp8)
        stage = stage_of(precision="bf16", fp8=fp8, epochs=6, batch_rows=12, peak_lr=1e-2)
        run = StageRun(model_of_16s(), stage, spoken_rows(), {}, folder, CPU, FIRST_NEW_ID)
        run.run()
        losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step"]
        assert len(losses) == 30
        last[fp8] = sum(losses[-3:]) / 3
        assert last[fp8] < 0.8 * losses[0]
    assert last[True] != last[False]
    assert abs(last[True] / last[False] - 1) < 0.02


def test_frozen_layers_in_16_bits_lie_below(tmp_path: Path) -> None:
    """So that a frozen base takes the memory a plan counts, and its float32 weights come back."""
    stage = stage_of({**LORA, "rows": "none"}, precision="bf16", fp8=True)
    run = StageRun(model_of_16s(), stage, make_rows(), {}, tmp_path, CPU, None)
    frozen = [module for module in run.model.modules() if isinstance(module, Fp8Linear)]
    assert {module.weight.dtype for module in frozen} == {torch.bfloat16}
    run.prepared.hold_for(torch.float32, CPU)  # held anew, not one upon the other
    frozen = [module for module in run.model.modules() if isinstance(module, Fp8Linear)]
    assert (len(frozen), {module.weight.dtype for module in frozen}) == (NUM_MAPS, {torch.float32})
    state = run.untrained_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model_of_16s().state_dict().items())


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"precision": "fp16"}, "it needs precision bf16, and here that is fp16"),
        ({"precision": "fp32"}, "it needs precision bf16, and here that is fp32"),
        ({"trains": {**LORA, "rows": "none"}, "frozen_base": "nf4"}, "frozen_base is nf4: choose one of both"),
    ],
)
def test_what_a_stage_cannot_be_beside_fp8_is_told(knobs: dict[str, Any], told: str) -> None:
    given = {"name": "sft", "trains": {"kind": "full"}, **knobs}
    Stage.model_validate(given)
    with pytest.raises(ValueError, match=told):
        Stage.model_validate({**given, "fp8": True})


@pytest.mark.parametrize(
    ("device", "capability", "told"),
    [
        ("cpu", None, "capability 8.9 or more (Ada, Hopper, later); this is a CPU."),
        ("cuda", (8, 0), "NVIDIA Test has 8.0."),
        ("cuda", (7, 0), "NVIDIA Test has 7.0."),
        ("cuda", (7, 5), "NVIDIA Test has 7.5."),
        ("cuda", (8, 9), None),
        ("cuda", (9, 0), None),
        ("cuda", (10, 0), None),
    ],
)
def test_a_device_without_fp8_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int] | None, told: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    where, stage = torch.device(device), stage_of(fp8=True, precision="auto")
    refuse_fp8_where_it_cannot_be(stage_of(), "stages.sft", where)
    if told is None:
        refuse_fp8_where_it_cannot_be(stage, "stages.sft", where)
        return
    with pytest.raises(UserError) as error:
        refuse_fp8_where_it_cannot_be(stage, "stages.sft", where)
    assert error.value.problem.startswith("stages.sft.fp8 is true, which needs a GPU of compute")
    assert told in error.value.problem
    assert "stages.sft.fp8=false" in error.value.fix


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    with pytest.raises(UserError) as told:
        refuse_fp8_where_it_cannot_be(stage_of(fp8=True, precision="auto"), "stages.sft", torch.device("cuda"))
    assert "graftlm[fp8]" in told.value.fix
    with pytest.raises(UserError, match="FP8 needs torchao"):
        hold_in_fp8(model_of_16s(), emulate=True)
