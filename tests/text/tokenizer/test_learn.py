"""What is learned: the pieces that save most tokens, closed over their parts, within the limits asked for."""

from pathlib import Path

import pytest
from small_tokenizers import SCRIPTS, sentences

from graftlm.errors import UserError
from graftlm.text.tokenizer import Tokenizer, load_tokenizer
from graftlm.text.tokenizer.learn import count_runs, learn_pieces, num_chars, puts_spaces
from graftlm.text.tokenizer.script import Script

HAN = Script(["Han"])


@pytest.fixture(scope="module")
def llama(llama_like: Path) -> Tokenizer:
    return load_tokenizer(llama_like)


@pytest.fixture(scope="module")
def llama3(llama3_like: Path) -> Tokenizer:
    return load_tokenizer(llama3_like)


def test_pieces_are_closed_over_their_parts(llama: Tokenizer, llama3: Tokenizer) -> None:
    for base in (llama, llama3):
        for language, names in SCRIPTS.items():
            script = Script(names)
            runs = count_runs(sentences(language), script, language in ("Arabic", "Devanagari"))
            learned = learn_pieces(base, runs, script, 50)
            assert 15 < len(learned.characters) + len(learned.merges) <= 50
            available = {base.token_bytes(i) for i in base.piece_ids} | {char.encode() for char in learned.characters}
            for left, right in learned.merges:
                assert {left, right} <= available
                assert left + right not in available, "no piece twice, none that the base has"
                assert script.owns(left + right)
                available.add(left + right)


def test_one_piece_is_the_one_that_saves_most(llama: Tokenizer) -> None:
    """天 is a piece of the base; 气 is three bytes, so a piece saves two tokens each time, a merge one."""
    assert learn_pieces(llama, count_runs(["天天天天天气气"], HAN, False), HAN, 1).characters == ["气"]
    assert learn_pieces(llama, count_runs(["天我"] * 9 + ["气"] * 4, HAN, False), HAN, 1).merges == [
        ("天".encode(), "我".encode())
    ]


def test_more_pieces_never_compress_less(llama: Tokenizer) -> None:
    runs = count_runs(sentences("Han"), HAN, False)
    small, large = (learn_pieces(llama, runs, HAN, number) for number in (20, 40))
    assert large.merges[: len(small.merges)] == small.merges
    assert set(small.characters) <= set(large.characters)


def test_longest_piece_is_kept(llama: Tokenizer, llama3: Tokenizer) -> None:
    runs = count_runs(["今天天气很好明天我们公园"] * 9, HAN, False)
    for base in (llama, llama3):
        lengths = {limit: max(num_chars(a + b) for a, b in learn_pieces(base, runs, HAN, 99, limit).merges)
                   for limit in (2, 4, None)}  # fmt: skip
        assert lengths[2] == 2
        assert 2 < lengths[4] <= 4
        assert (lengths[None] or 0) > 6


def test_forced_characters_come_first_and_count(llama: Tokenizer) -> None:
    learned = learn_pieces(llama, count_runs(sentences("Han"), HAN, False), HAN, 12, None, ["龘", "天", "魑"])
    assert learned.characters[:2] == ["龘", "魑"], "天 is a piece of the base already"
    assert len(learned.characters) + len(learned.merges) == 12
    with pytest.raises(UserError, match=r"2 pieces are needed .* and 1 are asked for"):
        learn_pieces(llama, count_runs(["天"], HAN, False), HAN, 1, None, ["龘", "魑"])


def test_characters_of_other_scripts_that_the_base_lacks_join_no_piece(llama: Tokenizer) -> None:
    """A vowel mark spelled in bytes cannot be part of a piece: it would need a row that no script asks for."""
    script = Script(["Arabic"])
    learned = learn_pieces(llama, count_runs(["كَتَبَ"] * 20, script, False), script, 30)
    assert learned.characters
    assert not any("\u064e" in (left + right).decode() for left, right in learned.merges)


def test_byte_level_words_are_cut_as_the_base_cuts_them(llama3: Tokenizer) -> None:
    """Llama-3 cuts before vowel signs; a piece across that cut could never be reached."""
    script = Script(["Devanagari"])
    learned = learn_pieces(llama3, count_runs(sentences("Devanagari"), script, True), script, 80)
    for left, right in learned.merges:
        text = (left + right).decode(errors="ignore")
        if text.encode() == left + right:
            assert len(llama3.engine.encode_words([text])[0]) == 1, text


def test_texts_without_the_script_are_told() -> None:
    with pytest.raises(UserError, match=r"7 characters .* none of the script Han"):
        count_runs(["English"], HAN, False)
    with pytest.raises(UserError, match=r"empty \(2 lines"):
        count_runs(["", ""], HAN, False)


def test_spaces_between_words_are_noticed() -> None:
    for language, names in SCRIPTS.items():
        assert puts_spaces(sentences(language), Script(names)) == (language in ("Arabic", "Devanagari"))
