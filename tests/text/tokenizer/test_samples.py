"""Texts that try a graft: the same from the same seed, and holding what breaks careless ones."""

from pathlib import Path

from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.samples import make_random_texts, make_texts, overlap_texts, sample_real
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.sentencepiece_graft import append_after


def test_same_seed_same_texts(llama_like: Path) -> None:
    old = load_tokenizer(llama_like)
    new = append_after(old, ["气", "天气"], None, {})
    made = [make_texts(old, new, ["天气很好"], Script(["Han"]), 300, seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert any("天气" in text for text in made[0])
    assert any("很" in text for text in made[0]), "characters of the given texts"
    assert make_random_texts(50, 3) == make_random_texts(50, 3) != make_random_texts(50, 4)
    assert all(text.encode() for text in make_random_texts(400) if text), "no lone surrogates"


def test_real_texts_are_sampled_and_cut() -> None:
    texts = [f"{number}" * 3000 for number in range(9)]
    found = sample_real(texts, 4)
    assert len(found) == 4
    assert {len(text) for text in found} == {2000}
    assert sample_real(texts[:2], 4) == [text[:2000] for text in texts[:2]]


def test_overlapping_pieces_are_tried(llama_like: Path) -> None:
    """哈哈 is 哈+哈: in 哈哈哈 two places of it overlap."""
    old = load_tokenizer(llama_like)
    new = append_after(old, ["哈", "哈天", "天哈", "哈哈", "哈天哈"], None, {})
    assert overlap_texts(old, new) == ["哈哈哈", "哈天哈天哈"]
