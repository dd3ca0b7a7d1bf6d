"""Models on disk and in hand: what is read is what was written, and what would be misread is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen2Config

from graftlm.errors import DiskError, UserError
from graftlm.model.causal import (
    body_of,
    check_ids,
    empty_causal,
    find_model,
    head_weight,
    is_tied,
    load_causal,
    model_fingerprint,
    new_causal,
    parameter_count,
    save_causal,
)
from graftlm.model.lora import attach_lora

IDS = torch.tensor([[1, 5, 45, 63, 2]])
INDEX = "model.safetensors.index.json"


def small_model(is_tied=False, seed=0):
    return new_causal(
        num_rows=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24,
        is_tied=is_tied, seed=seed,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A saved model without manifest, as it comes from elsewhere."""
    save_causal(small_model(), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """The same in several files."""
    save_causal(small_model(), tmp_path / "sharded", max_shard="10KB")
    (tmp_path / "sharded" / "manifest.json").unlink()
    return tmp_path / "sharded"


def refusal(folder) -> UserError:
    with pytest.raises(UserError) as error:
        load_causal(folder)
    assert error.value.fix
    assert "\n" not in error.value.problem + error.value.fix
    return error.value


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_model_loads_as_it_was(tmp_path, tied, max_shard, dtype):
    model = small_model(tied)
    files = save_causal(model, tmp_path / "m", max_shard, dtype=dtype)
    assert model.dtype == torch.float32 == model.config.dtype
    loaded = load_causal(tmp_path / "m", dtype=None)
    assert loaded.dtype == (dtype or torch.float32)
    assert is_tied(loaded) is tied is (head_weight(loaded) is loaded.get_input_embeddings().weight)
    for (name, saved), (other, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(saved.to(loaded.dtype), found)
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert {name: fact["sha256"] for name, fact in manifest.items()} == files
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=loaded.dtype)
    assert torch.equal(plain(IDS).logits, loaded(IDS).logits)


def test_new_models_follow_their_seed_and_nothing_else():
    first = small_model(seed=3).state_dict()
    torch.randn(5)
    again, other = small_model(seed=3).state_dict(), small_model(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    with pytest.raises(UserError, match="does not divide"):
        new_causal(num_rows=8, hidden_size=10, num_layers=1, num_heads=3, intermediate_size=8)


@pytest.mark.parametrize("tied", [False, True])
def test_body_and_head_give_the_logits(tied):
    model = small_model(tied).eval()
    for wrapped in (model, attach_lora(model, rank=2, alpha=4).eval()):
        with torch.no_grad():
            hidden = body_of(wrapped)(IDS).last_hidden_state
            assert torch.equal(hidden @ head_weight(wrapped).T, wrapped(IDS).logits)


def test_every_row_learns_even_that_of_the_pad_id(folder):
    """T3: pad = eos must not take the end token's gradient away."""
    edit_json(folder / "config.json", pad_token_id=2)
    model = load_causal(folder)
    model(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad[5].any()
    model(torch.tensor([[5, 2, 6]]), labels=torch.tensor([[5, 2, 6]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].any()


def test_meta_models_count_without_numbers(folder):
    config = LlamaConfig(vocab_size=49_954, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)
    assert parameter_count(empty_causal(config)) == 6_885_494_784
    empty = empty_causal(folder)
    assert empty.device.type == "meta"
    assert parameter_count(empty) == parameter_count(small_model())
    assert parameter_count(small_model(True)) == parameter_count(small_model()) - 64 * 16


def test_too_many_ids_are_told(folder):
    """T1: 65 ids against 64 rows."""
    check_ids(empty_causal(folder), 64)
    for holder in (empty_causal(folder), empty_causal(folder).config):
        with pytest.raises(UserError, match="65 ids, the model 64 rows: 1 too few") as error:
            check_ids(holder, 65)
        assert "graftlm expand" in error.value.fix


def test_a_truncated_file_is_refused(folder, sharded):
    """C1: by the sizes its own header tells, with no manifest needed."""
    for path in (folder / "model.safetensors", sorted(sharded.glob("*.safetensors"))[1]):
        whole = path.read_bytes()
        for length in (len(whole) - 1, len(whole) // 2, 100, 8, 7, 0):
            path.write_bytes(whole[:length])
            assert path.name in refusal(path.parent).problem
        path.write_bytes(whole + b"\0")
        assert path.name in refusal(path.parent).problem


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2]}}', b"\xff\xfe"])
def test_a_damaged_header_is_refused(folder, header):
    """C1: whatever stands in the header, two lines and no traceback."""
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors" in refusal(folder).problem


def test_flipped_bits_are_refused(tmp_path):
    """C2: one bit, in weights or config, against the manifest written with them."""
    save_causal(small_model(), tmp_path / "m")
    for name in ("model.safetensors", "config.json"):
        path = tmp_path / "m" / name
        whole = path.read_bytes()
        middle = len(whole) - 5
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        if name == "config.json" and b"vocab_size" not in path.read_bytes():
            pytest.skip("the flip broke the config beyond reading")
        assert name in refusal(tmp_path / "m").problem
        path.write_bytes(whole)
    load_causal(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    assert "generation_config.json" in refusal(tmp_path / "m").problem


def test_weights_added_beside_a_manifest_are_refused(tmp_path):
    """C2: a shard that was not written with the rest."""
    save_causal(small_model(), tmp_path / "m")
    save_file({"x": torch.zeros(1)}, tmp_path / "m" / "extra.safetensors")
    assert "extra.safetensors" in refusal(tmp_path / "m").problem


def test_missing_foreign_and_misshapen_tensors_are_refused(folder):
    """C3: transformers fills a missing tensor at random; here it is named."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.1.mlp.up_proj.weight"

    def with_tensors(changed):
        save_file(changed, path, metadata={"format": "pt"})
        return refusal(folder).problem

    assert lost in with_tensors({name: t for name, t in tensors.items() if name != lost})
    assert "lm_head.weight" in with_tensors({name: t for name, t in tensors.items() if name != "lm_head.weight"})
    assert "q_proj.bias" in with_tensors({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)})
    assert "[63, 16]" in with_tensors({**tensors, "lm_head.weight": torch.zeros(63, 16)})
    assert "I8" in with_tensors({**tensors, "lm_head.weight": torch.zeros(64, 16, dtype=torch.int8)})
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file({**tensors, **old_buffer}, path, metadata={"format": "pt"})
    load_causal(folder)


def test_a_tied_model_with_a_head_of_its_own_is_refused(folder):
    """C3: config says tied, the file says otherwise."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight differs" in refusal(folder).problem
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert is_tied(load_causal(folder))


def test_shards_missing_outside_or_disagreeing_are_refused(sharded, tmp_path):
    """C4: a missing shard is named; an index may not point out of its folder."""
    index = json.loads((sharded / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(sharded / shard, outside)
    for elsewhere in ("../outside.safetensors", str(outside), "a/b.safetensors", "..", ".hidden.safetensors"):
        changed = {**index["weight_map"], name: elsewhere}
        (sharded / INDEX).write_text(json.dumps({**index, "weight_map": changed}))
        assert "outside the folder" in refusal(sharded).problem
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: "x.bin"}}))
    assert "not a safetensors file" in refusal(sharded).problem
    for bad in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["b"]}}, []):
        (sharded / INDEX).write_text(json.dumps(bad))
        assert "no usable weight_map" in refusal(sharded).problem
    other = next(s for s in index["weight_map"].values() if s != shard)
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: other}}))
    assert name in refusal(sharded).problem
    (sharded / INDEX).write_text(json.dumps(index))
    load_causal(sharded)
    (sharded / shard).unlink()
    assert shard in refusal(sharded).problem


def test_pickled_weights_are_refused_unread(folder):
    """C5: the pickle here would raise a flag when read."""

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was read",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    problem = refusal(folder).problem
    assert "pickled" in problem
    assert "pytorch_model.bin" in problem


def test_code_in_the_folder_never_runs(folder, capsys, monkeypatch):
    """C6: auto_map and its file are told of and left alone."""
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(folder / "config.json", auto_map=auto_map)
    assert type(load_causal(folder)).__module__.startswith("transformers.models.llama")
    assert "auto_map" in capsys.readouterr().err
    edit_json(folder / "config.json", model_type="evil")
    assert "'evil'" in refusal(folder).problem


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "type None"),
        ('{"model_type": "bert"}', "'bert'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 0}', "config.json"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "quantised"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(folder, content, text):
    (folder / "config.json").write_text(content)
    assert text in refusal(folder).problem


def test_what_is_no_model_folder_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty").problem
    for missing in (tmp_path / "nowhere", "nowhere", "a/b/c", ""):
        with pytest.raises(UserError, match=r"no model folder|no config"):
            find_model(missing) and load_causal(missing)
    BertConfig().save_pretrained(tmp_path / "bert")
    assert "not a Llama-like decoder" in refusal(tmp_path / "bert").problem
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path / "weightless")
    assert "holds no weights" in refusal(tmp_path / "weightless").problem


def test_the_hub_out_of_reach_is_two_lines(monkeypatch):
    """U1: with the hub cut off, the message says what to do instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="someone/model is neither a folder here nor") as error:
        load_causal("someone/model")
    assert "give the folder's path" in error.value.fix


def test_the_fingerprint_is_of_the_weights_however_they_are_sharded(folder, sharded, tmp_path):
    save_causal(small_model(seed=1), tmp_path / "other")
    assert model_fingerprint(folder) == model_fingerprint(sharded)
    assert model_fingerprint(folder) != model_fingerprint(tmp_path / "other")


def test_saving_replaces_an_earlier_model_and_leaves_other_files(tmp_path):
    folder = tmp_path / "2-base"
    folder.mkdir()
    (folder / "started.json").write_text("{}")
    save_causal(small_model(), folder, max_shard="10KB")
    save_causal(small_model(seed=1), folder)
    assert not (folder / INDEX).exists()
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "started.json").exists()
    assert torch.equal(head_weight(load_causal(folder)), head_weight(small_model(seed=1)))


def test_a_failed_save_leaves_nothing_half_written(tmp_path):
    """D1: the earlier model stays whole, and no scratch folder is left behind."""
    save_causal(small_model(), tmp_path / "m")

    def no_space(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="bytes free"):
        save_causal(small_model(seed=1), tmp_path / "m", also=no_space)
    assert torch.equal(head_weight(load_causal(tmp_path / "m")), head_weight(small_model()))
    with pytest.raises(DiskError):
        save_causal(small_model(), tmp_path / "fresh", also=no_space)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_one_bad_byte_anywhere_is_refused_or_harmless(tmp_path):
    """C2: 40 flips over the whole folder; the manifest notices every one."""
    save_causal(small_model(), tmp_path / "m", max_shard="10KB")
    generator = torch.Generator().manual_seed(0)
    paths = [p for p in sorted((tmp_path / "m").iterdir()) if p.name != "manifest.json"]
    for _ in range(40):
        path = paths[int(torch.randint(len(paths), (1,), generator=generator))]
        whole = path.read_bytes()
        place = int(torch.randint(len(whole), (1,), generator=generator))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refusal(tmp_path / "m")
        path.write_bytes(whole)
    load_causal(tmp_path / "m")
