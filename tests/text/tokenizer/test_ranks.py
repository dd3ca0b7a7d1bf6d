"""Llama-3's ranks: the `tokenizers` form joins as tiktoken's rule, written here in its plainest form, does."""

import functools
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import ENGLISH, join_by_rank, sentences

from graftlm.errors import UserError
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer import ranks as ranks_module
from graftlm.text.tokenizer.ranks import SPECIAL_TOKENS, WORD_PATTERN, build_fast_of_ranks, is_rank_file, read_ranks
from graftlm.text.tokenizer.samples import ODD_TEXTS, OLD_TEXTS, make_random_texts


def encode_by_rule(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken: cut into words, look the word up, else join its bytes by rank."""
    ids = []
    for word in regex.findall(WORD_PATTERN, text):
        whole = word.encode()
        parts = [whole] if whole in ranks else join_by_rank([bytes([byte]) for byte in whole], ranks)
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def ranks(small_ranks: Path) -> dict[bytes, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "NUM_RANKS", len(small_ranks.read_bytes().splitlines()))
        return read_ranks(small_ranks)


_built = functools.lru_cache(lambda ranks: build_fast_of_ranks(dict(ranks)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.text(max_size=60), st.sampled_from([*ENGLISH, *ODD_TEXTS, *OLD_TEXTS, *sentences("Han"), "aaaaaaa"]))
)
def test_encodes_as_the_plain_rule(ranks: dict[bytes, int], text: str) -> None:
    fast = _built(tuple(ranks.items()))
    assert fast.encode(text, add_special_tokens=False).ids == encode_by_rule(text, ranks)


def test_control_tokens_follow_the_ranks(ranks: dict[bytes, int]) -> None:
    fast = build_fast_of_ranks(ranks)
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 256
    assert [fast.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(len(ranks), len(ranks) + 256))
    assert fast.encode("hi").ids[0] == len(ranks)


def test_bad_rank_files_are_told(small_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: foreign, cut off, out of order."""
    lines = small_ranks.read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(ranks_module, "NUM_RANKS", len(lines))
    for content, told in [
        (b"".join(lines[:400]), "400 ranks, and Llama-3's file has 500"),
        (b"".join(lines)[:-9], r":500: not a line of Llama-3's ranks"),
        (b"".join([*lines[:3], lines[5]]), ":4: .*rank 5 where 3 comes next"),
        (b"!!! 0\n", ":1: not a line"),
    ]:
        (tmp_path / "bad.tiktoken").write_bytes(content)
        with pytest.raises(UserError, match=told):
            read_ranks(tmp_path / "bad.tiktoken")


def test_only_rank_files_look_like_ranks(small_ranks: Path, llama_like: Path) -> None:
    assert is_rank_file(small_ranks)
    assert not is_rank_file(llama_like / "tokenizer.model")


@pytest.mark.slow
def test_llama3s_own_ranks_encode_as_the_plain_rule(shared_real: Path) -> None:
    """T5: Llama-3's real ranks on real, odd and random texts."""
    path = shared_real / "tokenizers" / "llama3.tiktoken"
    ranks, tokenizer = read_ranks(path), load_tokenizer(path)
    assert (tokenizer.num_pieces, tokenizer.bos_id, tokenizer.eos_id) == (128_256, 128_000, 128_001)
    assert tokenizer.special_tokens["<|eot_id|>"] == 128_009
    texts = [*ODD_TEXTS, *OLD_TEXTS, *make_random_texts(2000)]
    for name in ("alpaca_zh.parquet", "alpaca_en.parquet"):
        texts += list(read_texts(shared_real / name))[:1500]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == encode_by_rule(text, ranks), text
