"""A proof must fail where it should: each kind of fault is planted and must be counted with the text that shows it."""

from pathlib import Path

import pytest

from graftlm.text.tokenizer import Tokenizer, load_tokenizer
from graftlm.text.tokenizer.proof import Proof, other_engines, prove, prove_folder
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.sentencepiece_graft import append_after, append_pieces

HAN = Script(["Han"])
REAL = ["今天天气很好", "plain text", "Plain 天 text"]


@pytest.fixture(scope="module")
def old(llama_like: Path) -> Tokenizer:
    return load_tokenizer(llama_like)


@pytest.fixture
def new(old: Tokenizer) -> Tokenizer:
    return append_after(old, ["气", "天气", "今天"], None, {})


def test_a_clean_graft(old: Tokenizer, new: Tokenizer) -> None:
    proof = prove(old, new, REAL, ["今天气"], HAN, other_engines(new, None))
    assert (proof.num_texts_checked, proof.num_old_texts) == (4, 1)
    assert proof.expand_violations == proof.engine_disagreements == proof.roundtrip_failures == 0
    assert proof.old_texts_changed == proof.unreachable_pieces == 0
    assert proof.examples == {}
    assert proof.engines == ["sentencepiece"]


def test_compression_is_measured_on_real_texts_in_the_script(old: Tokenizer, new: Tokenizer) -> None:
    proof = prove(old, new, REAL, ["今天气" * 50], HAN)
    texts = [REAL[0], REAL[2]]
    for name, tokenizer in (("old", old), ("new", new)):
        assert proof.chars_per_token[name] == round(
            sum(map(len, texts)) / sum(map(len, tokenizer.encode_batch(texts))), 4
        )
    assert prove(old, new, [], REAL, HAN).chars_per_token == {}


def test_wrong_expansion_is_found(old: Tokenizer, new: Tokenizer) -> None:
    new.expansions[old.num_pieces] = (5, 6)
    proof = prove(old, new, REAL, [], HAN)
    assert proof.expand_violations >= 1
    assert "气" in proof.examples["expand_violations"]


def test_changed_old_text_is_found(old: Tokenizer) -> None:
    """A piece of another script outranks the base's own: the fault of the published merge."""
    careless = append_pieces(old, ["ain", "xt"], lambda k: 0.0 - k, None)
    proof = prove(old, careless, REAL, [], HAN)
    assert proof.old_texts_changed == 1
    assert proof.examples["old_texts_changed"] == ["plain text"]


def test_unreachable_piece_is_found(old: Tokenizer) -> None:
    careless = append_pieces(old, ["今天气很"], lambda k: -50_000.0, None)
    proof = prove(old, careless, REAL, [], HAN)
    assert proof.unreachable_pieces == 1
    assert proof.examples["unreachable_pieces"] == ["今天气很"]


def test_disagreeing_engine_is_named(old: Tokenizer, new: Tokenizer) -> None:
    proof = prove(old, new, REAL, [], HAN, {"the base": old.encode_batch})
    assert proof.engine_disagreements == 1
    assert proof.examples == {"engine_disagreements: the base": ["今天天气很好"]}


def test_lost_text_is_found(old: Tokenizer, new: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new, "decode", lambda ids: "")
    assert prove(old, new, REAL, [], HAN).roundtrip_failures == 3


def test_a_folder_is_loaded_again_and_compared(old: Tokenizer, new: Tokenizer, tmp_path: Path) -> None:
    new.save(tmp_path)
    proof = prove_folder(old, new, tmp_path, REAL, ["</s> <s>"], HAN)
    assert proof.engines == ["before saving", "transformers", "sentencepiece"]
    assert proof.engine_disagreements == proof.expand_violations == 0
    other = append_after(old, ["气", "今天"], None, {})
    assert prove_folder(old, other, tmp_path, REAL, [], HAN).examples["engine_disagreements: before saving"]


def test_the_shortest_examples_are_kept() -> None:
    proof = Proof()
    for length in (9, 3, 8, 1, 7, 3, 2):
        proof.note("expand_violations", "x" * length)
    assert proof.expand_violations == 7
    assert proof.examples["expand_violations"] == ["x", "xx", "xxx", "x" * 7, "x" * 8]
