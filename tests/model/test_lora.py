"""LoRA: what learns, how it is saved for plain PEFT, that it is refused on another base, and merged exactly."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftlm.errors import NumericalStop, UserError
from graftlm.model.causal import (
    body_of,
    head_weight,
    load_causal,
    new_causal,
    save_causal,
)
from graftlm.model.lora import attach_lora, load_adapter, merge_lora, save_adapter
from graftlm.model.rows import join_rows, parameter_groups_by_role, split_rows

NUM_OLD, NUM_ROWS = 40, 64
IDS = torch.tensor([[1, 5, 45, 63, 39, 40, 2]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    """A saved base model's folder."""
    save_causal(small_model(request.param), tmp_path / "base")
    return tmp_path / "base"


def small_model(is_tied=False, seed=0):
    return new_causal(
        num_rows=NUM_ROWS, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, is_tied=is_tied, seed=seed
    )


def logits_of(model):
    with torch.no_grad():
        return body_of(model.eval())(IDS).last_hidden_state @ head_weight(model).T


def trained(base, rows="all", **lora):
    """A model on `base` after a few steps with adapters and, where asked, rows."""
    model = attach_lora(load_causal(base), rank=4, alpha=8, **lora)
    if rows != "none":
        split_rows(model, NUM_OLD)
        roles = parameter_groups_by_role(model)
        for role in ("new_rows", "old_rows") if rows == "all" else ("new_rows",):
            for _, parameter in roles[role]:
                parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        hidden = body_of(model)(IDS).last_hidden_state[0, :-1]
        torch.nn.functional.cross_entropy(hidden @ head_weight(model).T, IDS[0, 1:]).backward()
        optimizer.step()
    return model


def test_fresh_adapters_change_nothing_and_only_they_learn():
    model = small_model()
    before = logits_of(model)
    adapted = attach_lora(model, rank=4, alpha=8, seed=3)
    assert torch.equal(logits_of(adapted), before)
    assert all(".lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert len(parameter_groups_by_role(adapted)["adapter"]) == 2 * 7 * 2
    same = attach_lora(small_model(), rank=4, alpha=8, seed=3)
    other = attach_lora(small_model(), rank=4, alpha=8, seed=4)
    drawn = [dict(parameter_groups_by_role(m)["adapter"]) for m in (adapted, same, other)]
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("lm_head",), ("embed_tokens",), ()])
def test_a_target_that_is_no_layer_of_the_body_is_refused(targets):
    with pytest.raises(UserError, match="LoRA cannot be put on") as error:
        attach_lora(small_model(), rank=4, alpha=8, targets=targets)
    assert "q_proj" in error.value.fix


@pytest.mark.parametrize("rows", ["all", "new", "none"])
@pytest.mark.parametrize("lora", [{}, {"rslora": True, "dropout": 0.1}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_equals_adapter(base, rows, lora):
    """N4: merged = adapter within 1e-4, embedding and head included."""
    model = trained(base, rows, **lora)
    adapted = logits_of(model)
    assert (adapted - logits_of(load_causal(base))).abs().max() > 0.05, "training did nothing: the test proves nothing"
    rows_before = head_weight(model).detach().clone(), model.get_input_embeddings().weight.detach().clone()
    merged = merge_lora(model)
    if rows != "none":
        join_rows(merged)
    assert (logits_of(merged) - adapted).abs().max() < 1e-4
    assert torch.equal(head_weight(merged), rows_before[0])
    assert torch.equal(merged.get_input_embeddings().weight, rows_before[1])
    assert {name for name, _ in merged.named_parameters()} == {n for n, _ in load_causal(base).named_parameters()}
    save_causal(merged, base.parent / "merged")
    assert (logits_of(load_causal(base.parent / "merged")) - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("rows", ["all", "new", "none"])
@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_plain_peft_reads_the_saved_adapter(base, tmp_path, rows, lora):
    """N4: the saved adapter gives the trained model's logits through plain PEFT, rows included."""
    model = trained(base, rows, **lora)
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", base)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (plain(IDS).logits - expected).abs().max() < 1e-4
    ours = load_adapter(load_causal(base), tmp_path / "adapter")
    assert (logits_of(ours) - expected).abs().max() < 1e-4
    merged = merge_lora(ours)
    assert (logits_of(merged) - expected).abs().max() < 1e-4
    save_causal(merged, tmp_path / "merged")
    assert (logits_of(load_causal(tmp_path / "merged")) - expected).abs().max() < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (None if rows == "none" else ["embed_tokens", "lm_head"])


def test_an_adapter_on_another_base_is_refused(tmp_path):
    """C8: an adapter is refused on a base with other weights, and on one with a row more."""
    save_causal(small_model(), tmp_path / "base")
    model = trained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    save_causal(small_model(seed=1), tmp_path / "other")
    with pytest.raises(UserError, match="belongs to another base"):
        load_adapter(load_causal(tmp_path / "other"), tmp_path / "adapter")
    wider = new_causal(num_rows=NUM_ROWS + 1, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    save_causal(wider, tmp_path / "wider")
    with pytest.raises(UserError, match="belongs to another base"):
        load_adapter(load_causal(tmp_path / "wider"), tmp_path / "adapter")


def test_damaged_adapters_are_refused(tmp_path):
    """C1 C2 C3 C5 of an adapter: cut short, changed, lacking a tensor, or pickled."""
    save_causal(small_model(), tmp_path / "base")
    folder = tmp_path / "adapter"
    save_adapter(trained(tmp_path / "base"), folder, tmp_path / "base")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def refusal():
        with pytest.raises(UserError) as error:
            load_adapter(load_causal(tmp_path / "base"), folder)
        return error.value.problem

    weights.write_bytes(whole[:-4])
    assert "bytes" in refusal()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "changed since it was written" in refusal()
    tensors = load_file(weights)
    lost = sorted(tensors)[0]
    save_file({name: t for name, t in tensors.items() if name != lost}, weights)
    (folder / "manifest.json").unlink()
    assert lost in refusal()
    weights.rename(folder / "adapter_model.bin")
    assert "adapter_model.safetensors" in refusal()


def test_a_merge_that_is_not_finite_stops():
    model = attach_lora(small_model(), rank=4, alpha=8)
    with torch.no_grad():
        parameter_groups_by_role(model)["adapter"][0][1].fill_(float("inf"))
    with pytest.raises(NumericalStop, match="not finite"):
        merge_lora(model)
