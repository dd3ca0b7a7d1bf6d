"""One tensor at a time: the same logits and files as transformers', in the memory of one matrix."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graftlm.device import forget_peak_memory, peak_memory_bytes
from graftlm.errors import NumericalStop
from graftlm.model.causal import new_causal, save_causal
from graftlm.model.tensors import source_of_folder, source_of_model, streamed_logits, write_source
from graftlm.model.weights import stored_tensors, tensor_sha256

CPU = torch.device("cpu")
ROWS = [[1, 5, 9, 30, 2], [7], list(range(3, 40))]


def model_of(kind: str, **settings):
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **settings,
    )  # fmt: skip
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_logits_are_the_models_own(kind: str, tied: bool) -> None:
    model = model_of(kind, tie_word_embeddings=tied)
    source = source_of_model(model)
    assert ("lm_head.weight" in source.shapes) is not tied
    with torch.no_grad():
        for ids, logits_TV in zip(ROWS, streamed_logits(source, ROWS), strict=True):
            assert logits_TV.shape == (len(ids), 64)
            torch.testing.assert_close(logits_TV, model(torch.tensor([ids])).logits[0], rtol=0, atol=1e-5)
    assert streamed_logits(source, []) == []


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
def test_what_is_written_is_what_transformers_reads(tmp_path: Path, max_shard_bytes: int) -> None:
    model = model_of("llama")
    (tmp_path / "out").mkdir()
    digests = write_source(source_of_model(model), tmp_path / "out", torch.bfloat16, max_shard_bytes)
    model.config.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) is (max_shard_bytes == 10_000)
    assert all(file.stat().st_size <= max_shard_bytes + 8192 for file in files)  # one tensor may be larger; none is
    assert digests == {name: tensor_sha256(t) for name, t in stored_tensors(tmp_path / "out").items()}
    source = source_of_folder(tmp_path / "out")
    assert torch.equal(source.read("model.norm.weight"), model.model.norm.weight)


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), torch.float32, "not finite"),
        (float("-inf"), torch.bfloat16, "not finite"),
        (7e4, torch.float16, "beyond float16"),
    ],
)
def test_numbers_that_are_none_or_do_not_fit_are_told(
    tmp_path: Path, value: float, dtype: torch.dtype, told: str
) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(NumericalStop, match=rf"layers\.1\.mlp\.up_proj\.weight holds .*{told}"):
        write_source(source_of_model(model), tmp_path, dtype, 10**9)


def test_a_model_far_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """Read, written and run forward: 120 MB of fp32 with at most a third of it held at once."""
    model = new_causal(num_rows=3000, hidden_size=512, num_layers=12, num_heads=4, intermediate_size=1024)
    save_causal(model, tmp_path / "big")
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    del model
    assert num_bytes > 110e6
    source = source_of_folder(tmp_path / "big")
    streamed_logits(source, ROWS)  # what is allocated once and for all is no part of what a model takes
    (tmp_path / "out").mkdir()
    forget_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    write_source(source, tmp_path / "out", torch.float32, 10**9)
    streamed_logits(source, ROWS)
    assert peak_memory_bytes(CPU) - before < num_bytes / 3
