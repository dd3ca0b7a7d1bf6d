"""What is computed number by number: compiled, it equals what is written; where torch cannot compile, it says so."""

from typing import Any

import pytest
import torch

from graftlm.errors import UserError
from graftlm.model import pointwise
from graftlm.model.pointwise import AS_WRITTEN, Pointwise, compiled

# Of a result's largest entry. Compiled functions of 16 bits round once where torch's own round after every operation.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6}


@pytest.fixture
def kernels() -> Pointwise:
    torch._dynamo.reset()  # it compiles a function for so many kinds of input and no more
    try:
        return compiled("cpu")
    except UserError as error:
        pytest.skip(str(error))


def inputs(name: str, length: int, dtype: torch.dtype) -> list[Any]:
    """Numbers to call the function of this name with: `length` positions of 24 numbers, 3 heads of 8."""
    torch.manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)
    grad, x, other = torch.randn(3, 1, length, 24, dtype=wide).to(dtype)
    if name.startswith("normed"):
        weight, factor = torch.rand(24, dtype=wide), torch.rand(1, length, 1, dtype=wide)
        return [x, weight, 1e-5] if name == "normed" else [grad, x, weight, factor, True]
    if name.startswith("gated"):
        return [grad, x] if name == "gated" else [grad, x, other]
    cos_TD, sin_TD = torch.randn(2, length, 8, dtype=wide)
    return [x.view(length, 3, 8), cos_TD, sin_TD]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", Pointwise.__slots__)
def test_compiled_equals_written(kernels: Pointwise, name: str, dtype: torch.dtype) -> None:
    given = inputs(name, 130, dtype)
    found, expected = (getattr(one, name)(*given) for one in (kernels, AS_WRITTEN))
    as_tuples = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
    for a, b in zip(*as_tuples, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= TOLERANCES[dtype] * b.abs().max()


def test_one_kernel_for_all_lengths(kernels: Pointwise) -> None:
    """A run that goes on elsewhere must round as it did: a position's result does not hang on how many there are."""
    x, weight, eps = inputs("normed", 130, torch.float32)
    whole, _ = kernels.normed(x, weight, eps)
    part, _ = kernels.normed(x[:, :77].clone(), weight, eps)
    assert torch.equal(whole[:, :77], part)


def test_squares_too_large_are_not_a_number(kernels: Pointwise) -> None:
    x = torch.full((1, 2, 24), 1e20)
    output, factor = kernels.normed(x, torch.ones(24), 1e-5)
    assert (output == 0).all()
    assert factor.isnan().all()


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(pointwise.torch, "compile", fails)
    monkeypatch.setattr(pointwise, "_kernels", pointwise._kernels.__wrapped__)
    with pytest.raises(UserError) as told:
        compiled("cpu", "stages.lora")
    assert "stages.lora.compile is true, and torch cannot compile here: No working C++ compiler found" in str(
        told.value
    )
    assert "stages.lora.compile=false" in told.value.fix
