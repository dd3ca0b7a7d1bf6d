"""Names of Unicode scripts: which there are, and what is said of one there is not.

Owns that question alone, for recipes and for texts. Which characters a script holds: `text/tokenizer/script.py`.
"""

from __future__ import annotations

import difflib

import regex

NAMES = (
    "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati", "Gurmukhi",
    "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam", "Mongolian",
    "Myanmar", "Oriya", "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan",
)  # fmt: skip
"""Names offered when a script is misspelt; any Unicode script name works."""


def is_script(name: str) -> bool:
    """Whether Unicode knows a script of this name."""
    try:
        return bool(regex.fullmatch(r"[A-Za-z_ ]+", name) and regex.compile(rf"\p{{Script={name}}}"))
    except regex.error:
        return False


def nearest_script(name: str) -> str:
    """A question naming the script that was probably meant, else how one is named."""
    near = difflib.get_close_matches(name.capitalize(), NAMES, n=1)
    return f"did you mean {near[0]}?" if near else f"write its Unicode name, for example {', '.join(NAMES[:5])}"
