"""Laws of the graft: old text encodes as before, and expanding new ids gives the base's ids, whatever the text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.text.tokenizer import Tokenizer, graft_tokenizer, load_tokenizer, train_base_tokenizer

CHINESE = ["今天天气很好。", "今天我们去公园玩。", "天气预报说明天下雨。", "我们明天再去公园吧。"] * 8


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("graft")
    train_base_tokenizer([f"Plain text number {i}, with words in it." for i in range(50)], 320, folder / "base")
    (folder / "zh.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    section = Section(text=(str(folder / "zh.txt"),), num_pieces=40, common_characters="none")
    report = graft_tokenizer(folder / "base", section, folder / "new")
    assert report.expand_violations == report.engine_disagreements == report.roundtrip_failures == 0
    assert report.old_texts_changed == 0
    assert report.chars_per_token["new"] > 2 * report.chars_per_token["old"]
    return load_tokenizer(folder / "base"), load_tokenizer(folder / "new")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*CHINESE[:4], "今天", "天", " ", "text", "Plain ", "\n", "🙂", "雨雨", "7"]), max_size=9))
def test_expanding_gives_the_bases_ids(grafted: tuple[Tokenizer, Tokenizer], parts: list[str]) -> None:
    old, new = grafted
    text = "".join(parts)
    assert new.expand(new.encode(text)) == old.encode(text)
    assert new.decode(new.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x2FF), max_size=40))
def test_text_without_the_script_encodes_as_before(grafted: tuple[Tokenizer, Tokenizer], text: str) -> None:
    old, new = grafted
    assert new.encode(text) == old.encode(text)


def test_a_misspelt_script_gets_the_nearest_name(tmp_path: Path) -> None:
    base = train_base_tokenizer(["some plain text"] * 5, 280, tmp_path / "base")
    assert base.num_pieces <= 280
    section = Section(text=(str(tmp_path / "zh.txt"),), script=("Hann",))
    with pytest.raises(UserError, match="no script 'Hann'") as raised:
        graft_tokenizer(tmp_path / "base", section, tmp_path / "new")
    assert "Han" in raised.value.fix


def test_the_card_has_49953_pieces_and_no_fast_form(shared_real: Path, tmp_path: Path) -> None:
    inventory = str(shared_real / "tokenizers" / "chinese_sp.model")
    section = Section(mode="card", pieces=inventory, pad_piece=False)
    report = graft_tokenizer(shared_real / "tokenizers" / "llama2.model", section, tmp_path / "card")
    assert (report.num_old, report.num_new, report.num_total) == (32_000, 17_953, 49_953)
    assert report.old_texts_changed > 0, "the published merge changes old text; the report must say so"
    assert not (tmp_path / "card" / "tokenizer.json").exists()
