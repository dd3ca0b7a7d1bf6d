"""A base from nothing: it loads like any other, is the same for the same seed, and its text is read or told."""

from pathlib import Path

import pytest
import torch

from graftlm.errors import UserError
from graftlm.model.causal import load_causal, model_fingerprint
from graftlm.recipe import Scratch
from graftlm.run import read_metrics
from graftlm.text.tokenizer import load_tokenizer
from graftlm.training.scratch import build_scratch_base

TEXT = "\n\n".join(
    f"The {a} {v} the {b}." for a in ("cat", "dog", "bird") for v in ("sees", "likes") for b in ("sea", "sun")
)


def scratch(folder: Path) -> Scratch:
    (folder / "en.txt").write_text(TEXT, encoding="utf-8")
    training = {
        "name": "pretrain", "trains": {"kind": "full"}, "objective": "text", "batch_rows": 4, "precision": "fp32",
        "peak_lr": 1e-2, "micro_batch_tokens": 64,
    }  # fmt: skip
    return Scratch.model_validate(
        {
            "text": [str(folder / "en.txt")], "heldout": [str(folder / "en.txt")], "num_pieces": 290, "hidden_size": 8,
            "intermediate_size": 12, "num_layers": 1, "num_heads": 2, "row_tokens": 16, "training": training,
        }
    )  # fmt: skip


def test_a_small_base_is_built_the_same_again(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        facts = build_scratch_base(scratch(tmp_path), seed, tmp_path / name, torch.device("cpu"))
        prints.append(model_fingerprint(tmp_path / name / "model"))
    assert prints[0] == prints[1] != prints[2]
    tokenizer, model = load_tokenizer(tmp_path / "a" / "model"), load_causal(tmp_path / "a" / "model")
    assert len(model.get_input_embeddings().weight) == tokenizer.num_pieces == facts["num_pieces"]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    losses = [line["loss"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if line["event"] == "step"]
    assert losses[-1] < losses[0]
    assert facts["num_steps"] == len(losses)


def test_a_second_base_into_a_finished_folder_trains_no_more(tmp_path: Path) -> None:
    section = scratch(tmp_path)
    build_scratch_base(section, 1, tmp_path / "a", torch.device("cpu"))
    before = model_fingerprint(tmp_path / "a" / "model")
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    build_scratch_base(section, 1, tmp_path / "a", torch.device("cpu"))
    assert model_fingerprint(tmp_path / "a" / "model") == before
    assert read_metrics(tmp_path / "a" / "metrics.jsonl") == lines


@pytest.mark.parametrize(
    ("name", "told"),
    [("gbk.txt", r"gbk\.txt:1: not UTF-8 \(byte 0xd6\)"), ("none.txt", "cannot be read"), (".", "cannot be read")],
)
def test_text_that_cannot_be_read_is_told(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "gbk.txt").write_bytes("中文".encode("gb18030"))
    section = scratch(tmp_path).model_copy(update={"text": (str(tmp_path / name),)})
    with pytest.raises(UserError, match=told):
        build_scratch_base(section, 1, tmp_path / "a", torch.device("cpu"))
