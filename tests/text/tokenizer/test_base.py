"""A base of one's own: as Llama's, the same from the same texts."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer, train_base_tokenizer


def test_training_is_deterministic() -> None:
    texts = ["one two three two one", "three two one"] * 5
    assert train_base_tokenizer(texts, 285).fingerprint == train_base_tokenizer(texts, 285).fingerprint


def test_too_many_pieces_are_told() -> None:
    with pytest.raises(UserError, match="5000 pieces cannot be learned"):
        train_base_tokenizer(["tiny"], 5000)
    with pytest.raises(UserError, match="every line is empty"):
        train_base_tokenizer(["", " \n "], 300)


def test_base_looks_like_llama(llama_like: Path) -> None:
    base = load_tokenizer(llama_like)
    assert base.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (base.bos_id, base.eos_id, base.pad_id, base.unk_id) == (1, 2, None, 0)
    assert [base.piece(3), base.piece(258)] == ["<0x00>", "<0xFF>"]
    assert base.num_pieces == 360
    assert base.first_new_id is None
