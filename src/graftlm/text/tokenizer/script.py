"""The new language's writing: which characters are its own, and which bytes only they can bring into a text.

Owns Unicode scripts, the characters everyone needs, and the question on which every proof rests: can this piece occur
in a text that holds no character of the script? Does not know vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import regex

from graftlm.errors import UserError
from graftlm.script_names import is_script, nearest_script
from graftlm.text.texts import read_lines

LONGEST_HAN_PIECE_CHARS = 4
"""Longer Chinese pieces are mostly templates of one corpus; the limit costs at most 1 % of compression on it."""


class Script:
    """One or more Unicode scripts. Raises UserError for a name Unicode does not know.

    Attributes: `names`; `character`, a pattern of one character of the script; `run`, a pattern of a stretch of text
    that pieces may be cut from: such a character, then more of them or marks and letters that it shares with other
    scripts (Japanese ー, Arabic vowel marks).
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UserError("No script is named.", "Give --script, for example --script Han.")
        for name in names:
            if not is_script(name):
                fix = nearest_script(name)
                raise UserError(f"Unicode knows no script {name!r}.", fix[:1].upper() + fix[1:])
        self.names = tuple(names)
        own = "[" + "".join(rf"\p{{Script={name}}}" for name in names) + "]"
        shared = "[" + "".join(rf"\p{{Script_Extensions={name}}}" for name in names) + "]"
        self.character = regex.compile(own)
        self.run = regex.compile(rf"{own}(?:{own}|(?=[\p{{L}}\p{{M}}]){shared})*+")
        self._all = regex.compile(own + "+")
        self._owned = lru_cache(maxsize=None)(self._owns)

    @property
    def is_han(self) -> bool:
        """Whether the script is Chinese characters and nothing else."""
        return self.names == ("Han",)

    @cached_property
    def run_with_space(self) -> regex.Pattern[str]:
        """`run` with the space before it, where there is one."""
        return regex.compile(" ?" + self.run.pattern)

    def occurs_in(self, text: str) -> bool:
        """Whether the text holds a character of the script."""
        return self.character.search(text) is not None

    def owns(self, part: bytes) -> bool:
        """Whether a text can hold these UTF-8 bytes only by holding a character of the script.

        True for a whole such character inside; for a cut one when every assigned character that begins so belongs to
        the script. Continuation bytes alone belong to nobody.
        """
        return self._owned(part)

    def _owns(self, part: bytes) -> bool:
        if self.occurs_in(part.decode(errors="ignore")):
            return True
        lead = next((k for k, byte in enumerate(part) if byte >= 0xC2), None)
        return lead is not None and self._owns_beginning(part[lead:])

    def _owns_beginning(self, begun: bytes) -> bool:
        """`begun` is a lead byte and fewer continuation bytes than it asks for."""
        num_bytes = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
        num_free_bits = 6 * (num_bytes - len(begun))
        if num_free_bits <= 0:
            return False
        code = begun[0] & (0xFF >> (num_bytes + 1))
        for byte in begun[1:]:
            code = code << 6 | byte & 0x3F
        first, last = code << num_free_bits, ((code + 1) << num_free_bits) - 1
        overlong = {3: 0x800, 4: 0x10000}.get(num_bytes, 0)
        codes = range(max(first, overlong), min(last, 0x10FFFF) + 1)
        assigned = [chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF and _is_assigned(chr(code))]
        return bool(assigned) and self._all.fullmatch("".join(assigned)) is not None


def common_characters(name: str, script: Script) -> list[str]:
    """Characters that get a piece whatever the text holds: GB2312 level 1 (`gb2312-1`), a file's, or `none`.

    Those that are not of the script are left out.
    """
    if name == "none":
        return []
    if name == "gb2312-1":
        rows = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 56) for cell in range(1, 95))
        found = [code.decode("gb2312", errors="ignore") for code in rows]
    else:
        found = [char for line in read_lines(Path(name)) for char in line]
    return list(dict.fromkeys(char for char in found if char and script.character.fullmatch(char)))


_ASSIGNED = regex.compile(r"\P{Cn}")


def _is_assigned(char: str) -> bool:
    return _ASSIGNED.match(char) is not None
