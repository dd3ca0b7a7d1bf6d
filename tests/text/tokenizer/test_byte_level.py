"""Merges after all of a byte-level base's: ids after the special tokens, one merge an id, the script's bytes only."""

import json
from pathlib import Path

import pytest

from graftlm.text.tokenizer import Tokenizer, load_tokenizer
from graftlm.text.tokenizer.byte_level import append_merges, fold_characters, merges_of_words
from graftlm.text.tokenizer.script import Script

HAN, ARABIC = Script(["Han"]), Script(["Arabic"])
B = str.encode


@pytest.fixture(scope="module")
def llama3(llama3_like: Path) -> Tokenizer:
    return load_tokenizer(llama3_like)


def test_merges_and_ids_come_after_everything(llama3: Tokenizer, tmp_path: Path) -> None:
    folds, _ = fold_characters(llama3, "谜龘", HAN)
    new = append_merges(llama3, [*folds, (B("谜"), B("龘"))], HAN, "[PAD]", {})
    new.save(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    before = llama3.engine.parts  # type: ignore[attr-defined]
    assert parts["model"]["merges"][: len(before["model"]["merges"])] == before["model"]["merges"]
    assert len(parts["model"]["merges"]) == len(before["model"]["merges"]) + len(new.expansions)
    assert list(new.expansions) == list(range(llama3.num_pieces, llama3.num_pieces + len(new.expansions)))
    assert {token["content"]: token["id"] for token in parts["added_tokens"]} == {
        **llama3.special_tokens, "[PAD]": new.num_pieces - 1,
    }  # fmt: skip
    again = load_tokenizer(tmp_path)
    assert again.special_tokens == new.special_tokens
    assert again.encode_continuation("谜龘") == [max(new.expansions)]
    assert list(new.expansions[max(new.expansions)]) == llama3.encode_continuation("谜龘")


def test_words_looked_up_whole_still_expand(llama3: Tokenizer) -> None:
    """`ignore_merges`: a whole word that is a new piece skips the merges; it must have been reachable by them."""
    assert llama3.engine.parts["model"]["ignore_merges"]  # type: ignore[attr-defined]
    folds, _ = fold_characters(llama3, "谜龘魑", HAN)
    dropped: dict[str, int] = {}
    unreachable = (B("谜龘"), B("魑"))
    new = append_merges(llama3, [*folds, (B("龘"), B("魑")), (B("谜"), B("龘")), unreachable], HAN, None, dropped)
    assert dropped == {"cannot be reached by merging": 1}
    assert new.expand(new.encode("谜龘魑")) == llama3.encode("谜龘魑")


def test_bytes_that_other_scripts_share_are_refused(llama3: Tokenizer) -> None:
    """T3: D8 begins Arabic letters and a comma that many scripts use; a merge from it could fire in their text."""
    dropped: dict[str, int] = {}
    comma = B("،")
    asked = [(b"\xd8", b"\xa7"), (comma[:1], comma[1:]), (b"\xe4", b"\xb7"), (b"zq", b"\xd8\xa7")]
    new = append_merges(llama3, asked[1:], ARABIC, None, dropped)
    assert new.expansions == {}
    assert dropped == {"bytes another script uses too": 2, "part of it dropped": 1}


def test_characters_fold_from_the_left(llama3: Tokenizer) -> None:
    folds, num_refused = fold_characters(llama3, "谜", HAN)
    assert num_refused == 0
    assert folds == [(B("谜")[:1], B("谜")[1:2]), (B("谜")[:2], B("谜")[2:])]
    hexagram_neighbours = fold_characters(llama3, "\u4dbf", HAN)
    assert hexagram_neighbours[1] in (0, 1)
    assert fold_characters(llama3, "x", HAN) == ([], 0)


def test_refused_characters_are_counted(llama3: Tokenizer) -> None:
    """D9 begins Arabic letters and digits, and a tatweel that other scripts use: D9 alone is never a piece."""
    rare = next(char for char in "ݐݑݒݓ" if len(llama3.encode_continuation(char)) == 2)
    assert fold_characters(llama3, [rare], ARABIC) == ([(B(rare)[:1], B(rare)[1:])], 0)
    assert fold_characters(llama3, ["、"], HAN)[1] == 1


def test_words_get_the_merge_that_will_spell_them(llama3: Tokenizer) -> None:
    folds, _ = fold_characters(llama3, "谜龘魑魅", HAN)
    words = ["谜龘", "魑魅", "谜龘魑魅", "龘魑魅", "谜魅龘"]
    merges, num_unspelled = merges_of_words(llama3, words, folds)
    assert merges == [(B("谜"), B("龘")), (B("魑"), B("魅")), (B("谜龘"), B("魑魅")), (B("龘"), B("魑魅"))]
    assert num_unspelled == 1
    new = append_merges(llama3, [*folds, *merges], HAN, None, {})
    assert all(len(new.encode_continuation(word)) == 1 for word in words[:4])
