"""Cleaning: what goes, what stays."""

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.errors import UserError
from graftlm.text.clean import BrokenText, clean, script_share, simplifier


@pytest.mark.parametrize(
    ("text", "expected", "done"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f", "a\nb\nc\nd\ne\nf", ["line ends made \\n"]),
        ("a\x00b", "ab", ["NUL removed"]),
        ("a\x07\x7f\x9bb\tc\n", "ab\tc\n", ["control characters removed"]),
        ("a\u200bb", "ab", ["zero-width spaces removed"]),
        ("\ufeffa\ufffe", "a", ["byte order marks removed"]),
        ("a\x00\r\n", "a\n", ["line ends made \\n", "NUL removed"]),
    ],
)
def test_what_nobody_wrote_goes_and_is_named(text: str, expected: str, done: list[str]) -> None:
    """B1: NUL, other controls, CRLF, byte order marks."""
    assert clean(text) == (expected, done)


@pytest.mark.parametrize(
    "text",
    [
        "，。！？；：（）“”‘’《》、…—～％＋１２３ＡＢＣ　",
        "می‌خواهم क्‍ष",
        "👩‍💻",
        "e\u0301 \u00e9",
        "\U000f0000",
        "\xa0\u2028",
    ],
)
def test_what_somebody_wrote_stays(text: str) -> None:
    assert clean(text) == (text, [])


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "caf\ufffd"])
def test_destroyed_text_is_refused(text: str) -> None:
    """B1: lone surrogates, and the mark that a decoder left where characters were lost."""
    with pytest.raises(BrokenText):
        clean(text)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    try:
        cleaned, _ = clean(text)
    except BrokenText:
        return
    assert clean(cleaned) == (cleaned, [])


def test_the_share_of_a_script() -> None:
    assert script_share("你好ab", "Han") == 0.5
    assert script_share("1 + 1 = 2", "Han") == 1.0
    with pytest.raises(UserError, match="no script 'Hann'"):
        script_share("a", "Hann")


def test_simplifying_needs_opencc(monkeypatch: pytest.MonkeyPatch) -> None:
    simplifier.cache_clear()
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(UserError, match="OpenCC, which is not installed") as told:
        simplifier()
    assert "graftlm[opencc]" in told.value.fix


def test_simplifying_is_opencc_from_traditional_to_simplified(monkeypatch: pytest.MonkeyPatch) -> None:
    simplifier.cache_clear()

    class Converter:
        def __init__(self, configuration: str) -> None:
            assert configuration == "t2s"

        def convert(self, text: str) -> str:
            return text.replace("漢", "汉")

    stand_in = types.ModuleType("opencc")
    stand_in.OpenCC = Converter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opencc", stand_in)
    assert simplifier()("漢字") == "汉字"
    simplifier.cache_clear()
