"""Laws of the graft, on every kind of base and in four languages: old text encodes as before, and expanding new ids
gives the base's ids, whatever the text."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import SCRIPTS, WORDS, sentences, write_lines

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.text.tokenizer import Tokenizer, graft_tokenizer, load_tokenizer
from graftlm.text.tokenizer import graft as graft_module
from graftlm.text.tokenizer.proof import Proof

KINDS = ("llama", "llama3", "qwen")


@pytest.fixture(scope="module")
def grafts(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Base and graft by kind of base and language."""
    folder = tmp_path_factory.mktemp("grafts")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graft_module, "NUM_SAMPLE_TEXTS", 800)
        _graft_all(bases, folder, made)
    return made


def _graft_all(bases: dict[str, Path], folder: Path, made: dict[str, tuple[Tokenizer, Tokenizer]]) -> None:
    for language, script in SCRIPTS.items():
        text = write_lines(folder / f"{language}.txt", sentences(language))
        for kind, base in bases.items():
            out = folder / f"{kind}-{language}"
            report = graft_tokenizer(base, Section(text=(text,), script=script, num_pieces=60), out)
            assert report.expand_violations == report.engine_disagreements == report.roundtrip_failures == 0
            assert report.old_texts_changed == report.unreachable_pieces == 0
            assert report.num_old_texts > 20
            assert report.chars_per_token["new"] > 1.2 * report.chars_per_token["old"], (kind, language)
            made[f"{kind} {language}"] = (load_tokenizer(base), load_tokenizer(out))


@pytest.mark.parametrize("language", list(SCRIPTS))
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_expanding_gives_the_bases_ids(
    grafts: dict[str, tuple[Tokenizer, Tokenizer]], kind: str, language: str, data: st.DataObject
) -> None:
    """T4: whatever the text, new ids expand to the ids it had before; and it comes back from them."""
    old, new = grafts[f"{kind} {language}"]
    parts = [
        *WORDS[language].split(),
        *"今天はのーالहै्",
        " ",
        "  ",
        "   ",
        "text",
        "Plain ",
        "\n",
        "🙂",
        "7",
        "e\u0301",
        "<tool>",
        "[PAD]",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=10)))
    ids = new.encode(text)
    assert new.expand(ids) == old.encode(text)
    assert new.decode(ids) == old.decode(old.encode(text))


@pytest.mark.parametrize("language", list(SCRIPTS))
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_without_the_script_encodes_as_before(
    grafts: dict[str, tuple[Tokenizer, Tokenizer]], kind: str, language: str, text: str
) -> None:
    """T4: text of any characters but the script's own keeps every id."""
    old, new = grafts[f"{kind} {language}"]
    script = graft_module.Script(SCRIPTS[language])
    text = script.character.sub("x", text)
    assert new.encode(text) == old.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_new_ids_start_after_every_old_one(grafts: dict[str, tuple[Tokenizer, Tokenizer]], kind: str) -> None:
    """Special and added tokens included: an id never changes its piece."""
    old, new = grafts[f"{kind} Han"]
    assert new.first_new_id == old.num_pieces == min(new.expansions)
    assert [new.piece(i) for i in old.piece_ids] == [old.piece(i) for i in old.piece_ids]
    assert new.special_tokens == {**old.special_tokens, "[PAD]": new.num_pieces - 1}
    assert new.pad_id == new.num_pieces - 1
    assert (new.bos_id, new.eos_id) == (old.bos_id, old.eos_id)


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_piece_is_reached_and_of_the_script(
    grafts: dict[str, tuple[Tokenizer, Tokenizer]], kind: str
) -> None:
    for language, names in SCRIPTS.items():
        _, new = grafts[f"{kind} {language}"]
        script = graft_module.Script(names)
        for piece_id in new.expansions:
            part = new.token_bytes(piece_id)
            assert script.owns(part)
            if part.decode(errors="ignore").encode() == part:
                assert new.encode_continuation(part.decode()) == [piece_id]


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_belong_to_pieces_where_words_are_set_apart(
    grafts: dict[str, tuple[Tokenizer, Tokenizer]], kind: str
) -> None:
    for language in SCRIPTS:
        _, new = grafts[f"{kind} {language}"]
        has_space = any(new.token_bytes(piece_id).startswith(b" ") for piece_id in new.expansions)
        assert has_space == (language in ("Arabic", "Devanagari"))


def test_a_language_sharing_the_script_moves_and_the_report_says_so(
    grafts: dict[str, tuple[Tokenizer, Tokenizer]], llama_like: Path, tmp_path: Path
) -> None:
    old, new = grafts["llama Han"]
    japanese = "明天です"
    assert new.encode(japanese) != old.encode(japanese)
    assert new.expand(new.encode(japanese)) == old.encode(japanese)
    assert any("Other languages written in it" in note for note in (new.graft or {})["notes"])


@pytest.mark.parametrize("kind", ["llama", "llama3"])
def test_merge_takes_an_inventory(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Filtered by script, closed over characters, dead pieces dropped and counted."""
    words = ["今天", "天气", "今天天气", "12", "▁今天", "hello天", "龘", "not", "气很气", "明天", "天"]
    pieces = write_lines(tmp_path / "pieces.txt", words)
    report = graft_tokenizer(bases[kind], Section(mode="merge", pieces=pieces), tmp_path / "out")
    assert report.expand_violations == report.engine_disagreements == report.old_texts_changed == 0
    assert report.dropped["without a character of the script"] == 2
    assert report.chars_per_token == {}
    new = load_tokenizer(tmp_path / "out")
    for word in ("今天", "天气", "明天", "龘", "气"):
        assert len(new.encode_continuation(word)) == 1, word


def test_number_of_pieces_is_kept(llama_like: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    report = graft_tokenizer(llama_like, Section(text=(text,), num_pieces=17, pad_piece=False), tmp_path / "out")
    assert (report.num_new, report.num_total) == (17, report.num_old + 17)


def test_fewer_pieces_than_asked_for_are_told(llama_like: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", ["你好"] * 3)
    report = graft_tokenizer(llama_like, Section(text=(text,), num_pieces=500), tmp_path / "out")
    assert report.num_new < 10
    assert any("500 pieces were asked for" in note for note in report.notes)


def test_a_graft_can_be_grafted_again(llama_like: Path, tmp_path: Path) -> None:
    for number, language in enumerate(("Han", "Arabic")):
        base = llama_like if number == 0 else tmp_path / "0"
        text = write_lines(tmp_path / f"{number}.txt", sentences(language))
        section = Section(text=(text,), script=SCRIPTS[language], num_pieces=30)
        assert graft_tokenizer(base, section, tmp_path / str(number)).expand_violations == 0
    assert load_tokenizer(tmp_path / "1").pad_id == load_tokenizer(tmp_path / "0").pad_id


def test_the_report_lies_in_the_folder(llama_like: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    report = graft_tokenizer(llama_like, Section(text=(text,), num_pieces=20), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "graft.json").read_text(encoding="utf-8"))
    assert written["num_texts_checked"] == report.num_texts_checked > 2000
    assert written["engines"] == ["before saving", "transformers", "sentencepiece"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "graft.json", "expansions.json",
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["prove", "prove_folder"])
def test_a_failed_proof_names_the_text_and_leaves_no_folder(
    llama_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    failed = Proof(7, expand_violations=1, examples={"expand_violations": ["谜谜"]})
    monkeypatch.setattr(graft_module, failing, lambda *_: failed)
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    with pytest.raises(UserError, match=r"expanding new pieces .* 1 of 7 texts .*'谜谜'"):
        graft_tokenizer(llama_like, Section(text=(text,), num_pieces=20), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_unusable_input_is_told(llama_like: Path, tmp_path: Path) -> None:
    """B1 and more: each in two lines that say what was found and what to do."""
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "english.txt").write_text("no Chinese here\n", encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes("今天天气很好".encode("gbk"))
    for name, told, fix in [
        ("empty.txt", "are empty", "--text"),
        ("english.txt", "hold none of the script Han", "--script"),
        ("gbk.txt", "not UTF-8", "iconv"),
        ("missing.txt", "cannot be read", "existing"),
    ]:
        with pytest.raises(UserError, match=told) as raised:
            graft_tokenizer(llama_like, Section(text=(str(tmp_path / name),)), tmp_path / "out")
        assert fix in raised.value.fix
        assert not (tmp_path / "out").exists()


def test_a_misspelt_script_gets_the_nearest_name(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    with pytest.raises(ValueError, match="no script 'Hann'; did you mean Han"):
        Section(text=(text,), script=("Hann",))


def test_an_occupied_folder_is_left_alone(llama_like: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "zh.txt", sentences("Han"))
    with pytest.raises(UserError, match=r"already holds files: zh.txt"):
        graft_tokenizer(llama_like, Section(text=(text,)), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        graft_tokenizer(llama_like, Section(text=(text,)), tmp_path / "zh.txt")


def test_an_inventory_of_another_script_is_told(llama_like: Path, tmp_path: Path) -> None:
    pieces = write_lines(tmp_path / "pieces.txt", ["hello", "12"])
    with pytest.raises(UserError, match="holds no piece of the script Han"):
        graft_tokenizer(llama_like, Section(mode="merge", pieces=pieces), tmp_path / "out")
