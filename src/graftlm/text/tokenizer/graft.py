"""Grafting: new pieces onto a base tokenizer, proved before the folder is finished.

Owns the three modes and how each kind of vocabulary is written: `continued` and `merge` put every new merge after all
old ones, so that expanding new ids gives the base's own encoding of any text; `card` repeats the published merge.
Learning lies in `learn.py`, proof in `proof.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import regex
from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer.engines import BYTE_OF_CHAR, FastEngine
from graftlm.text.tokenizer.learn import Learned, common_characters, learn_pieces, script_pattern
from graftlm.text.tokenizer.proof import Proof, prove, prove_folder, sample_texts
from graftlm.text.tokenizer.sentencepiece_bpe import CONTROL, NORMAL, ODDITY_SCORE, SPACE, ModelProto
from graftlm.text.tokenizer.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_model

PAD_PIECE = "[PAD]"
NUM_SAMPLE_TEXTS = 4000
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


@dataclass(slots=True)
class GraftReport:
    """What a graft added and what was proved of it; counts of texts unless named otherwise."""

    mode: str
    script: tuple[str, ...]
    num_old: int
    num_new: int
    num_total: int
    first_new_id: int
    dropped: dict[str, int] = field(default_factory=dict)
    num_texts_checked: int = 0
    expand_violations: int = 0
    engine_disagreements: int = 0
    roundtrip_failures: int = 0
    old_texts_changed: int = 0
    overlap_triples: int = 0
    chars_per_token: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def graft_tokenizer(base: str | Path, section: Section, out: Path) -> GraftReport:
    """Graft new pieces onto `base` as the section asks and write the folder `out`, proved and re-loaded.

    Raises UserError: unusable input, or a proof that fails, told with the text that shows it.
    """
    old = load_tokenizer(base)
    _check_out(out)
    pattern = script_pattern(section.script)
    texts = [text for path in section.text for text in read_texts(path)]
    pad = PAD_PIECE if section.pad_piece and old.pad_id is None else None
    if section.mode == "card":
        new, dropped = _graft_card(old, _inventory(section.pieces), pad)
    else:
        new, dropped = _graft_after(old, section, pattern, texts, pad)
    report = GraftReport(
        section.mode, section.script, old.num_pieces, new.num_pieces - old.num_pieces, new.num_pieces, old.num_pieces,
        dropped,
    )  # fmt: skip
    if section.mode == "continued" and report.num_new < section.num_pieces:
        report.notes.append(f"{section.num_pieces} pieces were asked for; the texts are worth {report.num_new}.")
    checked = sample_texts(old, new, texts, pattern, NUM_SAMPLE_TEXTS)
    _write_down(report, prove(old, new, checked, pattern))
    is_exact = section.mode != "card"
    if not is_exact:
        report.notes.append(
            "The published merge scores every new piece 0: new pieces outrank old ones and tie, so old texts may change, "
            "and no tokenizer.json can encode alike; only tokenizer.model is written."
        )
    _finish(old, new, report, checked, pattern, out, is_exact)
    return report


def _check_out(out: Path) -> None:
    strangers = [p.name for p in out.iterdir() if p.name not in ("started.json",)] if out.is_dir() else []
    if [name for name in strangers if name != ".building"]:
        raise UserError(f"{out} already holds files: {', '.join(sorted(strangers)[:3])}.", "Give --out a new folder.")


def _write_down(report: GraftReport, proof: Proof) -> None:
    for name in (
        "num_texts_checked",
        "expand_violations",
        "roundtrip_failures",
        "old_texts_changed",
        "overlap_triples",
    ):
        setattr(report, name, getattr(proof, name))
    report.engine_disagreements += proof.engine_disagreements
    report.chars_per_token = proof.chars_per_token


def _finish(
    old: Tokenizer,
    new: Tokenizer,
    report: GraftReport,
    checked: list[str],
    pattern: regex.Pattern[str],
    out: Path,
    is_exact: bool,
) -> None:
    """Write beside, load again, prove again, then move into place."""
    building = out / ".building"
    new.graft = asdict(report)
    new.save(building)
    again = prove_folder(old, new, building, checked, pattern)
    _write_down(report, again)
    failures = {
        "expanding its new pieces does not give the base's encoding": again.expand_violations if is_exact else 0,
        "two engines disagree": again.engine_disagreements,
        "text does not come back from its ids": again.roundtrip_failures,
    }
    for what, count in failures.items():
        if count:
            raise UserError(
                f"The graft failed its proof: {what} on {count} of {again.num_texts_checked} texts, "
                f"for example {again.examples[:1]!r}. {out} is not finished; the attempt lies in {building}.",
                "Report the text with the base and settings; another --script or fewer pieces may avoid it.",
            )
    new.graft = asdict(report)
    new.save(building)
    for file in sorted(building.iterdir()):
        os.replace(file, out / file.name)
    building.rmdir()


def _inventory(pieces: str | None) -> Tokenizer:
    assert pieces is not None, "the section checks that merge and card have pieces"
    return load_tokenizer(pieces)


def _graft_card(old: Tokenizer, inventory: Tokenizer, pad: str | None) -> tuple[Tokenizer, dict[str, int]]:
    """Every piece the base lacks, score 0, in the inventory's order. Source: the published merge of the card."""
    if old.model is None or inventory.model is None:
        raise UserError(
            "Mode card joins two SentencePiece models: its tied scores have no tokenizer.json form "
            "(for XY and YX tied, XYX and YXY need opposite orders of merges).",
            "Give tokenizer.model files for --base and --pieces, or use --mode continued or merge.",
        )
    known = {piece.piece for piece in old.model.pieces}
    added = [p.piece for p in inventory.model.pieces if p.piece not in known]
    return _with_pieces(old, added, lambda k: 0.0, pad), {}


def _graft_after(
    old: Tokenizer, section: Section, pattern: regex.Pattern[str], texts: list[str], pad: str | None
) -> tuple[Tokenizer, dict[str, int]]:
    """New merges after all old ones; pieces no text can reach are dropped until none is left."""
    forced = common_characters(str(section.common_characters), pattern) if section.mode == "continued" else []
    if section.mode == "continued":
        asked = learn_pieces(old, texts, pattern, section.num_pieces, section.max_piece_chars, forced)
        dropped: dict[str, int] = {}
    else:
        asked, dropped = _filtered(old, _inventory(section.pieces), pattern, section)
    if old.is_byte_level:
        return _with_byte_merges(old, asked, pattern, pad, dropped)
    if old.model is None or not old.has_fast_form:
        raise UserError(
            "The base is neither a SentencePiece BPE model with an exact form nor a byte-level BPE tokenizer.",
            "Give a Llama-family base: a folder with its tokenizer.model, or a byte-level tokenizer.json.",
        )
    known = {piece.piece for piece in old.model.pieces}
    pieces = list(dict.fromkeys([*asked.characters, *((left + right).decode() for left, right in asked.merges)]))
    pieces = [piece for piece in pieces if piece not in known]
    lowest = min(p.score for p in old.model.pieces if p.type == NORMAL and p.score > ODDITY_SCORE)
    while True:
        new = _with_pieces(old, pieces, lambda k: lowest - 1 - k, pad)
        first = old.num_pieces
        reached = new.encode_continuations(pieces)
        dead = {piece for k, (piece, ids) in enumerate(zip(pieces, reached, strict=True)) if ids != [first + k]}
        if not dead:
            return new, dropped
        dropped["cannot be reached by merging"] = dropped.get("cannot be reached by merging", 0) + len(dead)
        pieces = [piece for piece in pieces if piece not in dead]


def _filtered(
    old: Tokenizer, inventory: Tokenizer, pattern: regex.Pattern[str], section: Section
) -> tuple[Learned, dict[str, int]]:
    """An inventory's pieces of the script, at most `num_pieces`, closed over their characters."""
    words, dropped = [], {"without a character of the script": 0, "with a space or another sign": 0, "too long": 0}
    known = {old.token_bytes(piece_id) for piece_id in range(old.num_pieces)}
    whole = regex.compile(pattern.pattern + "+")
    for piece_id in range(inventory.num_pieces):
        if piece_id in inventory.special_ids:
            continue
        text = inventory.token_bytes(piece_id).decode(errors="ignore")
        if not text or text.encode() in known:
            continue
        if not pattern.search(text):
            dropped["without a character of the script"] += 1
        elif not whole.fullmatch(text) or SPACE in text:
            dropped["with a space or another sign"] += 1
        elif section.max_piece_chars and len(text) > section.max_piece_chars:
            dropped["too long"] += 1
        else:
            words.append(text)
    characters = [char for char in dict.fromkeys("".join(words)) if char.encode() not in known]
    longer = [word for word in words if len(word) > 1]
    merges = [(word[:-1].encode(), word[-1].encode()) for word in longer]
    return Learned(characters, merges[: max(0, section.num_pieces - len(characters))]), {
        k: n for k, n in dropped.items() if n
    }


def _with_pieces(old: Tokenizer, pieces: Iterable[str], score: Callable[[int], float], pad: str | None) -> Tokenizer:
    """The base's SentencePiece model with pieces appended."""
    assert old.model is not None
    if len(old.model.pieces) != old.num_pieces:
        raise UserError(
            f"The base's tokenizer.json has {old.num_pieces} ids, its tokenizer.model {len(old.model.pieces)}.",
            "Give a base whose two files agree, or its tokenizer.model alone.",
        )
    model = ModelProto()
    model.CopyFrom(old.model)
    number = -1
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=score(number), type=NORMAL)
    if pad:
        model.pieces.add(piece=pad, score=0.0, type=CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    engine = tokenizer_of_model(model).engine
    texts = [piece.piece for piece in islice(model.pieces, old.num_pieces, old.num_pieces + number + 1)]
    spelled = [old.encode_continuation(text.replace(SPACE, " ")) for text in texts]
    expansions = {old.num_pieces + k: tuple(ids) for k, ids in enumerate(spelled)}
    return _assembled(old, engine, expansions, pad, model)


def _assembled(
    old: Tokenizer, engine: Any, expansions: dict[int, tuple[int, ...]], pad: str | None, model: ModelProto | None
) -> Tokenizer:
    return Tokenizer(
        engine,
        roles={**old.roles, **({"pad_token": pad} if pad else {})},
        model=model,
        config=old.config,
        chat_template=old.chat_template,
        graft={"first_new_id": old.num_pieces},
        expansions=expansions,
    )


def _with_byte_merges(
    old: Tokenizer, asked: Learned, pattern: regex.Pattern[str], pad: str | None, dropped: dict[str, int]
) -> tuple[Tokenizer, dict[str, int]]:
    """A byte-level tokenizer.json with one merge per new id appended after all old merges and ids."""
    assert isinstance(old.engine, FastEngine)
    parts = json.loads(json.dumps(old.engine.parts))
    vocabulary = {old.token_bytes(i): (i,) for i in range(old.num_pieces) if i not in old.special_ids}
    words = [*asked.characters, *((left + right).decode(errors="ignore") for left, right in asked.merges)]
    merges = [merge for char in asked.characters for merge in _folded(old, char)]
    merges += [pair for pair in asked.merges if pair[0] in vocabulary or pair[0] not in words]
    added: list[tuple[bytes, bytes]] = []
    refused = 0
    for left, right in merges:
        whole = left + right
        if whole in vocabulary:
            continue
        if left not in vocabulary or right not in vocabulary or not _only_of_script(whole, pattern):
            refused += 1
            continue
        vocabulary[whole] = vocabulary[left] + vocabulary[right]
        added.append((left, right))
    if refused:
        dropped["bytes another script uses too"] = refused
    spell = lambda symbol: "".join(CHAR_OF_BYTE[byte] for byte in symbol)  # noqa: E731
    listed = parts["model"]["merges"]
    as_pairs = not listed or isinstance(listed[0], list)
    expansions = {}
    for k, (left, right) in enumerate(added):
        new_id = old.num_pieces + k
        parts["model"]["vocab"][spell(left + right)] = new_id
        listed.append([spell(left), spell(right)] if as_pairs else f"{spell(left)} {spell(right)}")
        expansions[new_id] = vocabulary[left + right]
    if pad:
        parts["added_tokens"].append({
            "id": old.num_pieces + len(added), "content": pad, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    engine = FastEngine(FastTokenizer.from_str(json.dumps(parts)))
    return _assembled(old, engine, expansions, pad, None), dropped


def _folded(old: Tokenizer, char: str) -> list[tuple[bytes, bytes]]:
    """The merges that join the base's tokens of one character, left to right."""
    symbols = [old.token_bytes(piece_id) for piece_id in old.encode_continuation(char)]
    return [(b"".join(symbols[:cut]), symbols[cut]) for cut in range(1, len(symbols))]


def _only_of_script(part: bytes, pattern: regex.Pattern[str]) -> bool:
    """Whether a text can hold these bytes only by holding a character of the script.

    True for a whole such character inside; for a cut one when every assigned character that starts so belongs to it.
    """
    if pattern.search(part.decode(errors="ignore")):
        return True
    lead = next((k for k, byte in enumerate(part) if byte >= 0xC2), None)
    if lead is None:
        return False
    begun = part[lead:]
    num_bytes = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
    missing = num_bytes - len(begun)
    if missing <= 0:
        return False
    low = (begun + b"\x80" * missing, begun + b"\xbf" * missing)
    if begun[0] in (0xE0, 0xF0) and len(begun) == 1:
        return False
    first, last = (ord(bound.decode(errors="replace")[0]) for bound in low)
    assigned = regex.compile(r"\P{Cn}")
    chars = [chr(code) for code in range(first, last + 1) if not 0xD800 <= code <= 0xDFFF]
    return all(pattern.match(char) for char in chars if assigned.match(char)) and any(map(pattern.match, chars))
