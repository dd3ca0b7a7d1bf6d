"""Checking any two tokenizers against each other: is the second an exact graft of the first, and if not, what drifts?

Owns the comparison and its figures. Does not graft. For a pair that was not made by a graft, each id of the second
stands for the first's encoding of its text, so that the same expansion can be tried.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.run import say
from graftlm.script_names import NAMES
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer.load import find_folder, load_tokenizer
from graftlm.text.tokenizer.proof import other_engines, prove
from graftlm.text.tokenizer.samples import MAX_TEXT_CHARS, make_texts
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.tokenizer import Tokenizer

NUM_FUZZED_TEXTS = 2000
_NUM_EXAMPLES = 5
_SHOWN_PIECES = 12


def check_tokenizers(old: str | Path, new: str | Path, texts: Sequence[str] = ()) -> dict[str, Any]:
    """Try on every text of the files `texts`, and on made ones, whether `new` encodes as a graft of `old` should.

    Returns the counts of a graft's report, whether they make it exact (`is_exact`), the share of texts by file whose
    encoding differs (`drift`), and examples of text without the new script that is cut differently. Raises UserError
    for unusable tokenizers or texts.
    """
    before, after = load_tokenizer(old), load_tokenizer(new)
    is_graft = _is_graft_of(after, before)
    moved = _moved_ids(before, after)
    if not is_graft:
        after.expansions = _expansions(before, after)
    script = _script_of(before, after)
    say(f"script of the new pieces: {'+'.join(script.names)}")
    by_file = {str(path): [text[:MAX_TEXT_CHARS] for text in read_texts(path)] for path in texts}
    real = [text for given in by_file.values() for text in given]
    made = make_texts(before, after, real, script, NUM_FUZZED_TEXTS)
    proof = prove(before, after, real, made, script, other_engines(after, _folder_to_try(new)))
    num_shared = min(before.num_pieces, after.num_pieces) - len(moved)
    faults = (proof.expand_violations, proof.engine_disagreements, proof.roundtrip_failures, proof.old_texts_changed)
    return {
        "is_exact": not any(faults) and not moved and not proof.unreachable_pieces,
        "is_graft": is_graft,
        "script": script.names,
        "num_old": before.num_pieces,
        "num_new": after.num_pieces - num_shared,
        "num_total": after.num_pieces,
        "old_ids_moved": len(moved),
        **asdict(proof),
        "drift": {path: _drift(before, after, given, script) for path, given in by_file.items()},
        "drift_examples": _examples(before, after, [*real, *made], script),
    }


def _is_graft_of(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether `new` holds what a graft leaves behind, for a base of this size."""
    return bool(new.expansions) and new.first_new_id == old.num_pieces


def _folder_to_try(source: str | Path) -> Path | None:
    """The folder transformers can read, if `source` is one with a tokenizer.json or a configuration."""
    if Path(source).is_file():
        return None
    return find_folder(source)


def _piece(tokenizer: Tokenizer, piece_id: int) -> str | None:
    return tokenizer.piece(piece_id) if tokenizer.has_piece(piece_id) else None


def _moved_ids(old: Tokenizer, new: Tokenizer) -> list[int]:
    """Ids of both that stand for different pieces."""
    shared = range(min(old.num_pieces, new.num_pieces))
    return [piece_id for piece_id in shared if _piece(old, piece_id) != _piece(new, piece_id)]


def _expansions(old: Tokenizer, new: Tokenizer) -> dict[int, tuple[int, ...]]:
    """For every id of `new` that is not an id of `old` with the same piece: the base's ids of its text."""
    texts = {}
    for piece_id in new.piece_ids:
        if piece_id in new.special_ids or new.piece(piece_id) == _piece(old, piece_id):
            continue
        try:
            texts[piece_id] = new.token_bytes(piece_id).decode()
        except UnicodeDecodeError:
            continue
    spelled = old.encode_continuations(list(texts.values()))
    return {piece_id: tuple(ids) for piece_id, ids in zip(texts, spelled, strict=True)}


def _script_of(old: Tokenizer, new: Tokenizer) -> Script:
    """The scripts that hold at least a tenth of the new pieces' letters, Latin only if no other does; else Han."""
    given = (new.graft or {}).get("script")
    if given:
        return Script(given)
    fresh = "".join(new.token_bytes(piece_id).decode(errors="ignore") for piece_id in new.expansions)
    scripts = {name: Script([name]) for name in NAMES}
    counts = {name: len(script.character.findall(fresh)) for name, script in scripts.items()}
    total = sum(counts.values()) - counts["Latin"]
    chosen = [name for name, count in counts.items() if name != "Latin" and count and count * 10 >= total]
    return Script(chosen or (["Latin"] if counts["Latin"] else ["Han"]))


def _drift(old: Tokenizer, new: Tokenizer, texts: Sequence[str], script: Script) -> dict[str, Any]:
    before, after = old.encode_batch(texts), new.encode_batch(texts)
    changed = [text for text, a, b in zip(texts, before, after, strict=True) if a != b]
    without = [text for text in changed if not script.occurs_in(text)]
    return {
        "num_texts": len(texts),
        "num_changed": len(changed),
        "num_changed_without_script": len(without),
        "share_changed": round(len(changed) / max(1, len(texts)), 4),
    }


def _examples(old: Tokenizer, new: Tokenizer, texts: Sequence[str], script: Script) -> list[dict[str, Any]]:
    """The shortest texts without the script that are cut differently, shown where the two part."""
    without = [text for text in texts if not script.occurs_in(text)]
    pairs = zip(without, old.encode_batch(without), new.encode_batch(without), strict=True)
    differing = sorted((one for one in pairs if one[1] != one[2]), key=lambda one: len(one[0]))
    found = []
    for text, old_ids, new_ids in differing[:_NUM_EXAMPLES]:
        a, b = [old.piece(i) for i in old_ids], [new.piece(i) for i in new_ids]
        blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        _, a0, a1, b0, b1 = next((one for one in blocks if one[0] != "equal"), ("", 0, len(a), 0, len(b)))
        found.append({"text": text[:80], "old": a[a0:a1][:_SHOWN_PIECES], "new": b[b0:b1][:_SHOWN_PIECES]})
    return found
