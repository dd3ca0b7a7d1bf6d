"""Learning new pieces: the base's own BPE goes on over text of the new script.

Owns which merges are worth a row. Does not know how a vocabulary is written down (`graft.py`). A symbol is a byte
string: a base token, or a whole character for which the base only has bytes.

Source of the method: continued BPE as measured in TOKENIZER notes; BPE, arXiv 1508.07909.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from graftlm.errors import UserError
from graftlm.text.texts import read_lines
from graftlm.text.tokenizer.tokenizer import Tokenizer

SCRIPTS = (
    "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati", "Gurmukhi",
    "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam", "Mongolian",
    "Myanmar", "Oriya", "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan",
)  # fmt: skip
"""Names offered when a script is misspelt; any Unicode script name works."""

# Private-use planes 15 and 16: one code point stands for one symbol.
_STAND_INS = [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]


@dataclass(frozen=True, slots=True)
class Learned:
    """Pieces worth adding, best first within each list: `characters` for which the base only has bytes, `merges` of
    two symbols in the order in which they were learned."""

    characters: list[str]
    merges: list[tuple[bytes, bytes]]


def script_pattern(scripts: Sequence[str]) -> regex.Pattern[str]:
    """A pattern matching one character of any of the Unicode scripts. Raises UserError for an unknown script."""
    for script in scripts:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            near = difflib.get_close_matches(script.capitalize(), SCRIPTS, n=1)
            raise UserError(
                f"Unicode knows no script {script!r}.",
                f"Did you mean {near[0]}?"
                if near
                else f"Write its Unicode name, for example {', '.join(SCRIPTS[:5])}.",
            ) from None
    return regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]")


def common_characters(name: str, pattern: regex.Pattern[str]) -> list[str]:
    """Characters that get a piece whatever the text holds: GB2312 level 1 (`gb2312-1`), a file's, or `none`."""
    if name == "none":
        return []
    if name == "gb2312-1":
        rows = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 56) for cell in range(1, 95))
        found = [code.decode("gb2312", errors="ignore") for code in rows]
    else:
        found = [char for line in read_lines(Path(name)) for char in line]
    return list(dict.fromkeys(char for char in found if char and pattern.fullmatch(char)))


def symbols_of(base: Tokenizer, runs: Sequence[str]) -> list[list[bytes]]:
    """Each run as the base's tokens, bytes of one unknown character joined; `b"".join` of a list is its run."""
    found = []
    for ids in base.encode_continuations(runs):
        symbols: list[bytes] = []
        part = b""
        for piece_id in ids:
            part += base.token_bytes(piece_id)
            if base.is_byte_level or _is_whole(part):
                symbols.append(part)
                part = b""
        found.append(symbols)
    return found


def learn_pieces(
    base: Tokenizer,
    texts: Iterable[str],
    pattern: regex.Pattern[str],
    num_pieces: int,
    max_chars: int | None,
    forced: Sequence[str],
) -> Learned:
    """At most `num_pieces` pieces that shorten the texts most, `forced` characters among them.

    A merge is worth the number of times it fires, a character the tokens it saves each time it occurs; what a merge
    is made of is then always worth at least as much, so taking the best is closed under its own parts.
    Raises UserError when the texts hold nothing of the script.
    """
    runs = regex.compile(pattern.pattern + "+")
    lines = [found for text in texts if (found := runs.findall(text))]
    if not lines:
        raise UserError(
            "The texts to learn from hold no character of the chosen script.",
            "Give texts in the new language, or name its script (--script, tokenizer.script).",
        )
    distinct = list({run for line in lines for run in line})
    symbols = dict(zip(distinct, symbols_of(base, distinct), strict=True))
    names = sorted({symbol for spelled in symbols.values() for symbol in spelled})
    stand_in = {symbol: chr(_STAND_INS[i]) for i, symbol in enumerate(names)}
    spelled = {run: "".join(stand_in[symbol] for symbol in parts) for run, parts in symbols.items()}
    written = [" ".join(spelled[run] for run in line) for line in lines]
    merges, fired, counts = _train(written, len(names) + num_pieces, max_chars)
    meaning = {char: symbol for symbol, char in stand_in.items()}
    for left, right in merges:
        meaning[left + right] = meaning[left] + meaning[right]
    known = {base.token_bytes(piece_id) for piece_id in range(base.num_pieces)}
    return _choose(base, names, stand_in, meaning, merges, fired, counts, known, num_pieces, max_chars, forced)


def _train(
    written: list[str], num_symbols: int, max_chars: int | None
) -> tuple[list[tuple[str, str]], list[int], Counter[str]]:
    """Merges over stand-ins in learned order, how often each fires, and how often each symbol occurs."""
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"max_token_length": max_chars} if max_chars else {}
    trainer = trainers.BpeTrainer(vocab_size=num_symbols, show_progress=False, min_frequency=2, **settings)
    trained.train_from_iterator(written, trainer)
    listed = json.loads(trained.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in listed]
    used: Counter[str] = Counter()
    by_id = {index: token for token, index in trained.get_vocab().items()}
    for encoded in trained.encode_batch_fast(written, add_special_tokens=False):
        used.update(encoded.ids)
    totals = Counter({by_id[index]: count for index, count in used.items()})
    fired = [0] * len(merges)
    for number in range(len(merges) - 1, -1, -1):
        left, right = merges[number]
        fired[number] = totals[left + right]
        totals[left] += fired[number]
        totals[right] += fired[number]
    return merges, fired, totals


def _choose(
    base: Tokenizer,
    names: list[bytes],
    stand_in: dict[bytes, str],
    meaning: dict[str, bytes],
    merges: list[tuple[str, str]],
    fired: list[int],
    counts: Counter[str],
    known: set[bytes],
    num_pieces: int,
    max_chars: int | None,
    forced: Sequence[str],
) -> Learned:
    forced_new = [char for char in forced if char.encode() not in known]
    candidates: list[tuple[int, int, str | int]] = []
    if not base.is_byte_level:
        taken = set(forced_new)
        unknown = [name for name in names if name not in known and name.decode() not in taken]
        candidates = [
            (-(len(name) - 1) * counts[stand_in[name]], -1, name.decode())
            for name in unknown
            if counts[stand_in[name]] > 1
        ]
    candidates += [(-worth, number, number) for number, worth in enumerate(fired) if worth]
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1], str(candidate[2])))
    budget = max(0, num_pieces - len(forced_new))
    best = [candidate[2] for candidate in candidates[:budget]]
    characters = [*forced_new, *(one for one in best if isinstance(one, str))][:num_pieces]
    available = known | {char.encode() for char in characters} | (set(names) & known)
    chosen: list[tuple[bytes, bytes]] = []
    for number in sorted(one for one in best if isinstance(one, int)):
        left, right = (meaning[part] for part in merges[number])
        whole = left + right
        is_short = max_chars is None or len(whole.decode(errors="ignore")) <= max_chars
        if left in available and right in available and whole not in available and is_short:
            available.add(whole)
            chosen.append((left, right))
    return Learned(characters, chosen)


def _is_whole(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True
