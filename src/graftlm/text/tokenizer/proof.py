"""Proof of a graft, on texts: what holds for every text by construction is tried on many.

Owns the comparisons (expansion, engines, round trip, old text, reachable pieces). Does not know how pieces were found
nor which texts to try (`samples.py`).

Why it must hold: a text in which no new piece occurs has an identical merge trace; and when all new merges rank after
all old ones, no new merge joins less than whole old tokens, so expanding new ids gives the base's ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from graftlm.run import progress
from graftlm.text.tokenizer.load import load_tokenizer
from graftlm.text.tokenizer.samples import overlap_texts
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.tokenizer import CONFIG_FILE, Tokenizer

Encode = Callable[[Sequence[str]], list[list[int]]]

_TEXTS_AT_A_TIME = 1000
_NUM_EXAMPLES = 5


@dataclass(slots=True)
class Proof:
    """Counts over the texts tried; `examples` holds some that failed, shortest first, by what failed.

    `old_texts_changed` counts, of the `num_old_texts` without a character of the script, those encoded differently.
    `chars_per_token` is over the real texts that hold the script.
    """

    num_texts_checked: int = 0
    num_old_texts: int = 0
    expand_violations: int = 0
    engine_disagreements: int = 0
    roundtrip_failures: int = 0
    old_texts_changed: int = 0
    unreachable_pieces: int = 0
    overlap_triples: int = 0
    engines: list[str] = field(default_factory=list)
    chars_per_token: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, text: str) -> None:
        """Count a failure and keep the shortest texts that show it."""
        name = what.partition(": ")[0]
        setattr(self, name, getattr(self, name) + 1)
        kept = self.examples.setdefault(what, [])
        if text not in kept:
            kept.append(text)
        kept.sort(key=len)
        del kept[_NUM_EXAMPLES:]


def prove(
    old: Tokenizer,
    new: Tokenizer,
    real: Sequence[str],
    made: Sequence[str],
    script: Script,
    engines: dict[str, Encode] | None = None,
) -> Proof:
    """Compare two tokenizers on texts, and `new` with every other engine that should encode as it does.

    Compression is measured on the `real` texts only; everything else on the `made` ones too.
    """
    engines = engines or {}
    texts = [*real, *made]
    proof = Proof(len(texts), overlap_triples=len(overlap_texts(old, new)), engines=list(engines))
    sizes = [0, 0, 0]  # characters, old ids, new ids of real texts in the script
    starts = range(0, len(texts), _TEXTS_AT_A_TIME)
    for start in progress(starts, len(starts), "proving on texts, thousands"):
        part = texts[start : start + _TEXTS_AT_A_TIME]
        after = new.encode_batch(part)
        for number, (text, old_ids, new_ids) in enumerate(zip(part, old.encode_batch(part), after, strict=True)):
            has_script = script.occurs_in(text)
            _compare(proof, old, new, text, old_ids, new_ids, has_script)
            if has_script and start + number < len(real):
                sizes = [a + b for a, b in zip(sizes, (len(text), len(old_ids), len(new_ids)), strict=True)]
        for name, encode in engines.items():
            for text, wanted, found in zip(part, after, encode(part), strict=True):
                if list(found) != wanted:
                    proof.note(f"engine_disagreements: {name}", text)
    _reach(proof, old, new)
    num_chars, num_old, num_new = sizes
    if num_chars:
        proof.chars_per_token = {"old": round(num_chars / num_old, 4), "new": round(num_chars / num_new, 4)}
    return proof


def _compare(
    proof: Proof, old: Tokenizer, new: Tokenizer, text: str, old_ids: list[int], new_ids: list[int], has_script: bool
) -> None:
    if new.expand(new_ids) != old_ids:
        proof.note("expand_violations", text)
    if new.decode(new_ids) != text and old.decode(old_ids) == text:
        proof.note("roundtrip_failures", text)
    if not has_script:
        proof.num_old_texts += 1
        if new_ids != old_ids:
            proof.note("old_texts_changed", text)


def _reach(proof: Proof, old: Tokenizer, new: Tokenizer) -> None:
    """Every new piece that is whole text must come out of that text, and expand to the base's encoding of it."""
    whole = {}
    for piece_id in new.expansions:
        try:
            whole[piece_id] = new.token_bytes(piece_id).decode()
        except UnicodeDecodeError:
            continue  # part of a character: a step on the way to a longer piece
    texts = list(whole.values())
    found, spelled = new.encode_continuations(texts), old.encode_continuations(texts)
    for (piece_id, text), ids, old_ids in zip(whole.items(), found, spelled, strict=True):
        if ids != [piece_id]:
            proof.note("unreachable_pieces", text)
        elif list(new.expansions[piece_id]) != old_ids:
            proof.note("expand_violations", text)


def prove_folder(
    old: Tokenizer, new: Tokenizer, folder: Path, real: Sequence[str], made: Sequence[str], script: Script
) -> Proof:
    """Load a written folder again, prove it, and compare it with every engine and with `new`, from which it came."""
    loaded = load_tokenizer(folder)
    return prove(old, loaded, real, made, script, {"before saving": new.encode_batch, **other_engines(loaded, folder)})


def other_engines(tokenizer: Tokenizer, folder: Path | None) -> dict[str, Encode]:
    """Every engine at hand that ought to encode as `tokenizer`: transformers from its folder, SentencePiece."""
    engines: dict[str, Encode] = {}
    if folder is not None and (folder / CONFIG_FILE).is_file():
        engines["transformers"] = _by_transformers(tokenizer, folder)
    if tokenizer.model is not None:
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model.SerializeToString())
        engines["sentencepiece"] = lambda texts: processor.encode(list(texts))
    return engines


def _by_transformers(tokenizer: Tokenizer, folder: Path) -> Encode:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(folder))
    controls = tuple(tokenizer.special_tokens)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        # transformers reads a control token spelled out in a text as that token; we never do, so such texts are ours.
        plain = [text for text in texts if not any(control in text for control in controls)]
        found = iter(auto(plain, add_special_tokens=False)["input_ids"]) if plain else iter(())
        return [
            tokenizer.encode(text) if any(control in text for control in controls) else next(found) for text in texts
        ]

    return encode
