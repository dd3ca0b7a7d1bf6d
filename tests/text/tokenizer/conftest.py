"""Bases that many tests of grafts share; built once."""

from pathlib import Path

import pytest
from small_tokenizers import ENGLISH, learn_ranks, sentences, train_byte_level, write_ranks

from graftlm.text.tokenizer import train_base_tokenizer
from graftlm.text.tokenizer.load import tokenizer_of_model


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE base that knows English and single characters of the others, and Llama's runs of spaces."""
    folder = tmp_path_factory.mktemp("llama-like")
    trained = train_base_tokenizer([*ENGLISH, "今 天 我 の ー ال है न म"], 357)
    assert trained.model is not None
    for length in (2, 4, 3):  # as in Llama, powers of two first
        trained.model.pieces.add(piece="▁" * length, score=-1e9)
    tokenizer_of_model(trained.model).save(folder)
    return folder


@pytest.fixture(scope="session")
def llama3_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level base that looks words up whole; its tokens hold parts of other scripts' characters."""
    mixed = [line for name in ("Han", "Japanese", "Arabic", "Devanagari") for line in sentences(name, 12, seed=9)]
    return train_byte_level(tmp_path_factory.mktemp("bases") / "llama3-like", [*ENGLISH, *mixed], 480)


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level base with a normalizer and added tokens that are no control tokens."""
    mixed = [line for name in ("Han", "Japanese") for line in sentences(name, 12, seed=9)]
    return train_byte_level(tmp_path_factory.mktemp("bases") / "qwen-like", [*ENGLISH, *mixed], 440, is_qwen_like=True)


@pytest.fixture(scope="session")
def bases(llama_like: Path, llama3_like: Path, qwen_like: Path) -> dict[str, Path]:
    """Every kind of base by name."""
    return {"llama": llama_like, "llama3": llama3_like, "qwen": qwen_like}


@pytest.fixture(scope="session")
def small_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file as Llama-3's, of 500 tokens: bytes, then merges learned from mixed text by the plain rule."""
    texts = [*ENGLISH[:30], *sentences("Han", 40), *sentences("Arabic", 10)]
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    write_ranks(path, learn_ranks(texts, 500))
    return path
