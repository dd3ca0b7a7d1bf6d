"""Checking any two tokenizers: a graft passes, anything else is told what drifts, with examples."""

from pathlib import Path

import pytest
from small_tokenizers import ENGLISH, sentences, write_lines

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.text.tokenizer import check as check_module
from graftlm.text.tokenizer import check_tokenizers, graft_tokenizer, load_tokenizer, train_base_tokenizer
from graftlm.text.tokenizer.graft import GraftReport
from graftlm.text.tokenizer.sentencepiece_graft import append_pieces


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "NUM_FUZZED_TEXTS", 200)


def test_a_graft_passes(llama_like: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    english = write_lines(tmp_path / "en.txt", ENGLISH)
    report = graft_tokenizer(llama_like, Section(text=(text,), num_pieces=30), tmp_path / "new")
    found = check_tokenizers(llama_like, tmp_path / "new", [text, english])
    assert found["is_graft"]
    assert found["is_exact"]
    assert found["script"] == ("Han",)
    counts = ("num_old", "num_new", "num_total", "expand_violations", "engine_disagreements", "roundtrip_failures",
              "old_texts_changed", "unreachable_pieces", "old_ids_moved")  # fmt: skip
    wanted = (report.num_old, report.num_new, report.num_total, 0, 0, 0, 0, 0, 0)
    assert tuple(found[name] for name in counts) == wanted
    assert set(GraftReport.__slots__) - {"mode", "first_new_id", "dropped", "notes"} <= set(found)
    assert found["drift"][english] == {
        "num_texts": 80, "num_changed": 0, "num_changed_without_script": 0, "share_changed": 0.0,
    }  # fmt: skip
    assert found["drift"][text]["num_changed"] == 120
    assert found["chars_per_token"]["new"] > found["chars_per_token"]["old"]
    assert found["drift_examples"] == []


def test_a_careless_extension_is_told_with_examples(llama_like: Path, tmp_path: Path) -> None:
    """The published merge's fault: old ids stay, and old text is cut differently all the same."""
    careless = append_pieces(load_tokenizer(llama_like), ["天气", "te"], lambda k: 0.0 - k, None)
    careless.expansions, careless.graft = {}, None
    careless.save(tmp_path / "careless")
    english = write_lines(tmp_path / "en.txt", ENGLISH)
    found = check_tokenizers(llama_like, tmp_path / "careless", [english])
    assert (found["is_graft"], found["is_exact"]) == (False, False)
    assert (found["old_ids_moved"], found["num_new"], found["script"]) == (0, 2, ("Han",))
    assert found["drift"][english]["num_changed_without_script"] == 80
    assert found["old_texts_changed"] >= 80
    example = found["drift_examples"][0]
    assert "te" in example["new"]
    assert "te" not in example["old"]


def test_unrelated_tokenizers_are_compared_all_the_same(llama_like: Path, llama3_like: Path, tmp_path: Path) -> None:
    other = train_base_tokenizer(["quite other words here"] * 9, 290, tmp_path / "other")
    for new in (llama3_like, tmp_path / "other"):
        found = check_tokenizers(llama_like, new)
        assert (found["is_graft"], found["is_exact"]) == (False, False)
        assert found["old_ids_moved"] > 0
        assert found["old_texts_changed"] > 10
        assert found["drift_examples"]
    assert found["num_total"] == other.num_pieces


def test_a_tokenizer_passes_against_itself(llama_like: Path) -> None:
    found = check_tokenizers(llama_like, llama_like / "tokenizer.model")
    assert (found["num_new"], found["expand_violations"], found["old_texts_changed"]) == (0, 0, 0)


def test_missing_tokenizer_or_text_is_told(llama_like: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        check_tokenizers(llama_like, tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be read"):
        check_tokenizers(llama_like, llama_like, [str(tmp_path / "missing.txt")])
