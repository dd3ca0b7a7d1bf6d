"""The published merge: its exact size, and what it does to text that it should leave alone."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.text.tokenizer import graft_tokenizer, load_tokenizer
from graftlm.text.tokenizer.card import graft_card
from graftlm.text.tokenizer.sentencepiece_bpe import build_fast, read_model


def test_the_card_has_its_very_pieces(shared_real: Path) -> None:
    """Ids, scores and types of Llama's 32,000 stay; the new ones follow in the inventory's order at score 0."""
    old = load_tokenizer(shared_real / "tokenizers" / "llama2.model")
    inventory = load_tokenizer(shared_real / "tokenizers" / "chinese_sp.model")
    assert graft_card(old, inventory, None).num_pieces == 49_953
    new = graft_card(old, inventory, "[PAD]")
    assert new.num_pieces == 49_954
    assert old.model is not None
    assert new.model is not None
    assert inventory.model is not None
    pieces = list(new.model.pieces)
    assert [p.SerializeToString() for p in pieces[:32_000]] == [p.SerializeToString() for p in old.model.pieces]
    known = {piece.piece for piece in old.model.pieces}
    wanted = [piece.piece for piece in inventory.model.pieces if piece.piece not in known]
    assert [piece.piece for piece in pieces[32_000:49_953]] == wanted
    assert {(piece.score, piece.type) for piece in pieces[32_000:49_953]} == {(0.0, 1)}
    assert (pieces[49_953].piece, pieces[49_953].type) == ("[PAD]", 3)


def test_the_report_says_what_it_does_to_english(shared_real: Path, tmp_path: Path) -> None:
    inventory = str(shared_real / "tokenizers" / "chinese_sp.model")
    section = Section(mode="card", pieces=inventory)
    report = graft_tokenizer(shared_real / "tokenizers" / "llama2.model", section, tmp_path / "card")
    assert (report.num_old, report.num_new, report.num_total) == (32_000, 17_954, 49_954)
    assert report.old_texts_changed > 10
    note = next(note for note in report.notes if "published merge" in note)
    assert f"{report.old_texts_changed} of {report.num_old_texts} texts without the script" in note
    assert "no tokenizer.json can encode alike" in note
    assert report.engine_disagreements == report.roundtrip_failures == 0
    assert not (tmp_path / "card" / "tokenizer.json").exists()
    with pytest.raises(UserError, match="share one score"):
        build_fast(read_model(tmp_path / "card" / "tokenizer.model"))


def test_a_byte_level_base_or_inventory_is_refused(llama3_like: Path, llama_like: Path) -> None:
    byte_level, sentencepiece = load_tokenizer(llama3_like), load_tokenizer(llama_like)
    with pytest.raises(UserError, match=r"the base \(--base\) is another kind") as raised:
        graft_card(byte_level, sentencepiece, None)
    assert "--mode continued or merge" in raised.value.fix
    with pytest.raises(UserError, match=r"the inventory \(--pieces\) is another kind"):
        graft_card(sentencepiece, byte_level, None)
