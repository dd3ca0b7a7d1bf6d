"""The data step: sources to clean, split, rendered and masked rows, with a count for every row kept, cut or dropped.

Owns the order of the work, sampling and the held-out split. Reading lies in `readers.py`, duplicates in `duplicates.py`
and `near.py`, the length policy in `fit.py`, the chat format in `dialogue.py`, the account in `counting.py`. Rows are
not kept in memory: between reading and rendering they lie on a shelf (`shelf.py`). Third step of the road.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.errors import DiskError, UserError
from graftlm.recipe import Data, Source
from graftlm.run import disk_errors, say, write_json
from graftlm.text.counting import Counting, DataReport
from graftlm.text.dialogue import Conversation, Language, Message, Template
from graftlm.text.duplicates import Marks, asked_in, gives_away
from graftlm.text.fit import Fitter
from graftlm.text.near import drop_near_duplicates
from graftlm.text.readers import Reading, dialogues_of, read_conversations
from graftlm.text.rows import rows_meta, text_rows
from graftlm.text.rows_file import rows_file
from graftlm.text.shelf import CHUNK, REASONS, Fate, Shelf, kept_shelf
from graftlm.text.tokenizer import Tokenizer

SHELF = "shelf"
LANGUAGES: tuple[Language, ...] = ("new", "old")
HELDOUT_SHARE = 10
"""At most one row in ten is taken away from training to be held out."""


def prepare_data(section: Data, tokenizer: Tokenizer, template: Template, out: Path) -> DataReport:
    """Read, clean, split and render the section's sources into `out`: train/, heldout-*/, heldout-*.jsonl, text/.

    Where the work was cut off after the shelf in `out` was filled, it goes on from there, to the same bytes: `out` must
    then be of the same section, sources and tokenizer, which `step.py` sees to.
    Raises UserError when nothing is left to learn from or to be judged by; DiskError.
    """
    fitter = Fitter(tokenizer, template, section.max_tokens, section.too_long)
    meta = rows_meta(tokenizer, template.fingerprint, section.max_tokens)
    with disk_errors(out):
        shelf, counting = _filled(out / SHELF, section)
    try:
        _save_learned(shelf, fitter, counting, meta, out / "train")
        heldout_rows = _save_heldout(shelf, replace(fitter, keeps_beginning=True), counting, meta, out)
    except DiskError:
        raise  # once there is room, it goes on
    except UserError:
        shelf.forget()  # as it was asked it cannot be done
        raise
    finally:
        shelf.close()
    report = counting.report()
    report.heldout_rows = heldout_rows
    if section.text:
        _prepare_text(section, tokenizer, out / "text", meta)
    write_json(out / "data.json", asdict(report))
    shelf.forget()
    return report


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Places on the shelf that one source filled, from `begin` to before `end`."""

    source: Source
    begin: int
    end: int


def _filled(folder: Path, section: Data) -> tuple[Shelf, Counting]:
    """The shelf with every dialogue and its fate, and the account of them: as it was kept there, else made."""
    if kept := kept_shelf(folder):
        say("the dialogues were read before: rendering them")
        return kept[0], Counting.after_reading(kept[1])
    shutil.rmtree(folder, ignore_errors=True)  # of a kill while it was filled
    folder.mkdir(parents=True)
    shelf, counting = Shelf(folder), Counting()
    try:
        _fill(shelf, section, counting)
        shelf.keep(asdict(counting))
    except BaseException:
        with contextlib.suppress(OSError):  # of a full disk: what stopped the step matters more
            shelf.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return shelf, counting


def _fill(shelf: Shelf, section: Data, counting: Counting) -> None:
    """Put every dialogue on the shelf and decide its fate, but for those longer than the limit and those that ask what
    is held out, which are seen when they are rendered."""
    marks = Marks(shelf)
    heldout = [_put(source, shelf, marks, counting) for source in section.heldout]
    learned = [_put(source, shelf, marks, counting) for source in section.sources]
    shelf.finish()
    for stretch in heldout:
        shelf.fates[stretch.begin : stretch.end] = Fate.HELD_OUT
    for stretch in (*heldout, *learned):
        _sample(shelf, stretch, section.seed)
    marks.drop_duplicates()
    if section.near_duplicates is not None:
        drop_near_duplicates(shelf, section.near_duplicates)
    if section.heldout_rows:
        _draw_heldout(shelf, learned, section.heldout_rows, section.seed)
    shelf.tell_dropped(counting.dropped)


def _put(source: Source, shelf: Shelf, marks: Marks, counting: Counting) -> _Stretch:
    """The source's dialogues, on the shelf; every other row of it is counted."""
    reading, begin = Reading(), len(shelf)
    for conversation in dialogues_of(source, reading):
        if conversation.messages[0].role == "text":
            reading.dropped.add("a plain text, not a dialogue", conversation.source)
        else:
            marks.add(conversation)
            shelf.put(conversation)
    counting.add(reading)
    if reading.num_rows and len(shelf) == begin:
        say(f"{source.path}: none of its {reading.num_rows:,} rows can be learned from: {reading.dropped.told}")
    return _Stretch(source, begin, len(shelf))


def _sample(shelf: Shelf, stretch: _Stretch, seed: int) -> None:
    """Keep `source.sample` of the rows, drawn by the seed and the file's name: other sources do not matter."""
    number, most = stretch.source.sample, stretch.end - stretch.begin
    if number is None or number >= most:
        return
    dice = random.Random(f"{seed} {Path(stretch.source.path).name}")
    is_drawn = np.zeros(most, bool)
    is_drawn[dice.sample(range(most), number)] = True
    shelf.fates[stretch.begin : stretch.end][~is_drawn] = Fate.NOT_DRAWN


def _draw_heldout(shelf: Shelf, learned: Sequence[_Stretch], number: int, seed: int) -> None:
    """Take `number` rows of each language away from training."""
    for language in LANGUAGES:
        stretches = [stretch for stretch in learned if stretch.source.language == language]
        most = sum(len(places) for places in _left(shelf, stretches))
        dice = random.Random(f"{seed} heldout {language}")
        drawn = np.sort(dice.sample(range(most), min(number, most // HELDOUT_SHARE)))
        seen = 0
        for places in _left(shelf, stretches):
            first, end = np.searchsorted(drawn, (seen, seen + len(places)))
            shelf.fates[places[drawn[first:end] - seen]] = Fate.HELD_OUT
            seen += len(places)


def _left(shelf: Shelf, stretches: Sequence[_Stretch]) -> Iterator[np.ndarray]:
    """Places of what is still to be learned, in order, a chunk at a time."""
    for stretch in stretches:
        for begin in range(stretch.begin, stretch.end, CHUNK):
            fates = shelf.fates[begin : min(begin + CHUNK, stretch.end)]
            yield begin + np.flatnonzero(fates == Fate.LEARN)


def _save_learned(shelf: Shelf, fitter: Fitter, counting: Counting, meta: dict[str, Any], out: Path) -> None:
    """Write the rows to learn from. Raises UserError where there is none; DiskError."""
    asked = asked_in(conversation for _, conversation in shelf.read(Fate.HELD_OUT))

    def not_given_away() -> Iterator[Conversation]:
        for _, conversation in shelf.read(Fate.LEARN):
            if gives_away(conversation, asked):
                counting.dropped.add(REASONS[Fate.LEAK], conversation.source)
            else:
                yield conversation

    with rows_file(out, fitter.tokenizer.num_pieces, meta) as file:
        for fitted in fitter.fit(not_given_away(), shelf.count(Fate.LEARN)):
            if counting.is_kept(fitted):
                counting.learn(fitted.conversation, fitted.rows)
                for row in fitted.rows:
                    file.add(row, fitted.conversation.source)
        if not counting.rows_kept:
            raise UserError(
                f"No row is left to train on: {counting.rows_read:,} read, {shelf.count(Fate.HELD_OUT):,} of them held "
                f"out, dropped: {counting.dropped.told or 'none'}.",
                "Look at them with `graftlm data FILE --show 5`; mend the files, or raise data.max_tokens.",
            )


def _save_heldout(shelf: Shelf, fitter: Fitter, counting: Counting, meta: dict[str, Any], out: Path) -> dict[str, int]:
    """Write the held-out rows and, for eyes and other tokenizers, the dialogues they are of; their number by language.

    Raises UserError when none is usable; DiskError.
    """
    saved: dict[str, int] = {}
    num_heldout = shelf.count(Fate.HELD_OUT)
    for language in LANGUAGES:
        folder, shown = out / f"heldout-{language}", out / f"heldout-{language}.jsonl"
        found = (said for _, said in shelf.read(Fate.HELD_OUT) if said.language == language)
        number = 0
        with rows_file(folder, fitter.tokenizer.num_pieces, meta) as file, _dialogues_file(shown) as show:
            for fitted in fitter.fit(found, num_heldout, "render held-out"):
                if counting.is_kept(fitted) and fitted.shown is not None:
                    for row in fitted.rows:
                        file.add(row, fitted.conversation.source)
                    show(fitted.shown)
                    number += 1
        if number:
            saved[language] = number
        else:
            shutil.rmtree(folder)
            shown.unlink()
    if not saved:
        raise UserError("No held-out row is usable: the run could not be judged.", "Mend data.heldout or heldout_rows.")
    return saved


@contextmanager
def _dialogues_file(path: Path) -> Iterator[Callable[[Conversation], None]]:
    """What writes one dialogue after another to a new file, as `messages`."""

    def turn(message: Message) -> dict[str, str]:
        said = {"role": message.role, "content": message.content}
        return {**said, "input": message.input} if message.input else said

    with disk_errors(path.parent), path.open("w", encoding="utf-8") as stream:

        def write(conversation: Conversation) -> None:
            row = {"id": conversation.source, "messages": [turn(m) for m in conversation.messages]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


def _prepare_text(section: Data, tokenizer: Tokenizer, out: Path, meta: dict[str, Any]) -> None:
    """Rows of the objective `text`: plain documents as they stand, dialogues as all that is said in them."""
    with rows_file(out, tokenizer.num_pieces, meta) as file:
        for source in section.text:
            found, again = tee(dialogues_of(source, Reading()))
            texts = (conversation.text for conversation in again)
            for conversation, rows in zip(found, text_rows(texts, tokenizer, section.max_tokens), strict=True):
                for row in rows:
                    file.add(row, conversation.source)


__all__ = ["DataReport", "prepare_data", "read_conversations"]
