"""Texts on which a graft is tried: a sample of the given ones, and ones made to break it.

Owns which texts are hard on tokenizers. Does not compare anything. The same seed gives the same texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.tokenizer import Tokenizer

MAX_TEXT_CHARS = 2000

ODD_TEXTS = (
    "", " ", "  two  spaces ", "\n\n\t x", "a\u00a0b", "𠀀𪚥 rare", "ＦＵＬＬ　ｗｉｄｔｈ", "🙂👩\u200d👧 emoji",
    "def f(x):\n    return x\n", "今日はいい天気ですね", "コンピューター・ゲーム", "오늘은 날씨가 좋다", "Привет, мир",
    "مرحبا بالعالم", "नमस्ते दुनिया", "1234567890 3.14", "e\u0301é", "\x00\x01", "\ufffd", "\r\n\r\n", "䷀䷁", "\ufeffBOM",
    "\u0301\u0301", "x" * 300,
)  # fmt: skip

OLD_TEXTS = (
    "The meeting is on 12 March 2016 at 10:30, in room 204.", "She paid $1,250.00 for 15 tickets.",
    "for i in range(100):\n    total += prices[i] * 1.19", "Call me back before 9 pm, please.",
    "Water boils at 100 degrees; lead melts at 327.", "A list:\n1. apples\n2. pears\n10. plums",
    "Nothing in this line has a number in it.", "In 1969, 600,000,000 people watched.", "x = 2**16 - 1  # 65535",
    "Who wrote this, and why does it matter?", "The train left, the rain stopped, the street was empty.",
    "Version 3.11 needs 20 GB; version 3.12 needs 22.", "e-mail: someone@example.org", "He said: \"no\" — twice.",
)  # fmt: skip
"""Plain English, half of it with numbers: what a careless graft changes first."""

_SIGNS = list(" \n\t,.!?。，！？“”0123456789abcXYZ é🙂你𠀀ｆ、ー")


def sample_real(texts: Sequence[str], num_texts: int, seed: int = 0) -> list[str]:
    """At most `num_texts` of the given texts, cut at 2,000 characters."""
    chosen = random.Random(seed).sample(list(texts), num_texts) if len(texts) > num_texts else texts
    return [text[:MAX_TEXT_CHARS] for text in chosen]


def make_texts(
    old: Tokenizer, new: Tokenizer, real: Sequence[str], script: Script, num_fuzzed: int, seed: int = 0
) -> list[str]:
    """Odd texts, plain English, overlapping pieces, and `num_fuzzed` strings of pieces, script characters and signs."""
    dice = random.Random(seed)
    parts = _texts_of(new, new.piece_ids) or _SIGNS
    fresh = (
        _texts_of(new, new.expansions)
        or _texts_of(new, [one for one in new.piece_ids if one >= old.num_pieces])
        or parts
    )
    scripted = sorted({char for text in real for char in text if script.character.match(char)})
    scripted = scripted or sorted({char for text in fresh for char in text}) or _SIGNS
    pools = [parts, fresh, scripted, _SIGNS]
    fuzzed = []
    for _ in range(num_fuzzed):
        chosen = dice.choices(pools, k=dice.randint(1, 12))
        fuzzed.append("".join(dice.choice(pool) for pool in chosen))
    return [*ODD_TEXTS, *OLD_TEXTS, *overlap_texts(old, new), *fuzzed]


def make_random_texts(num_texts: int, seed: int = 0) -> list[str]:
    """Strings of random bytes read as UTF-8 with mistakes replaced, and of random characters of every plane."""
    dice = random.Random(seed)
    found = []
    for number in range(num_texts):
        length = dice.randint(1, 40)
        if number % 2:
            found.append(dice.randbytes(length).decode(errors="replace"))
            continue
        codes = [dice.choice((0x7F, 0x24F, 0x9FFF, 0x9FFF, 0xFFFF, 0x2FFFF)) for _ in range(length)]
        chars = (chr(dice.randrange(limit + 1)) for limit in codes)
        found.append("".join(char for char in chars if not "\ud800" <= char <= "\udfff"))
    return found


def overlap_texts(old: Tokenizer, new: Tokenizer) -> list[str]:
    """X+Y+Z for every new piece that is both XY and YZ, where two places of one piece overlap."""
    pieces = set(map(new.token_bytes, new.piece_ids))
    found = []
    for piece_id in (one for one in new.piece_ids if one >= old.num_pieces):
        piece = new.token_bytes(piece_id)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if piece.startswith(right) and {left, right, piece[len(right) :]} <= pieces:
                found.append((piece + piece[len(right) :]).decode(errors="ignore"))
    return [text for text in dict.fromkeys(found) if text]


def _texts_of(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    parts = (tokenizer.token_bytes(piece_id) for piece_id in ids)
    return [text for part in parts if (text := part.decode(errors="ignore"))]
