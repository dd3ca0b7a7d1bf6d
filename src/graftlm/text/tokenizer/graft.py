"""Grafting: new pieces onto a base tokenizer, proved before the folder is finished.

Owns the road of a graft: read, find pieces (learned, or an inventory's), append them, prove, write, load again, prove
again. `continued` and `merge` put every new merge after all old ones, so that expanding new ids gives the base's own
encoding of any text; `card` repeats the published merge. How each kind of vocabulary is written lies in
`sentencepiece_graft.py`, `byte_level.py` and `card.py`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from graftlm.errors import UserError
from graftlm.recipe import Tokenizer as Section
from graftlm.run import disk_errors, say
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer.byte_level import BytePair, append_merges, fold_characters, merges_of_words
from graftlm.text.tokenizer.card import WHY_NO_FAST_FORM, graft_card
from graftlm.text.tokenizer.inventory import filter_pieces, missing_characters, read_inventory
from graftlm.text.tokenizer.learn import WHY_FEWER, count_runs, learn_pieces, puts_spaces
from graftlm.text.tokenizer.load import load_tokenizer
from graftlm.text.tokenizer.proof import Proof, prove, prove_folder
from graftlm.text.tokenizer.samples import make_texts, sample_real
from graftlm.text.tokenizer.script import LONGEST_HAN_PIECE_CHARS, Script, common_characters
from graftlm.text.tokenizer.sentencepiece_graft import append_after, check_base, check_files_agree
from graftlm.text.tokenizer.tokenizer import Tokenizer

PAD_PIECE = "[PAD]"
NUM_LEARNED_PIECES = 8000
NUM_SAMPLE_TEXTS = 4000


@dataclass(slots=True)
class GraftReport:
    """What a graft added and what was proved of it; counts of texts unless named otherwise (`Proof`)."""

    mode: str
    script: tuple[str, ...]
    num_old: int
    num_new: int
    num_total: int
    first_new_id: int
    dropped: dict[str, int] = field(default_factory=dict)
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
    notes: list[str] = field(default_factory=list)

    def take(self, proof: Proof) -> None:
        """Write down what a proof found."""
        for name in (one.name for one in fields(proof)):
            setattr(self, name, getattr(proof, name))


def graft_tokenizer(base: str | Path, section: Section, out: Path) -> GraftReport:
    """Graft new pieces onto `base` as the section asks and write the folder `out`, proved and re-loaded.

    Raises UserError: unusable input, or a proof that fails, told with the text that shows it.
    """
    if section.mode == "keep":
        raise UserError("Mode keep grafts nothing.", "Use --mode continued, merge or card.")
    _check_out(out)
    script = Script(section.script)
    old = load_tokenizer(base)
    texts = [text for path in section.text for text in read_texts(path)]
    real = sample_real(texts, NUM_SAMPLE_TEXTS // 2)
    pad = PAD_PIECE if section.pad_piece and old.pad_id is None else None
    check_files_agree(old, real)
    dropped: dict[str, int] = {}
    if section.mode == "card":
        assert section.pieces is not None, "the section checks that mode card has pieces"
        new = graft_card(old, load_tokenizer(section.pieces), pad)
    else:
        new = _graft_exactly(old, section, script, texts, pad, dropped)
    report = GraftReport(
        section.mode, section.script, old.num_pieces, new.num_pieces - old.num_pieces, new.num_pieces, old.num_pieces,
        {reason: count for reason, count in dropped.items() if count},
    )  # fmt: skip
    made = make_texts(old, new, real, script, NUM_SAMPLE_TEXTS // 2)
    is_exact = section.mode != "card"
    say(f"proving on {len(real) + len(made)} texts")
    report.take(prove(old, new, real, made, script))
    _refuse_failures(report, is_exact, "before it was written")
    _add_notes(report, section, new)
    _write(old, new, report, real, made, script, out, is_exact)
    return report


def _check_out(out: Path) -> None:
    if out.is_file():
        raise UserError(f"{out} is a file, and a folder is to be written.", "Give --out a new folder.")
    strangers = {path.name for path in out.iterdir()} - {"started.json", ".building"} if out.is_dir() else set()
    if strangers:
        raise UserError(f"{out} already holds files: {', '.join(sorted(strangers)[:3])}.", "Give --out a new folder.")


def _graft_exactly(
    old: Tokenizer, section: Section, script: Script, texts: list[str], pad: str | None, dropped: dict[str, int]
) -> Tokenizer:
    """New merges after all old ones, on either kind of base."""
    if not old.is_byte_level:
        check_base(old)
    if section.mode == "continued":
        pieces, merges = _learned(old, section, script, texts, dropped)
    else:
        pieces, merges = _taken(old, section, script, dropped)
    if old.is_byte_level:
        return append_merges(old, merges, script, pad, dropped)
    return append_after(old, pieces, pad, dropped)


def _learned(
    old: Tokenizer, section: Section, script: Script, texts: list[str], dropped: dict[str, int]
) -> tuple[list[str], list[BytePair]]:
    """Pieces for a SentencePiece base, or merges for a byte-level one, learned from the texts."""
    num_pieces = section.num_pieces or NUM_LEARNED_PIECES
    with_space = section.leading_space == "always" or (section.leading_space == "auto" and puts_spaces(texts, script))
    runs = count_runs(texts, script, with_space)
    scripts = "+".join(script.names)
    say(f"learning {num_pieces:,} pieces from {len(texts):,} texts, {len(runs):,} different runs of {scripts}")
    common = section.common_characters
    if common == "auto":
        has_room = script.is_han and num_pieces >= NUM_LEARNED_PIECES
        common = "gb2312-1" if has_room else "none"
    forced = common_characters(str(common), script)
    longest = section.max_piece_chars
    if longest == "auto":
        longest = LONGEST_HAN_PIECE_CHARS if script.is_han else None
    max_chars = None if longest in ("none", None) else int(longest)
    if not old.is_byte_level:
        learned = learn_pieces(old, runs, script, num_pieces, max_chars, forced)
        return [*learned.characters, *((left + right).decode() for left, right in learned.merges)], []
    first, num_refused = fold_characters(old, forced, script)
    dropped["common characters whose bytes are not the script's alone"] = num_refused
    return [], learn_pieces(old, runs, script, num_pieces, max_chars, first=first).merges


def _taken(
    old: Tokenizer, section: Section, script: Script, dropped: dict[str, int]
) -> tuple[list[str], list[BytePair]]:
    """Pieces, or merges, of an inventory: all of them unless a number or a length is given."""
    assert section.pieces is not None, "the section checks that mode merge has pieces"
    max_chars = section.max_piece_chars if isinstance(section.max_piece_chars, int) else None
    pieces = filter_pieces(old, read_inventory(section.pieces), script, max_chars, section.leading_space, dropped)
    if not pieces:
        raise UserError(
            f"{section.pieces} holds no piece of the script {'+'.join(script.names)} that the base lacks ({dropped}).",
            "Name the inventory's script (--script, tokenizer.script), or give another inventory.",
        )
    characters = missing_characters(old, pieces)
    words = [piece for piece in pieces if len(piece) > 1]
    if not old.is_byte_level:
        kept = [*characters, *words][: section.num_pieces]
        dropped["beyond the number asked for"] = len(characters) + len(words) - len(kept)
        return kept, []
    first, num_refused = fold_characters(old, characters, script)
    merges, num_unspelled = merges_of_words(old, words, first)
    dropped["characters whose bytes are not the script's alone"] = num_refused
    dropped["cannot be reached by merging"] = num_unspelled
    asked = [*first, *merges]
    kept_merges = asked[: section.num_pieces]
    dropped["beyond the number asked for"] = len(asked) - len(kept_merges)
    return [], kept_merges


def _refuse_failures(report: GraftReport, is_exact: bool, where: str) -> None:
    """Raise UserError naming the text that shows what failed; the card's merge is known to change old texts."""
    wrong = ["roundtrip_failures", "engine_disagreements"]
    if is_exact:
        wrong += ["expand_violations", "old_texts_changed", "unreachable_pieces"]
    for name in wrong:
        count = getattr(report, name)
        if count:
            what, texts = next((what, texts) for what, texts in report.examples.items() if what.startswith(name))
            raise UserError(
                f"The graft failed its proof {where}: {_FAILURES[name]} on {count} of {report.num_texts_checked} texts "
                f"({what}), for example {texts[0]!r}.",
                "Report that text with the base and the settings; another --script or fewer pieces may avoid it.",
            )


_FAILURES = {
    "expand_violations": "expanding new pieces does not give the base's encoding",
    "old_texts_changed": "text without the script is encoded differently",
    "engine_disagreements": "two engines disagree",
    "roundtrip_failures": "text does not come back from its ids",
    "unreachable_pieces": "pieces do not come out of their own text",
}


def _add_notes(report: GraftReport, section: Section, new: Tokenizer) -> None:
    if report.mode == "card":
        changed, tried = report.old_texts_changed, report.num_old_texts
        report.notes.append(
            f"The published merge scores every new piece 0, above every piece of the base: {changed} of {tried} texts "
            f"without the script ({changed / max(1, tried):.0%}) are now encoded differently. Only tokenizer.model is "
            f"written: {WHY_NO_FAST_FORM}."
        )
    asked = section.num_pieces or NUM_LEARNED_PIECES
    if report.mode == "continued" and len(new.expansions) < asked:
        left_out = f" {sum(report.dropped.values()):,} were left out, told under dropped." if report.dropped else ""
        told = f"{asked:,} pieces were asked for and {len(new.expansions):,} learned: {WHY_FEWER}.{left_out}"
        report.notes.append(told)
    if report.mode != "card":
        report.notes.append(
            f"Text without a character of the script {'+'.join(report.script)} is encoded as before. Other languages "
            "written in it are encoded with the new pieces too; expanding those always gives the base's ids."
        )
    if not report.chars_per_token:
        report.notes.append("No text in the script was given, so compression was not measured (--text).")
    num_steps = sum(1 for piece_id in new.expansions if not _is_text(new.token_bytes(piece_id)))
    if num_steps:
        report.notes.append(f"{num_steps} of the new pieces are parts of characters, steps on the way to longer ones.")


def _is_text(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def _write(
    old: Tokenizer,
    new: Tokenizer,
    report: GraftReport,
    real: list[str],
    made: list[str],
    script: Script,
    out: Path,
    is_exact: bool,
) -> None:
    """Write beside, load again, prove again, then move into place."""
    building = out / ".building"
    with disk_errors(out):
        new.graft = asdict(report)
        new.save(building)
        say("proving again on the written files, in every engine")
        report.take(prove_folder(old, new, building, real, made, script))
        _refuse_failures(report, is_exact, f"on the files written (they lie in {building}; {out} is not finished)")
        new.graft = asdict(report)
        new.save(building)
        for file in sorted(building.iterdir()):
            os.replace(file, out / file.name)
        building.rmdir()
