"""The data step: sources to clean, split, rendered and masked rows, with a count for every row kept or dropped.

Owns cleaning, de-duplication, sampling and the held-out split. Formats lie in `readers.py`, the chat format in
`dialogue.py`. Third step of the road.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.errors import UserError
from graftlm.recipe import Data
from graftlm.run import progress, write_json
from graftlm.text.dialogue import Conversation, Message, Rendered, coloured, render_many, rows_of
from graftlm.text.readers import Dropped, read_conversations
from graftlm.text.rows import RowsBuilder, TokenRows, rows_meta, save_rows, text_rows
from graftlm.text.sandbox import TemplateRefused
from graftlm.text.templates import Template
from graftlm.text.tokenizer import Tokenizer

RENDER_BATCH = 2000
NUM_PERMUTATIONS = 128
SHINGLE_CHARS = 5


@dataclass(slots=True)
class DataReport:
    """What became of every row; `dropped` counts reasons, `examples` names rows, lengths are in tokens."""

    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    format: str = ""
    tokens: int = 0
    labels: int = 0
    heldout_rows: dict[str, int] = field(default_factory=dict)
    by_language: dict[str, int] = field(default_factory=dict)
    length_quantiles: dict[str, int] = field(default_factory=dict)
    num_cut: int = 0


def prepare_data(section: Data, tokenizer: Tokenizer, template: Template, out: Path) -> DataReport:
    """Read, clean, split and render the section's sources into `out`: train/, heldout-*/, heldout-*.jsonl, text/.

    Raises UserError when nothing is left to learn from or to be judged by.
    """
    dice = random.Random(section.seed)
    dropped = Dropped()
    heldout: list[Conversation] = []
    num_read = 0
    for source in section.heldout:
        found, bad = read_conversations(source.path, source.format, source.language)
        _join(dropped, bad)
        num_read += len(found) + sum(bad.counts.values())
        heldout += _sample(found, source.sample, dice)
    train: list[Conversation] = []
    for source in section.sources:
        found, bad = read_conversations(source.path, source.format, source.language)
        _join(dropped, bad)
        num_read += len(found) + sum(bad.counts.values())
        train += _sample(found, source.sample, dice)
    train = drop_duplicates(train, section.near_duplicates, dropped)
    if section.heldout_rows:
        train, drawn = _draw_heldout(train, section.heldout_rows, dice)
        heldout += drawn
    train = _without(train, heldout, dropped)
    rows, num_cut, kept = _render_all(train, section, tokenizer, template, dropped)
    if not kept:
        raise UserError(
            f"No row is left to train on: {num_read} read, dropped {json.dumps(dropped.counts, ensure_ascii=False)}.",
            "Look at them with `graftlm data FILE --show 5`; mend the files, or raise data.max_tokens.",
        )
    report = DataReport(num_read, len(kept), dropped.counts, dropped.examples, num_cut=num_cut)
    _measure(report, rows, kept)
    meta = rows_meta(tokenizer, template.fingerprint, section.max_tokens)
    save_rows(rows.rows(meta), out / "train")
    for language in ("new", "old"):
        held = [c for c in heldout if c.language == language]
        held_rows, _, held_kept = _render_all(held, section, tokenizer, template, dropped)
        if held_kept:
            save_rows(held_rows.rows(meta), out / f"heldout-{language}")
            _save_conversations(held_kept, out / f"heldout-{language}.jsonl")
            report.heldout_rows[language] = len(held_kept)
    if not report.heldout_rows:
        raise UserError("No held-out row is usable: the run could not be judged.", "Mend data.heldout or heldout_rows.")
    if section.text:
        _prepare_text(section, tokenizer, out / "text", meta)
    write_json(out / "data.json", asdict(report))
    return report


def inspect_data(files: Sequence[str], template: Template, tokenizer: Tokenizer | None, num_shown: int) -> DataReport:
    """What `prepare_data` would find in files, and `num_shown` rows printed as training sees them. Raises UserError."""
    report, dropped = DataReport(), Dropped()
    kept: list[Conversation] = []
    for name in files:
        found, bad = read_conversations(name)
        _join(dropped, bad)
        report.rows_read += len(found) + sum(bad.counts.values())
        kept += found
    kept = drop_duplicates(kept, None, dropped)
    report.rows_kept, report.dropped, report.examples = len(kept), dropped.counts, dropped.examples
    report.by_language = {}
    report.format = "several turns" if any(len(c.messages) > 2 for c in kept) else "one turn"
    if tokenizer is not None and kept:
        builder = RowsBuilder(tokenizer.num_pieces)
        for start in range(0, len(kept), RENDER_BATCH):
            batch = [row for c in kept[start : start + RENDER_BATCH] for row in rows_of(c, template)]
            for conversation, row in zip(batch, render_many(batch, tokenizer, template), strict=True):
                if isinstance(row, TemplateRefused):
                    dropped.add(f"refused by the template: {row}", conversation.source)
                else:
                    builder.add(row, "")
        _measure(report, builder, kept)
    if num_shown:
        from rich.console import Console

        console = Console(file=sys.stderr)
        for conversation in kept[:num_shown]:
            console.rule(conversation.source)
            console.print(coloured(conversation, template, tokenizer))
    return report


def drop_duplicates(
    conversations: Sequence[Conversation], threshold: float | None, dropped: Dropped
) -> list[Conversation]:
    """The conversations without exact repetitions and, given a threshold, without near ones (Jaccard similarity of
    five-character shingles by MinHash). Source: Broder 1997; `rensa`."""
    seen: set[bytes] = set()
    kept = []
    for conversation in conversations:
        mark = _mark(conversation)
        if mark in seen:
            dropped.add("exact duplicate", conversation.source)
            continue
        seen.add(mark)
        kept.append(conversation)
    if threshold is None or len(kept) < 2:
        return kept
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, num_bands=16)
    unique, hashes = [], {}
    for number, conversation in enumerate(progress(kept, len(kept), "near duplicates")):
        minhash = RMinHash(num_perm=NUM_PERMUTATIONS, seed=0)
        minhash.update(_shingles(conversation.text))
        near = [hashes[other] for other in index.query(minhash)]
        if any(minhash.jaccard(other) >= threshold for other in near):
            dropped.add("near duplicate", conversation.source)
            continue
        index.insert(number, minhash)
        hashes[number] = minhash
        unique.append(conversation)
    return unique


def _shingles(text: str) -> list[str]:
    return [text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1))]


def _mark(conversation: Conversation) -> bytes:
    text = "\x1f".join(f"{m.role}\x1e{m.content}\x1e{m.input}" for m in conversation.messages)
    return hashlib.sha256(text.encode()).digest()


def _question(conversation: Conversation) -> bytes:
    return hashlib.sha256(
        "\x1f".join(f"{m.content}\x1e{m.input}" for m in conversation.messages[:-1]).encode()
    ).digest()


def _join(into: Dropped, other: Dropped) -> None:
    for reason, count in other.counts.items():
        into.counts[reason] = into.counts.get(reason, 0) + count
        into.examples.setdefault(reason, []).extend(other.examples[reason])
        del into.examples[reason][3:]


def _sample(rows: list[Conversation], number: int | None, dice: random.Random) -> list[Conversation]:
    if number is None or number >= len(rows):
        return rows
    return [rows[i] for i in sorted(dice.sample(range(len(rows)), number))]


def _draw_heldout(
    rows: list[Conversation], number: int, dice: random.Random
) -> tuple[list[Conversation], list[Conversation]]:
    """Take `number` rows of each language away from training, at most a tenth of them."""
    taken: set[int] = set()
    for language in ("new", "old"):
        places = [i for i, row in enumerate(rows) if row.language == language]
        taken.update(dice.sample(places, min(number, len(places) // 10)))
    return [r for i, r in enumerate(rows) if i not in taken], [rows[i] for i in sorted(taken)]


def _without(train: list[Conversation], heldout: list[Conversation], dropped: Dropped) -> list[Conversation]:
    """Training rows whose question is not held out."""
    asked = {_question(c) for c in heldout}
    kept = []
    for conversation in train:
        if _question(conversation) in asked:
            dropped.add("also held out", conversation.source)
        else:
            kept.append(conversation)
    return kept


def _render_all(
    conversations: list[Conversation], section: Data, tokenizer: Tokenizer, template: Template, dropped: Dropped
) -> tuple[RowsBuilder, int, list[Conversation]]:
    """Token rows of conversations within `max_tokens`; longer ones lose whole turns, or are dropped."""
    builder, num_cut, kept = RowsBuilder(tokenizer.num_pieces), 0, []
    starts = range(0, len(conversations), RENDER_BATCH)
    for start in progress(starts, len(starts), "render") if len(starts) > 1 else starts:
        batch = [row for c in conversations[start : start + RENDER_BATCH] for row in rows_of(c, template)]
        for conversation, row in zip(batch, render_many(batch, tokenizer, template), strict=True):
            if isinstance(row, TemplateRefused):
                dropped.add(f"refused by the template: {row}", conversation.source)
                continue
            fitting: Rendered | None = row
            shorter = conversation
            while fitting is not None and len(fitting.ids) > section.max_tokens:
                fitting = None
                if section.too_long == "cut_at_turn" and len(shorter.messages) > 3:
                    first = 1 if shorter.messages[0].role == "system" else 0
                    left = (*shorter.messages[:first], *shorter.messages[first + 2 :])
                    shorter = Conversation(left, shorter.source, shorter.language)
                    again = next(iter(render_many([shorter], tokenizer, template)))
                    fitting = again if isinstance(again, Rendered) else None
            if fitting is None or not any(fitting.is_target):
                dropped.add(f"longer than {section.max_tokens} tokens", conversation.source)
                continue
            num_cut += shorter is not conversation
            builder.add(fitting, conversation.source)
            kept.append(shorter)
    return builder, num_cut, kept


def _measure(report: DataReport, builder: RowsBuilder, kept: Iterable[Conversation]) -> None:
    rows: TokenRows = builder.rows()
    report.tokens, report.labels = int(rows.num_tokens), int(rows.num_targets)
    for conversation in kept:
        report.by_language[conversation.language] = report.by_language.get(conversation.language, 0) + 1
    quantiles = np.quantile(rows.lengths, (0.5, 0.9, 0.99, 1.0)) if len(rows) else np.zeros(4)
    names = ("median", "p90", "p99", "longest")
    report.length_quantiles = {name: int(value) for name, value in zip(names, quantiles, strict=True)}


def _save_conversations(conversations: list[Conversation], path: Path) -> None:
    def turn(message: Message) -> dict[str, str]:
        said = {"role": message.role, "content": message.content}
        return {**said, "input": message.input} if message.input else said

    rows = ({"id": c.source, "messages": [turn(m) for m in c.messages]} for c in conversations)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _prepare_text(section: Data, tokenizer: Tokenizer, out: Path, meta: dict[str, Any]) -> None:
    builder = RowsBuilder(tokenizer.num_pieces)
    for source in section.text:
        found, _ = read_conversations(
            source.path, "text" if source.format == "auto" else source.format, source.language
        )
        texts = ["\n".join(m.content for m in c.messages) for c in found]
        for number, rows in enumerate(text_rows(texts, tokenizer, section.max_tokens), start=1):
            for row in rows:
                builder.add(row, f"{source.path}:{number}")
    save_rows(builder.rows(meta), out)


__all__ = ["DataReport", "drop_duplicates", "inspect_data", "prepare_data", "read_conversations"]
