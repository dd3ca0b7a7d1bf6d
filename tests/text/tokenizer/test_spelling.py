"""Spelling runs by fragments gives what encoding every run whole gives."""

from collections import Counter
from pathlib import Path

import pytest
from small_tokenizers import SCRIPTS, sentences

from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.learn import count_runs
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.spelling import spell_runs, whole_characters


class Numbers:
    """A number for every new byte string, and back."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def __call__(self, part: bytes) -> int:
        if part not in self.parts:
            self.parts.append(part)
        return self.parts.index(part)


@pytest.mark.parametrize("language", list(SCRIPTS))
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen"])
def test_symbols_are_the_bases_tokens(bases: dict[str, Path], kind: str, language: str) -> None:
    base, number = load_tokenizer(bases[kind]), Numbers()
    runs = count_runs(sentences(language), Script(SCRIPTS[language]), language in ("Arabic", "Devanagari"))
    words, counts = spell_runs(base, runs, number)
    found: Counter[tuple[bytes, ...]] = Counter()
    for word, count in zip(words, counts, strict=True):
        found[tuple(number.parts[one] for one in word)] += count
    expected: Counter[tuple[bytes, ...]] = Counter()
    for run, count in runs.items():
        if base.is_byte_level:
            for ids in base.engine.encode_words([run])[0]:  # type: ignore[attr-defined]
                expected[tuple(map(base.token_bytes, ids))] += count
        else:
            expected[tuple(whole_characters(map(base.token_bytes, base.encode_continuation(run))))] += count
    assert found == expected


def test_bytes_of_a_character_are_joined() -> None:
    parts = [b"a", "天".encode()[:2], "天".encode()[2:], "中".encode()[:1], "中".encode()[1:2], "中".encode()[2:]]
    assert list(whole_characters(parts)) == [b"a", "天".encode(), "中".encode()]
