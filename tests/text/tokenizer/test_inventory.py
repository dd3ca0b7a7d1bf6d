"""An inventory in any form gives the same pieces; what is not taken is counted by reason."""

import json
from pathlib import Path

import pytest
from small_tokenizers import sentences, train_byte_level, write_lines
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer, train_base_tokenizer
from graftlm.text.tokenizer.inventory import filter_pieces, missing_characters, read_inventory
from graftlm.text.tokenizer.script import Script


def test_forms_of_an_inventory(tmp_path: Path) -> None:
    train_base_tokenizer(sentences("Han"), 340, tmp_path / "sp")
    from_model = read_inventory(tmp_path / "sp" / "tokenizer.model")
    from_json = read_inventory(tmp_path / "sp" / "tokenizer.json")
    assert from_model == from_json == read_inventory(tmp_path / "sp")
    assert "天气" in from_model
    assert not any("<0x" in piece or "▁" in piece or piece == "<s>" for piece in from_model)
    assert read_inventory(write_lines(tmp_path / "list.txt", ["天气", "", " الكتاب", "天气"])) == ["天气", " الكتاب"]


def test_unigram_wordpiece_and_byte_level_inventories(tmp_path: Path) -> None:
    unigram = FastTokenizer(models.Unigram([("<unk>", 0.0), ("▁天气", -1.0), ("天", -2.0)], unk_id=0))
    unigram.save(str(tmp_path / "unigram.json"))
    assert read_inventory(tmp_path / "unigram.json") == ["<unk>", " 天气", "天"]
    wordpiece = FastTokenizer(models.WordPiece({"[UNK]": 0, "天": 1, "##气": 2, "气": 3}, unk_token="[UNK]"))
    wordpiece.save(str(tmp_path / "wordpiece.json"))
    assert read_inventory(tmp_path / "wordpiece.json") == ["[UNK]", "天", "气"]
    folder = train_byte_level(tmp_path / "bytes", sentences("Han"), 420)
    found = read_inventory(folder)
    assert "天气" in found
    assert "<|end_of_text|>" not in found
    assert "" not in found, "parts of characters are no pieces"


def test_foreign_inventories_are_told(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"model": {"vocab"', encoding="utf-8")
    (tmp_path / "foreign.json").write_text(json.dumps([1, 2]), encoding="utf-8")
    (tmp_path / "foreign.model").write_bytes(b"foreign")
    for name, told in [("cut.json", "not a whole tokenizer.json"), ("foreign.json", "not a whole tokenizer.json"),
                       ("foreign.model", "not a whole SentencePiece model"), ("missing.txt", "cannot be read"),
                       ("missing.model", "cannot be read")]:  # fmt: skip
        with pytest.raises(UserError, match=told):
            read_inventory(tmp_path / name)


def test_what_is_not_taken_is_counted(llama_like: Path) -> None:
    old, script = load_tokenizer(llama_like), Script(["Han"])
    dropped: dict[str, int] = {}
    pieces = ["今天", "天", "2016", "2016年", "今 天", " 今天", "今天天气很好", "今€"]
    assert filter_pieces(old, pieces, script, 5, "auto", dropped) == ["今天", "2016年"]
    assert dropped == {
        "without a character of the script": 1, "already there": 1, "with a space": 2, "too long": 1,
        "with a foreign character that the base lacks": 1,
    }  # fmt: skip
    assert " 今天" in filter_pieces(old, pieces, script, None, "always", {})
    assert missing_characters(old, ["今天气", "气2"]) == ["气"]


def test_spaces_are_kept_where_the_inventory_is_full_of_them(llama_like: Path) -> None:
    old, script = load_tokenizer(llama_like), Script(["Arabic"])
    pieces = [" الكتاب", " كتاب", "كتاب"]
    assert filter_pieces(old, pieces, script, None, "auto", {}) == pieces
    assert filter_pieces(old, pieces, script, None, "never", {}) == ["كتاب"]
