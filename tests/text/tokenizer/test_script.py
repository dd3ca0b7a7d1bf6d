"""Which bytes a script owns, checked against every character there is."""

import sys
import unicodedata
from pathlib import Path

import pytest
import regex

from graftlm.errors import UserError
from graftlm.text.tokenizer.script import Script, common_characters

ALL = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
ASSIGNED = regex.findall(r"\P{Cn}", "".join(ALL))
BEGUN: dict[bytes, set[str]] = {}
for _char in ASSIGNED:
    for _cut in range(1, len(_char.encode())):
        BEGUN.setdefault(_char.encode()[:_cut], set()).add(_char)


@pytest.mark.parametrize(
    "names", [["Han"], ["Arabic"], ["Devanagari"], ["Hiragana", "Katakana"], ["Hangul"], ["Cyrillic"]]
)
def test_owned_beginnings_begin_only_characters_of_the_script(names: list[str]) -> None:
    """T3: the proof for byte-level bases stands on this, so it is tried on all of Unicode."""
    script = Script(names)
    own = set(script.character.findall("".join(ASSIGNED)))
    assert own
    for begun, chars in BEGUN.items():
        assert script.owns(begun) == (chars <= own), begun


def test_owned_parts() -> None:
    han = Script(["Han"])
    assert han.owns("中".encode())
    assert han.owns("x中".encode())
    assert han.owns(b"\xa4\xa9" + "中".encode()), "the end of one character and a whole one"
    assert not han.owns(b"\xa4\xa9"), "continuation bytes belong to nobody"
    assert not han.owns("。".encode())
    assert not han.owns("カ".encode())
    assert not han.owns("é中".encode()[:3]), "a lead byte alone after a foreign character"


def test_runs_hold_marks_and_shared_letters_but_begin_with_the_script() -> None:
    assert Script(["Katakana"]).run.findall("ーコンピューター、ー") == ["コンピューター"]
    assert Script(["Arabic"]).run.findall("مَدرسة، كـتاب 12") == ["مَدرسة", "كـتاب"]
    assert Script(["Devanagari"]).run.findall("हिन्दी। भाषा") == ["हिन्दी", "भाषा"]
    assert Script(["Han"]).run.findall("2016年，今天") == ["年", "今天"]
    assert Script(["Arabic"]).run_with_space.findall("a كتاب في") == [" كتاب", " في"]


def test_unknown_scripts_are_told() -> None:
    for name, fix in [("Hann", "Han"), ("devanagri", "Devanagari"), ("?", "Unicode name")]:
        with pytest.raises(UserError, match="knows no script") as raised:
            Script([name])
        assert fix in raised.value.fix
    with pytest.raises(UserError, match="No script is named"):
        Script([])


def test_common_characters(tmp_path: Path) -> None:
    han = Script(["Han"])
    level_1 = common_characters("gb2312-1", han)
    assert len(level_1) == 3755
    assert (level_1[0], level_1[-1]) == ("啊", "座")
    assert common_characters("none", han) == []
    (tmp_path / "own.txt").write_text("中文\n中x国，", encoding="utf-8")
    assert common_characters(str(tmp_path / "own.txt"), han) == ["中", "文", "国"]
    assert common_characters("gb2312-1", Script(["Arabic"])) == []
    with pytest.raises(UserError, match="cannot be read"):
        common_characters(str(tmp_path / "missing.txt"), han)


def test_all_of_unicode_is_known_to_the_pattern_library() -> None:
    """`regex` must know at least the characters Python knows, or "assigned" would be too small a set."""
    known = set(ASSIGNED)
    assert not [char for char in ALL if unicodedata.category(char) != "Cn" and char not in known]
