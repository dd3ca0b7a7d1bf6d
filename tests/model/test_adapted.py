"""Adapted layers in training: what PEFT's own compute, its modules back, and a dropout that drops as it should."""

import math
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch

from graftlm.model.adapted import AdaptedLinear, dropped, has_plain_adapter, zeroed_places
from graftlm.model.causal import body_of
from graftlm.model.lean import make_lean
from graftlm.model.lora import attach_lora
from tests.training.tiny_training import tiny_model

# Of the norm: in 16 bits the sum of layer and adapter is rounded at other places.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
POSITIONS = 9


def adapted_model(**lora: Any) -> Any:
    """A tiny model whose adapters have learned something."""
    torch.manual_seed(1)
    model = attach_lora(tiny_model(), rank=4, **{"alpha": 7.0, **lora})
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def layer_of(model: Any, name: str = "q_proj") -> Any:
    return getattr(body_of(model).layers[0].self_attn, name)


def output_and_gradients(layer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of x and of both adapter matrices, after x went through and a gradient came back."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(2)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, POSITIONS, layer.base_layer.in_features, generator=generator, dtype=wide).requires_grad_()
    with torch.autocast("cpu", dtype=dtype if dtype != wide else torch.bfloat16, enabled=dtype != wide):
        output = layer(x)
    output.backward(torch.randn(output.shape, generator=generator, dtype=wide).to(output.dtype))
    return [output, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]  # type: ignore


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_equals_pefts_own_layer(dtype: torch.dtype, rslora: bool) -> None:
    own = layer_of(adapted_model(rslora=rslora)).to(torch.promote_types(dtype, torch.float32))
    expected = [x.detach().clone() for x in output_and_gradients(own, dtype)]
    found = output_and_gradients(AdaptedLinear(own), dtype)
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == reference.dtype
        assert reference.abs().max() > 0
        assert (mine - reference).norm() <= TOLERANCES[dtype] * reference.norm()


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_with_dropout_it_is_pefts_layer_of_the_numbers_that_were_kept(share: float) -> None:
    """To 1e-12: with the mask that was drawn put before PEFT's adapter, output and gradients are the same."""
    own = layer_of(adapted_model(dropout=share)).double().train()
    layer = AdaptedLinear(own).train()
    torch.manual_seed(5)
    found = output_and_gradients(layer, torch.float64)
    torch.manual_seed(5)
    mask, kept = dropped(torch.ones(2, POSITIONS, own.base_layer.in_features, dtype=torch.float64), share)
    own.lora_dropout["default"] = Masked(mask / kept)
    for mine, reference in zip(found, output_and_gradients(own, torch.float64), strict=True):
        assert (mine - reference).norm() <= 1e-12 * reference.norm()


class Masked(torch.nn.Module):
    """Dropout whose mask is known."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 0.9])
def test_about_the_share_asked_for_is_dropped_and_the_rest_is_untouched(share: float) -> None:
    count = 400_003
    x = torch.arange(1.0, count + 1)
    torch.manual_seed(0)
    found, kept = dropped(x, share)
    is_zeroed = found == 0
    assert torch.equal(found[~is_zeroed], x[~is_zeroed])
    assert kept == 1 - share
    # Five standard deviations of a share of independent draws; neighbours, cut from one draw, are independent too.
    assert abs(is_zeroed.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / count)
    both = (is_zeroed[1:] & is_zeroed[:-1]).double().mean()
    assert abs(both - share**2) <= 5 * math.sqrt(share**2 / count)
    assert not torch.equal(dropped(x, share)[0], found)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_every_place_is_drawn_alike_and_by_itself(share: float) -> None:
    """The first and the last as often as any other; of short and of long gaps as many as there should be."""
    count, rounds = 40, 20_000
    torch.manual_seed(1)
    drawn = torch.zeros(rounds, count)
    for row in drawn:
        places = zeroed_places(count, share)
        assert (places[1:] > places[:-1]).all()
        row[places] = 1.0
    deviation = math.sqrt(share * (1 - share) / rounds)
    assert ((drawn.mean(0) - share).abs() <= 5 * deviation).all()
    together = drawn.T @ drawn / rounds
    apart = together[~torch.eye(count, dtype=torch.bool)]
    assert ((apart - share**2).abs() <= 5.5 * math.sqrt(share**2 / rounds)).all()


def test_as_many_draws_are_taken_as_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a first lot does not reach the end, another follows."""
    real, sizes = torch.rand, []

    def few(size: int) -> torch.Tensor:
        sizes.append(size)
        return real(3)

    monkeypatch.setattr(torch, "rand", few)
    places = zeroed_places(400, 0.5)
    assert len(sizes) > 20
    assert places.max() < 400
    assert (places[1:] > places[:-1]).all()
    assert abs(len(places) - 200) < 60


def test_dropout_is_for_training_alone_and_drawn_by_each_layer_for_itself() -> None:
    model = adapted_model(dropout=0.5)
    make_lean(body_of(model))
    layer, other = layer_of(model), layer_of(model, "o_proj")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, layer.base_layer.in_features)
    model.eval()
    assert torch.equal(layer(x), other(x))
    model.train()
    assert not torch.equal(layer(x), other(x))


def test_nearly_everything_may_be_dropped_and_nothing_of_nothing() -> None:
    assert (dropped(torch.ones(1000), 0.999_999)[0] == 0).float().mean() > 0.99
    assert dropped(torch.ones(0, 4), 0.5)[0].shape == (0, 4)


def test_pefts_own_modules_come_back_with_what_was_learned() -> None:
    model = adapted_model()
    names = [name for name, _ in model.named_parameters()]
    own = layer_of(model)
    lean = make_lean(body_of(model))
    assert isinstance(layer_of(model), AdaptedLinear)
    assert [name for name, _ in model.named_parameters()] == names
    other = deepcopy(layer_of(model).base_layer)
    layer_of(model).base_layer = other
    lean.restore()
    assert layer_of(model) is own
    assert own.base_layer is other


def test_adapters_under_dora_stay_pefts() -> None:
    model = adapted_model(dora=True)
    assert not has_plain_adapter(layer_of(model))
    own = layer_of(model)
    make_lean(body_of(model))
    assert layer_of(model) is own


def test_peft_is_imported_only_where_there_is_an_adapter() -> None:
    """It takes more than a second to import, and memory for as long as a stage runs."""
    code = "import sys, graftlm.training.stage; sys.exit('peft' in sys.modules or 'bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
