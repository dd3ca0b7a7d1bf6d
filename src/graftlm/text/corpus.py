"""The data step: sources to clean, split, rendered and masked rows, with a count for every row kept, cut or dropped.

Owns the order of the work, sampling and the held-out split. Reading lies in `readers.py`, duplicates in
`duplicates.py`, the length policy in `fit.py`, the chat format in `dialogue.py`, the account in `counting.py`. Third
step of the road.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.recipe import Data, Source
from graftlm.run import disk_errors, write_json
from graftlm.text.counting import Counting, DataReport
from graftlm.text.dialogue import Conversation, Language, Message, Template
from graftlm.text.duplicates import drop_exact_duplicates, drop_heldout, drop_near_duplicates
from graftlm.text.fit import Fitter
from graftlm.text.readers import read_conversations, read_source
from graftlm.text.rows import RowsBuilder, rows_meta, save_rows, text_rows
from graftlm.text.tally import Tally
from graftlm.text.tokenizer import Tokenizer

LANGUAGES: tuple[Language, ...] = ("new", "old")
HELDOUT_SHARE = 10
"""At most one row in ten is taken away from training to be held out."""


def prepare_data(section: Data, tokenizer: Tokenizer, template: Template, out: Path) -> DataReport:
    """Read, clean, split and render the section's sources into `out`: train/, heldout-*/, heldout-*.jsonl, text/.

    Raises UserError when nothing is left to learn from or to be judged by; DiskError.
    """
    counting = Counting()
    heldout = [c for source in section.heldout for c in _read(source, section.seed, counting)]
    heldout = drop_exact_duplicates(heldout, counting.dropped)
    train = [c for source in section.sources for c in _read(source, section.seed, counting)]
    train = drop_exact_duplicates(train, counting.dropped)
    if section.near_duplicates is not None:
        train = drop_near_duplicates(train, heldout, section.near_duplicates, counting.dropped)
    if section.heldout_rows:
        train, drawn = _draw_heldout(train, section.heldout_rows, section.seed)
        heldout += drawn
    train = drop_heldout(train, heldout, counting.dropped)

    fitter = Fitter(tokenizer, template, section.max_tokens, section.too_long)
    builder, kept = RowsBuilder(tokenizer.num_pieces), []
    for fitted in fitter.fit(train):
        if counting.is_kept(fitted):
            for row in fitted.rows:
                builder.add(row, fitted.conversation.source)
            kept.append(fitted.conversation)
    if not kept:
        raise UserError(
            f"No row is left to train on: {counting.rows_read:,} read, {len(heldout):,} of them held out, dropped: "
            f"{counting.dropped.told or 'none'}.",
            "Look at them with `graftlm data FILE --show 5`; mend the files, or raise data.max_tokens.",
        )
    meta = rows_meta(tokenizer, template.fingerprint, section.max_tokens)
    rows = builder.rows(meta)
    save_rows(rows, out / "train")
    heldout_rows = _save_heldout(heldout, replace(fitter, keeps_beginning=True), counting, meta, out)
    report = counting.report(kept, rows)
    report.heldout_rows = heldout_rows
    if section.text:
        _prepare_text(section, tokenizer, out / "text", meta)
    write_json(out / "data.json", asdict(report))
    return report


def _read(source: Source, seed: int, counting: Counting) -> list[Conversation]:
    """The source's dialogues, sampled; every other row of it is counted."""
    reading = read_source(source)
    counting.add(reading)
    dialogues = []
    for conversation in reading.conversations:
        if conversation.messages[0].role == "text":
            counting.dropped.add("a plain text, not a dialogue", conversation.source)
        else:
            dialogues.append(conversation)
    return _sample(dialogues, source, seed, counting.dropped)


def _sample(rows: list[Conversation], source: Source, seed: int, dropped: Tally) -> list[Conversation]:
    """`source.sample` of the rows, in order, drawn by the seed and the file's name: other sources do not matter."""
    if source.sample is None or source.sample >= len(rows):
        return rows
    dice = random.Random(f"{seed} {Path(source.path).name}")
    drawn = set(dice.sample(range(len(rows)), source.sample))
    for place, row in enumerate(rows):
        if place not in drawn:
            dropped.add("not drawn into the sample", row.source)
    return [rows[place] for place in sorted(drawn)]


def _draw_heldout(
    rows: Sequence[Conversation], number: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Take `number` rows of each language away from training."""
    taken: set[int] = set()
    for language in LANGUAGES:
        places = [place for place, row in enumerate(rows) if row.language == language]
        dice = random.Random(f"{seed} heldout {language}")
        taken.update(dice.sample(places, min(number, len(places) // HELDOUT_SHARE)))
    return [row for place, row in enumerate(rows) if place not in taken], [rows[place] for place in sorted(taken)]


def _save_heldout(
    heldout: Sequence[Conversation], fitter: Fitter, counting: Counting, meta: dict[str, Any], out: Path
) -> dict[str, int]:
    """Write the held-out rows and, for eyes and other tokenizers, the dialogues they are of; their number by language.

    Raises UserError when none is usable; DiskError.
    """
    saved: dict[str, int] = {}
    for language in LANGUAGES:
        builder, kept = RowsBuilder(fitter.tokenizer.num_pieces), []
        for fitted in fitter.fit([c for c in heldout if c.language == language], "render held-out"):
            if counting.is_kept(fitted) and fitted.shown is not None:
                for row in fitted.rows:
                    builder.add(row, fitted.conversation.source)
                kept.append(fitted.shown)
        if kept:
            save_rows(builder.rows(meta), out / f"heldout-{language}")
            _save_conversations(kept, out / f"heldout-{language}.jsonl")
            saved[language] = len(kept)
    if not saved:
        raise UserError("No held-out row is usable: the run could not be judged.", "Mend data.heldout or heldout_rows.")
    return saved


def _save_conversations(conversations: Sequence[Conversation], path: Path) -> None:
    def turn(message: Message) -> dict[str, str]:
        said = {"role": message.role, "content": message.content}
        return {**said, "input": message.input} if message.input else said

    rows = ({"id": c.source, "messages": [turn(m) for m in c.messages]} for c in conversations)
    with disk_errors(path.parent):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _prepare_text(section: Data, tokenizer: Tokenizer, out: Path, meta: dict[str, Any]) -> None:
    """Rows of the objective `text`: plain documents as they stand, dialogues as all that is said in them."""
    builder = RowsBuilder(tokenizer.num_pieces)
    for source in section.text:
        found = read_source(source).conversations
        texts = (conversation.text for conversation in found)
        for conversation, rows in zip(found, text_rows(texts, tokenizer, section.max_tokens), strict=True):
            for row in rows:
                builder.add(row, conversation.source)
    save_rows(builder.rows(meta), out)


__all__ = ["DataReport", "prepare_data", "read_conversations"]
