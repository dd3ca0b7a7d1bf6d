"""Packed rows: none sees another, and packing changes neither outputs nor gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from graftlm.errors import UserError
from graftlm.model.packed import attend_packed, make_layout, packed_attention, refuse_longer_rows

LENGTHS = [5, 1, 9, 4, 9, 2]


def body(kv_heads: int) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    return LlamaModel(config).double()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_equals_each_row_alone(kv_heads: int) -> None:
    model = body(kv_heads)
    ids = torch.randint(0, 40, (1, sum(LENGTHS)))
    weights = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    alone = torch.cat([model(row, use_cache=False).last_hidden_state[0] for row in ids.split(LENGTHS, 1)])
    (alone * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    attend_packed(model)
    layout = make_layout(LENGTHS, torch.device("cpu"))
    packed = model(ids, position_ids=layout.positions_1T, use_cache=False, layout=layout).last_hidden_state[0]
    (packed * weights).sum().backward()
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-10, atol=1e-11), name


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_shared_prefix_changes_neither_outputs_nor_gradients(kv_heads: int) -> None:
    model = with_exact_norms(body(kv_heads))
    prefix = torch.randint(0, 40, (1, 7))
    own = torch.randint(0, 40, (1, sum(LENGTHS)))
    weights = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    rows = [torch.cat([prefix, row], dim=1) for row in own.split(LENGTHS, 1)]
    alone = torch.cat([model(row, use_cache=False).last_hidden_state[0, 7:] for row in rows])
    (alone * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    attend_packed(model)
    layout = make_layout(LENGTHS, torch.device("cpu"), num_shared=7)
    ids = torch.cat([prefix, own], dim=1)
    packed = model(ids, position_ids=layout.positions_1T, use_cache=False, layout=layout).last_hidden_state[0, 7:]
    (packed * weights).sum().backward()
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= 1e-12, name


def with_exact_norms(model: LlamaModel) -> LlamaModel:
    """transformers' RMSNorm rounds to float32 inside; gradients of a shared prefix are summed before that rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def test_no_row_sees_another() -> None:
    model = body(4)
    attend_packed(model)
    layout = make_layout(LENGTHS, torch.device("cpu"))
    ids = torch.randint(1, 40, (1, sum(LENGTHS)))
    changed = ids.clone()
    changed[0, 6:15] = 0
    before, after = (
        model(x, position_ids=layout.positions_1T, use_cache=False, layout=layout).last_hidden_state[0]
        for x in (ids, changed)
    )
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[6:15] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[6:15], after[6:15])


def test_groups_cover_every_token_once_with_little_padding() -> None:
    lengths = [int(n) for n in torch.randint(1, 300, (64,), generator=torch.Generator().manual_seed(1))]
    layout = make_layout(lengths, torch.device("cpu"))
    flat = torch.cat([group.queries.flat for group in layout.groups])
    assert torch.equal(flat.sort().values, torch.arange(sum(lengths)))
    padded = sum(group.queries.gather_BL.numel() for group in layout.groups)
    assert padded <= sum(lengths) / 0.8


def test_rows_longer_than_a_sliding_window_are_refused() -> None:
    """Mistral's first model looks 4,096 tokens back, and packed rows know of no window."""
    model = body(4)
    refuse_longer_rows(model, 10**6)
    model.config.sliding_window = 8
    refuse_longer_rows(model, 8)
    with pytest.raises(UserError, match="reaches 8 back") as told:
        refuse_longer_rows(model, 9)
    assert "data.max_tokens=8" in told.value.fix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_autocast_leaves_attention_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = make_layout([9, 4, 7], torch.device("cpu"), num_shared=3)
    query, key, value = (torch.randn(1, 2, 23, 8) for _ in range(3))
    expected, _ = packed_attention(torch.nn.Identity(), query, key, value, None, scaling=0.4, layout=layout)
    with torch.autocast("cpu", dtype=dtype):
        found, _ = packed_attention(torch.nn.Identity(), query, key, value, None, scaling=0.4, layout=layout)
    assert torch.equal(found, expected)
    halves = (x.to(dtype) for x in (query, key, value))
    found, _ = packed_attention(torch.nn.Identity(), *halves, None, scaling=0.4, layout=layout)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=3e-2 if dtype == torch.bfloat16 else 4e-3)
