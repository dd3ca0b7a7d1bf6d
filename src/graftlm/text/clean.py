"""Cleaning what was said: characters nobody meant to write go, everything else stays as it is.

Owns which characters those are and the optional filters: the share of a script, Traditional to Simplified Chinese.
Does not know rows or formats. Punctuation is never touched: a full-width comma in an answer is what shall be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex

from graftlm.errors import UserError

# Controls but tab and newline, the zero-width space (no word needs it, as some need the joiners U+200C and U+200D),
# the byte order mark and non-characters. Surrogates and U+FFFD are here so that one search finds all there is to do.
_SUSPECT = regex.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff\ufffd-\uffff\ud800-\udfff]")
_LINE_END = regex.compile("\r\n|[\r\x0b\x0c\x85]")
_CLEANED = (
    ("NUL removed", regex.compile("\x00")),
    ("control characters removed", regex.compile("[\x01-\x08\x0e-\x1f\x7f-\x9f]")),
    ("zero-width spaces removed", regex.compile("\u200b")),
    ("byte order marks removed", regex.compile("[\ufeff\ufffe\uffff]")),
)
_LETTER = regex.compile(r"\p{L}")


class BrokenText(ValueError):
    """The text was destroyed before it came here; the message says how."""


def clean(text: str) -> tuple[str, list[str]]:
    """`text` without what nobody wrote, and the names of what was done. Raises BrokenText."""
    if not _SUSPECT.search(text):
        return text, []
    if "\ufffd" in text:
        raise BrokenText("broken characters (U+FFFD)")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BrokenText("broken Unicode (lone surrogates)")
    done = []
    text, count = _LINE_END.subn("\n", text)
    if count:
        done.append("line ends made \\n")
    for name, pattern in _CLEANED:
        text, count = pattern.subn("", text)
        if count:
            done.append(name)
    return text, done


@lru_cache(maxsize=8)
def _script(name: str) -> Any:
    try:
        return regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        raise UserError(f"Unicode knows no script {name!r}.", "Write its name, for example Han or Thai.") from None


def script_share(text: str, script: str) -> float:
    """The share of `text`'s letters that belong to a Unicode script; 1 where there is no letter. Raises UserError."""
    letters = len(_LETTER.findall(text))
    return len(_script(script).findall(text)) / letters if letters else 1.0


@lru_cache(maxsize=1)
def simplifier() -> Callable[[str], str]:
    """A function making Traditional Chinese Simplified (OpenCC, t2s). Raises UserError when OpenCC is not installed."""
    try:
        from opencc import OpenCC  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "simplify: true needs OpenCC, which is not installed.",
            "Install it (pip install 'graftlm[opencc]'), or set simplify: false.",
        ) from None
    return OpenCC("t2s").convert
