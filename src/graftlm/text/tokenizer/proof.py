"""Proof of a graft, on texts: what holds for every text by construction is tried on many.

Owns the four comparisons (expansion, engines, round trip, old text) and the texts to try. Does not know how pieces were
found. Source of the theorems: DESIGN of the graft; a text without any new piece has an identical merge trace, and with
all new merges ranked last, expanding new ids gives the base's ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
import sentencepiece

from graftlm.text.tokenizer.tokenizer import Tokenizer, load_tokenizer

MAX_TEXT_CHARS = 2000
ODD_TEXTS = (
    "", " ", "  two  spaces ", "\n\n\t x", "a\u00a0b", "𠀀𪚥 rare", "ＦＵＬＬ　ｗｉｄｔｈ", "🙂👩‍👩‍👧 emoji", "def f(x):\n    return x\n",
    "今日はいい天気ですね", "오늘은 날씨가 좋다", "Привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया", "1234567890 3.14", "e\u0301é", "\x00\x01", "�",
)  # fmt: skip


@dataclass(slots=True)
class Proof:
    """Counts over the texts tried; `examples` holds texts that failed, shortest first."""

    num_texts_checked: int = 0
    expand_violations: int = 0
    engine_disagreements: int = 0
    roundtrip_failures: int = 0
    old_texts_changed: int = 0
    overlap_triples: int = 0
    chars_per_token: dict[str, float] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)


def sample_texts(
    old: Tokenizer, new: Tokenizer, texts: Sequence[str], pattern: regex.Pattern[str], num_texts: int, seed: int = 0
) -> list[str]:
    """Texts to try: a sample of the given ones, odd ones, self-overlapping pieces, and as many fuzzed; same seed, same
    texts."""
    dice = random.Random(seed)
    given = [text[:MAX_TEXT_CHARS] for text in texts]
    real = dice.sample(given, num_texts // 2) if len(given) > num_texts // 2 else given
    parts = [part for i in range(new.num_pieces) if (part := new.token_bytes(i).decode(errors="ignore"))]
    fresh = [
        part for i in range(old.num_pieces, new.num_pieces) if (part := new.token_bytes(i).decode(errors="ignore"))
    ]
    scripted = [char for char in {c for text in real for c in text} if pattern.match(char)] or ["中"]
    scripted.sort()
    signs = list(" \n\t,.!?。，！？“”0123456789abcXYZ é🙂你𠀀ｆ、")
    fuzzed = []
    for _ in range(num_texts - num_texts // 2):
        pools = dice.choices([parts, fresh or parts, scripted, signs], k=dice.randint(1, 12))
        fuzzed.append("".join(dice.choice(pool) for pool in pools))
    return [*real, *ODD_TEXTS, *overlap_texts(old, new), *fuzzed]


def overlap_texts(old: Tokenizer, new: Tokenizer) -> list[str]:
    """X+Y+Z for every new piece that is both XY and YZ, where the two places tie."""
    pieces = {new.token_bytes(i) for i in range(new.num_pieces)}
    found = []
    for piece_id in range(old.num_pieces, new.num_pieces):
        piece = new.token_bytes(piece_id)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces and piece.startswith(right):
                rest = piece[len(right) :]
                if rest in pieces:
                    found.append((left + right + rest).decode(errors="ignore"))
    return [text for text in dict.fromkeys(found) if text]


def prove(old: Tokenizer, new: Tokenizer, texts: Sequence[str], pattern: regex.Pattern[str]) -> Proof:
    """Compare two tokenizers in memory."""
    proof = Proof(num_texts_checked=len(texts), overlap_triples=len(overlap_texts(old, new)))
    before, after = old.encode_batch(texts), new.encode_batch(texts)
    sums = {"old": [0, 0], "new": [0, 0]}
    failed = []
    for text, old_ids, new_ids in zip(texts, before, after, strict=True):
        if new.expand(new_ids) != old_ids:
            proof.expand_violations += 1
            failed.append(text)
        if new.decode(new_ids) != text and old.decode(old_ids) == text:
            proof.roundtrip_failures += 1
            failed.append(text)
        has_script = bool(pattern.search(text))
        if not has_script and new_ids != old_ids:
            proof.old_texts_changed += 1
        if has_script:
            sums["old"][0], sums["old"][1] = sums["old"][0] + len(text), sums["old"][1] + len(old_ids)
            sums["new"][0], sums["new"][1] = sums["new"][0] + len(text), sums["new"][1] + len(new_ids)
    proof.chars_per_token = {name: round(chars / tokens, 4) for name, (chars, tokens) in sums.items() if tokens}
    proof.examples = sorted(set(failed), key=len)
    return proof


def prove_folder(
    old: Tokenizer, new: Tokenizer, folder: Path, texts: Sequence[str], pattern: regex.Pattern[str]
) -> Proof:
    """Load a written folder again in every engine and compare: ours, transformers', SentencePiece's."""
    loaded = load_tokenizer(folder)
    proof = prove(old, loaded, texts, pattern)
    expected = new.encode_batch(texts)
    disagreeing = set()
    for encode in (loaded.encode_batch, *_other_engines(loaded, folder)):
        for text, wanted, found in zip(texts, expected, encode(texts), strict=True):
            if list(found) != wanted:
                disagreeing.add(text)
    proof.engine_disagreements = len(disagreeing)
    proof.examples = sorted({*proof.examples, *disagreeing}, key=len)
    return proof


def _other_engines(tokenizer: Tokenizer, folder: Path) -> list[Any]:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(folder))
    controls = tuple(tokenizer.special_tokens)

    def by_transformers(texts: Sequence[str]) -> list[list[int]]:
        # transformers reads a control token spelled out in a text as that token; we never do, so such texts are ours.
        plain = [text for text in texts if not any(control in text for control in controls)]
        found = iter(auto(plain, add_special_tokens=False)["input_ids"]) if plain else iter(())
        return [
            tokenizer.encode(text) if any(control in text for control in controls) else next(found) for text in texts
        ]

    engines: list[Any] = [by_transformers]
    if tokenizer.model is not None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model.SerializeToString())
        engines.append(lambda texts: processor.encode(list(texts)))
    return engines
