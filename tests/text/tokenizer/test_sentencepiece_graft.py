"""Pieces after all of a SentencePiece base's own: scores, order, and what must be left out for it to be exact."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.load import tokenizer_of_model
from graftlm.text.tokenizer.sentencepiece_bpe import BYTE, NORMAL, ModelProto
from graftlm.text.tokenizer.sentencepiece_graft import append_after, check_base, check_files_agree


def test_scores_lie_below_all_old_ones_in_order_of_ids(llama_like: Path) -> None:
    old = load_tokenizer(llama_like)
    new = append_after(old, ["气", "天气", "今天", "今天天气"], "[PAD]", {})
    assert old.model is not None
    assert new.model is not None
    before, added = new.model.pieces[: old.num_pieces], new.model.pieces[old.num_pieces :]
    assert [p.SerializeToString() for p in before] == [p.SerializeToString() for p in old.model.pieces]
    assert [piece.piece for piece in added] == ["气", "天气", "今天", "今天天气", "[PAD]"]
    lowest = min(piece.score for piece in before if piece.type == NORMAL and piece.score > -1e8)
    assert [piece.score for piece in added[:4]] == [lowest - 1, lowest - 2, lowest - 3, lowest - 4]
    assert new.model.trainer_spec.vocab_size == new.num_pieces == old.num_pieces + 5


def test_pieces_with_a_space_come_after_runs_of_spaces_too(llama_like: Path) -> None:
    """In two spaces and a word the base joins the spaces; a piece of space and word must not come before that."""
    old = load_tokenizer(llama_like)
    new = append_after(old, [" 好", "好", " 我好"], None, {})
    assert new.model is not None
    scores = [piece.score for piece in new.model.pieces[old.num_pieces :]]
    assert -1e9 > scores[0] > scores[1] > scores[2] > -1.001e9
    for text in ("  好", " 好", "x 好", "x  好", "x   好", "    好", "  我好"):
        assert new.expand(new.encode(text)) == old.encode(text), text
    assert old.num_pieces in new.encode("x 好")


def test_dead_pieces_are_dropped_until_none_is_left(llama_like: Path) -> None:
    """ABC cannot be made without AB or BC, nor ABCD without ABC."""
    dropped: dict[str, int] = {}
    new = append_after(load_tokenizer(llama_like), ["气", "很", "天气很", "天气很好", "今天"], None, dropped)
    assert [new.piece(i) for i in new.expansions] == ["气", "很", "今天"]
    assert dropped == {"cannot be reached by merging": 2}


def test_pieces_inside_a_piece_of_the_base_are_dropped(llama_like: Path) -> None:
    """The base holds XYZ but not YZ: with YZ new, X+YZ would be joined where the base never comes to it."""
    old = load_tokenizer(llama_like)
    assert old.model is not None
    model = ModelProto()
    model.CopyFrom(old.model)
    for number, piece in enumerate(("今天", "今天我")):
        model.pieces.add(piece=piece, score=-5000 - number, type=NORMAL)
    base = tokenizer_of_model(model)
    dropped: dict[str, int] = {}
    new = append_after(base, ["天我", "我今"], None, dropped)
    assert [new.piece(i) for i in new.expansions] == ["我今"]
    assert dropped == {"part of a piece of the base": 1}


def test_bases_without_an_exact_form_are_refused(llama_like: Path, tmp_path: Path) -> None:
    old = load_tokenizer(llama_like)
    assert old.model is not None
    unigram = ModelProto()
    unigram.CopyFrom(old.model)
    unigram.trainer_spec.model_type = 1
    with pytest.raises(UserError, match="cannot be grafted exactly: it is a Unigram model"):
        check_base(tokenizer_of_model(unigram))
    (tmp_path / "tokenizer.json").write_bytes((llama_like / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"no tokenizer.model lies beside it") as raised:
        check_base(load_tokenizer(tmp_path))
    assert "Llama-family" in raised.value.fix


def test_a_folder_whose_files_disagree_is_refused(llama_like: Path, tmp_path: Path) -> None:
    """What others derived from the model may be wrong; grafting onto it would prove the wrong thing."""
    parts = json.loads((llama_like / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    parts["model"]["merges"] = parts["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not encode as its tokenizer\.model") as raised:
        check_files_agree(load_tokenizer(tmp_path), [])
    assert "tokenizer.model alone" in raised.value.fix
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": 360, "content": "<extra>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UserError, match=r"361 ids, its tokenizer.model 360"):
        check_files_agree(load_tokenizer(tmp_path), [])
    check_files_agree(load_tokenizer(llama_like), ["fine"])


def test_bytes_stay_bytes(llama_like: Path) -> None:
    new = append_after(load_tokenizer(llama_like), ["气"], None, {})
    assert new.model is not None
    assert sum(piece.type == BYTE for piece in new.model.pieces) == 256
    assert new.expansions[360] == tuple(3 + byte for byte in "气".encode())
