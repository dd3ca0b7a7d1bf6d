"""The variable-length kernel is given what makes it equal attention by groups of rows.

No GPU is needed: a plain kernel of the same meaning stands in for torch's. Torch's own is held to the groups where a
GPU of compute capability 8.0 or later is found, else that test is skipped.
"""

from functools import partial
from typing import Any

import pytest
import torch

from graftlm.model import packed
from graftlm.model.grouped import attend_by_autograd
from graftlm.model.packed import make_layout, packed_attention
from graftlm.model.rotary import Rotation, rotated
from graftlm.model.varlen import make_bounds, runs_varlen, varlen_attention

LENGTHS = [5, 1, 9, 4, 9, 2]
CPU = torch.device("cpu")


def plain_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
    most_queries: int, most_keys: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention's meaning of a causal window: the last query sees the last key, each before it one key less."""
    assert window_size == (-1, 0)
    assert queries.dtype == keys.dtype == torch.int32
    assert most_queries == int(queries.diff().max())
    assert most_keys == int(keys.diff().max())
    parts = []
    for row in range(len(queries) - 1):
        q, k, v = (
            x[int(at[row]) : int(at[row + 1])].transpose(0, 1)[None]
            for x, at in ((query, queries), (key, keys), (value, keys))
        )
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def heads(num_tokens: int, kv_heads: int, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return [
        torch.randn(num_tokens, count, 8, dtype=torch.float64).to(device, dtype).requires_grad_()
        for count in (4, kv_heads, kv_heads)
    ]


def by_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_shared: int) -> torch.Tensor:
    layout = make_layout(LENGTHS, query.device, num_shared)
    across = (x.transpose(0, 1)[None] for x in (query, key, value))
    return packed_attention(torch.nn.Identity(), *across, None, scaling=0.3, layout=layout)[0][0]


@pytest.mark.parametrize("num_shared", [0, 7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_call_equals_attention_by_groups(kv_heads: int, num_shared: int) -> None:
    tensors = heads(num_shared + sum(LENGTHS), kv_heads)
    weights = torch.randn_like(tensors[0])
    found = []
    for attended in (
        by_groups(*tensors, num_shared),
        varlen_attention(*tensors, make_bounds(LENGTHS, num_shared, CPU), 0.3, plain_kernel),
    ):
        gradients = torch.autograd.grad((attended * weights).sum(), tensors)
        found.append([attended, *gradients])
    for expected, given in zip(*found, strict=True):
        assert torch.allclose(given, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", ["by groups", "by autograd", "in one call"])
def test_rotating_on_the_way_equals_rotating_before(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    tensors = heads(7 + sum(LENGTHS), 2)
    angles = torch.rand(7 + sum(LENGTHS), 8, dtype=torch.float64)
    rotation = Rotation(angles.cos(), angles.sin())
    query, key, value = tensors
    expected = by_groups(rotated(query, rotation), rotated(key, rotation), value, 7)
    if way == "by autograd":
        monkeypatch.setattr(packed, "attend_in_groups", attend_by_autograd)
    elif way == "in one call":
        monkeypatch.setattr(packed, "runs_varlen", lambda *_: True)
        monkeypatch.setattr(packed, "varlen_attention", partial(varlen_attention, kernel=plain_kernel))
    layout = make_layout(LENGTHS, CPU, 7)
    found = packed.attend_rotating(*tensors, rotation, layout, 0.3, at_labels=False)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((attended * weights).sum(), tensors) for attended in (found, expected))
    for given, plain in zip((found, *next(gradients)), (expected, *next(gradients)), strict=True):
        assert torch.allclose(given, plain, rtol=1e-12, atol=1e-13)


def test_what_the_kernel_cannot_take_goes_by_groups() -> None:
    assert not runs_varlen(CPU, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "runs"),
    [
        ((9, 0), torch.bfloat16, 128, True),
        ((8, 0), torch.float16, 64, True),
        ((7, 0), torch.float16, 64, False),
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 60, False),
        ((9, 0), torch.bfloat16, 512, False),
    ],
)
def test_the_kernel_is_chosen_by_what_a_gpu_can_do(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, head_size: int, runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert runs_varlen(torch.device("cuda"), dtype, head_size) is runs


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU from 8.0 on"
)
@pytest.mark.parametrize("num_shared", [0, 7])
def test_torchs_kernel_equals_attention_by_groups(num_shared: int) -> None:
    device = torch.device("cuda")
    wide = heads(num_shared + sum(LENGTHS), 2, device, torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    expected = by_groups(*wide, num_shared)
    given = varlen_attention(*narrow, make_bounds(LENGTHS, num_shared, device), 0.3)
    weights = torch.randn_like(expected)
    assert (given - expected).norm() / expected.norm() < 1e-2
    for rough, exact in zip(
        torch.autograd.grad((given * weights).sum(), narrow),
        torch.autograd.grad((expected * weights).sum(), wide),
        strict=True,
    ):
        assert (rough - exact).norm() / exact.norm() < 2e-2
