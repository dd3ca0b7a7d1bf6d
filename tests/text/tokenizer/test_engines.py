"""The two engines give ids, words and bytes alike; a text that follows another gets no space before it."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.engines import BYTE_OF_CHAR, CHAR_OF_BYTE, FastEngine, SentencePieceEngine
from graftlm.text.tokenizer.samples import ODD_TEXTS, OLD_TEXTS
from graftlm.text.tokenizer.sentencepiece_bpe import read_model

TEXTS = [*ODD_TEXTS, *OLD_TEXTS, "</s> <unk>", "今天 الكتاب"]


@pytest.fixture(scope="module")
def engines(llama_like: Path) -> tuple[FastEngine, SentencePieceEngine]:
    fast = load_tokenizer(llama_like).engine
    assert isinstance(fast, FastEngine)
    return fast, SentencePieceEngine(read_model(llama_like / "tokenizer.model"))


def test_both_engines_are_one(engines: tuple[FastEngine, SentencePieceEngine]) -> None:
    fast, slow = engines
    assert (fast.num_pieces, fast.special_ids) == (slow.num_pieces, slow.special_ids)
    assert fast.encode_batch(TEXTS) == slow.encode_batch(TEXTS) == [fast.encode(text) for text in TEXTS]
    assert fast.encode_continuations(TEXTS) == slow.encode_continuations(TEXTS)
    for piece_id in range(fast.num_pieces):
        assert fast.piece(piece_id) == slow.piece(piece_id)
        assert fast.token_bytes(piece_id) == slow.token_bytes(piece_id)
    for text in TEXTS:
        assert fast.decode(fast.encode(text)) == slow.decode(slow.encode(text)) == text
        assert fast.encode_continuation(text) == slow.encode_continuation(text)


def test_a_byte_level_text_is_its_own_continuation(llama3_like: Path) -> None:
    engine = load_tokenizer(llama3_like).engine
    for text in TEXTS:
        assert engine.encode_continuation(text) == engine.encode(text)


def test_words_are_those_of_the_pre_tokenizer(llama3_like: Path) -> None:
    engine = load_tokenizer(llama3_like).engine
    assert isinstance(engine, FastEngine)
    for text in TEXTS:
        words = engine.encode_words([text])[0]
        assert [piece_id for word in words for piece_id in word] == engine.encode_continuation(text)
    spelled = [
        b"".join(map(engine.token_bytes, word)).decode() for word in engine.encode_words(["plain text, 今天."])[0]
    ]
    assert spelled == ["plain", " text", ",", " 今天", "."]


def test_ids_without_a_piece(engines: tuple[FastEngine, SentencePieceEngine]) -> None:
    for engine in engines:
        with pytest.raises(IndexError, match="id 9999 has no piece"):
            engine.piece(9999)


def test_lone_surrogates_are_told_by_both(engines: tuple[FastEngine, SentencePieceEngine]) -> None:
    """B1: whatever the way in."""
    for engine in engines:
        for encode in (engine.encode, engine.encode_continuation):
            with pytest.raises(UserError, match="lone surrogate"):
                encode("a\udc00")


def test_visible_bytes() -> None:
    assert len(BYTE_OF_CHAR) == len(CHAR_OF_BYTE) == 256
    assert (CHAR_OF_BYTE[ord(" ")], CHAR_OF_BYTE[ord("\n")], CHAR_OF_BYTE[ord("a")]) == ("Ġ", "Ċ", "a")
