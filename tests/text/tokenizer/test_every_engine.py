"""T5: sentencepiece = tokenizer.json = transformers = llama.cpp, and the laws of the graft, on few texts always and on
more than 100,000 real and fuzzed ones on demand (`make slow`)."""

from dataclasses import asdict
from pathlib import Path

import pytest
from small_tokenizers import SCRIPTS, sentences, write_lines

from graftlm.recipe import Tokenizer as Section
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer import graft as graft_module
from graftlm.text.tokenizer import graft_tokenizer, load_tokenizer
from graftlm.text.tokenizer.proof import Proof, other_engines, prove
from graftlm.text.tokenizer.samples import MAX_TEXT_CHARS, make_random_texts, make_texts
from graftlm.text.tokenizer.script import Script

gguf_engine = pytest.importorskip("gguf_engine", reason="llama.cpp's tokenizer (xllamacpp, gguf) is not installed")

_FAULTS = ("expand_violations", "engine_disagreements", "roundtrip_failures", "old_texts_changed", "unreachable_pieces")


def prove_everywhere(
    base: Path, out: Path, texts: list[str], script: tuple[str, ...], num_fuzzed: int, pre: str
) -> Proof:
    """The proof of a written graft in every engine there is, llama.cpp included."""
    old, new = load_tokenizer(base), load_tokenizer(out)
    engines = other_engines(new, out) | {"llama.cpp": gguf_engine.LlamaCpp(new, out / "vocabulary.gguf", pre)}
    real = [text[:MAX_TEXT_CHARS] for text in texts]
    made = make_texts(old, new, real[:2000], Script(script), num_fuzzed, seed=1)
    return prove(old, new, real, [*made, *make_random_texts(num_fuzzed // 2, seed=2)], Script(script), engines)


@pytest.mark.parametrize("language", ["Han", "Arabic"])
@pytest.mark.parametrize(("kind", "pre"), [("llama", "default"), ("llama3", "llama-bpe")])
def test_small_grafts_in_every_engine(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, pre: str, language: str
) -> None:
    monkeypatch.setattr(graft_module, "NUM_SAMPLE_TEXTS", 200)
    texts, script = sentences(language), SCRIPTS[language]
    section = Section(text=(write_lines(tmp_path / "text.txt", texts),), script=script, num_pieces=60)
    graft_tokenizer(bases[kind], section, tmp_path / "out")
    proof = prove_everywhere(bases[kind], tmp_path / "out", texts, script, 300, pre)
    assert proof.num_texts_checked > 550
    assert "llama.cpp" in proof.engines
    assert {fault: getattr(proof, fault) for fault in _FAULTS} == dict.fromkeys(_FAULTS, 0), proof.examples


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("base", "mode", "pre"),
    [("llama2.model", "continued", "default"), ("llama3.tiktoken", "continued", "llama-bpe"),
     ("llama2.model", "merge", "default")],
)  # fmt: skip
def test_100_000_texts_in_every_engine(shared_real: Path, tmp_path: Path, base: str, mode: str, pre: str) -> None:
    """Real Chinese and English rows, fuzzed strings of pieces, random bytes and characters; not one may differ."""
    chinese, english = shared_real / "alpaca_zh.parquet", shared_real / "alpaca_en.parquet"
    source = shared_real / "tokenizers" / base
    pieces = str(shared_real / "tokenizers" / "chinese_sp.model") if mode == "merge" else None
    graft_tokenizer(source, Section(mode=mode, text=(str(chinese),), pieces=pieces), tmp_path / "out")
    texts = [
        text for path in (chinese, english, shared_real / "belle_seed_tasks_zh.jsonl") for text in read_texts(path)
    ]
    proof = prove_everywhere(source, tmp_path / "out", texts, ("Han",), 20_000, pre)
    print(f"\n{base} {mode}: {asdict(proof)}")
    assert proof.num_texts_checked > 100_000
    assert {fault: getattr(proof, fault) for fault in _FAULTS} == dict.fromkeys(_FAULTS, 0), proof.examples


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("language", ["Japanese", "Arabic", "Devanagari"])
@pytest.mark.parametrize(("base", "pre"), [("llama2.model", "default"), ("llama3.tiktoken", "llama-bpe")])
def test_other_languages_on_real_bases(shared_real: Path, tmp_path: Path, base: str, pre: str, language: str) -> None:
    """Pieces with a space before the word meet Llama's runs of spaces; marks are cut off by Llama-3's word pattern."""
    texts, source = sentences(language, 500), shared_real / "tokenizers" / base
    section = Section(text=(write_lines(tmp_path / "text.txt", texts),), script=SCRIPTS[language], num_pieces=300)
    graft_tokenizer(source, section, tmp_path / "out")
    proof = prove_everywhere(source, tmp_path / "out", texts, SCRIPTS[language], 10_000, pre)
    print(f"\n{base} {language}: {asdict(proof)}")
    assert proof.num_texts_checked > 15_000
    assert {fault: getattr(proof, fault) for fault in _FAULTS} == dict.fromkeys(_FAULTS, 0), proof.examples
