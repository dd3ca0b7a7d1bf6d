"""Duplicates: exact, near, and rows that give away what is held out; on disk as in memory."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from near_reference import near_fates

from graftlm.text import duplicates, near, piles, shelf
from graftlm.text.dialogue import Conversation, Message
from graftlm.text.duplicates import Marks, asked_in, gives_away
from graftlm.text.near import MISSED_SHARE, NUM_PERMUTATIONS, drop_near_duplicates, rows_per_band, shingles
from graftlm.text.piles import Piles
from graftlm.text.shelf import Fate, shelf_in
from graftlm.text.tally import Tally


def dialogue(*said: str, source: str = "", given: str = "") -> Conversation:
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(said)]
    turns[0] = Message("user", said[0], given)
    return Conversation(tuple(turns), source)


def similarity(one: Conversation, other: Conversation) -> float:
    mine, theirs = set(shingles(one.text)), set(shingles(other.text))
    return len(mine & theirs) / len(mine | theirs)


def judged(
    folder: Path, rows: Sequence[Conversation], heldout: Sequence[Conversation] = (), threshold: float | None = None
) -> tuple[list[Fate], Tally]:
    """What becomes of each of `rows`, exact duplicates dropped or, with a threshold, near ones; and the account."""
    dropped = Tally()
    with shelf_in(folder) as place:
        marks = Marks(place)
        for row in (*heldout, *rows):
            marks.add(row)
            place.put(row)
        place.finish()
        place.fates[: len(heldout)] = Fate.HELD_OUT
        if threshold is None:
            marks.drop_duplicates()
        else:
            drop_near_duplicates(place, threshold)
        place.tell_dropped(dropped)
        fates = [Fate(fate) for fate in place.fates[len(heldout) :]]
    assert list(folder.iterdir()) == []
    return fates, dropped


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were many rows: a chunk is soon full."""
    for module in (duplicates, near, shelf):
        monkeypatch.setattr(module, "CHUNK", 128)
    monkeypatch.setattr(piles, "KEPT_BYTES", 2**6)
    monkeypatch.setattr(piles, "PILE_BYTES", 2**8)


def test_exact_duplicates_go_and_near_misses_stay(tmp_path: Path) -> None:
    """B7: word for word; another input, another answer, another order of roles are other rows."""
    rows = [
        dialogue("a", "b", source="1"),
        dialogue("a", "b", source="2"),
        dialogue("a", "b", source="3", given="x"),
        dialogue("a", "c", source="4"),
        dialogue("a\nb", "", source="5"),
    ]
    fates, dropped = judged(tmp_path, rows, heldout=[dialogue("a", "c")])
    assert fates == [Fate.LEARN, Fate.DUPLICATE, Fate.LEARN, Fate.LEARN, Fate.LEARN]
    assert (dropped.counts, dropped.examples) == ({"exact duplicate": 1}, {"exact duplicate": ["2"]})


def test_exact_duplicates_on_disk_are_those_a_set_finds(tmp_path: Path) -> None:
    """B7: the first of its kind stays, among learned and held-out rows apart, over many chunks and piles."""
    dice = random.Random(1)
    said = [str(dice.randrange(700)) for _ in range(1500)]
    seen: set[str] = set()
    expected = []
    for text in said:
        expected.append(Fate.DUPLICATE if text in seen else Fate.LEARN)
        seen.add(text)
    fates, dropped = judged(tmp_path, [dialogue(text, "x", source=text) for text in said], [dialogue(said[0], "x")])
    assert fates == expected
    assert dropped.counts == {"exact duplicate": len(said) - len(seen)}
    assert (
        dropped.examples["exact duplicate"]
        == [text for text, fate in zip(said, fates, strict=True) if fate == Fate.DUPLICATE][:3]
    )


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path, threshold: float) -> None:
    """B7: every pair at or above the threshold goes, none below it does; similarity is counted exactly here."""
    dice = random.Random(0)
    letters = "的一是在不了有和人这中大为上个国我以要他 abcdefgh"

    def some(length: int) -> str:
        return "".join(dice.choices(letters, k=length))

    rows = [dialogue(some(40), some(120), source=str(i)) for i in range(400)]
    copies = []
    for i, row in enumerate(rows):
        answer = row.messages[1].content
        kept = len(answer) - dice.randrange(0, 80)
        copies.append(dialogue(row.messages[0].content, answer[:kept] + some(len(answer) - kept), source=f"copy {i}"))
    expected = {copy.source for row, copy in zip(rows, copies, strict=True) if similarity(row, copy) >= threshold}
    assert len(expected) > 30
    assert threshold < 0.7 or len(expected) < 350
    fates, dropped = judged(tmp_path, [*rows, *copies], threshold=threshold)
    kept = {c.source for c, fate in zip([*rows, *copies], fates, strict=True) if fate == Fate.LEARN}
    assert {c.source for c in copies} - kept == expected
    assert {c.source for c in rows} <= kept
    assert dropped.counts == {"near duplicate": len(expected)}


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_search_on_disk_drops_what_the_one_in_memory_drops(tmp_path: Path, threshold: float) -> None:
    """B7: rows with long frames in common, chains of copies of copies, held-out rows: the same fate for every row."""
    dice = random.Random(2)
    letters = "的一是在不了有和人这中大为上个国我以要他"

    def some(length: int) -> str:
        return "".join(dice.choices(letters, k=length))

    frames, texts = [some(150) for _ in range(4)], []
    for _ in range(450):
        kind = dice.random()
        if texts and kind < 0.4:
            old = dice.choice(texts)
            kept = len(old) - dice.randrange(0, min(30, len(old)))
            texts.append(old[:kept] + some(len(old) - kept))
        else:
            texts.append((dice.choice(frames) if kind < 0.7 else "") + some(dice.randrange(4, 90)))
    rows = [dialogue(text, "x") for text in texts]
    heldout, rows = rows[::10], [row for place, row in enumerate(rows) if place % 10]
    expected = near_fates([row.text for row in rows], [row.text for row in heldout], threshold)
    fates, _ = judged(tmp_path, rows, heldout, threshold)
    assert [{Fate.LEARN: "kept", Fate.NEAR: "near", Fate.LEAK: "leak"}[fate] for fate in fates] == expected
    assert min(expected.count(fate) for fate in ("kept", "near", "leak")) >= 8


@pytest.mark.parametrize("kept_bytes", [1, 20, 2**12])
def test_piles_hold_every_record_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    """All on disk, the later ones in memory, all in memory."""
    monkeypatch.setattr(piles, "KEPT_BYTES", kept_bytes)
    found = Piles(tmp_path / "piles", np.int64)
    for begin, end in ((0, 500), (500, 900), (900, 1000)):
        records = np.arange(begin, end)
        found.add(records % 7, records)
    assert [pile.tolist() for pile in found] == [list(range(first, 1000, 7)) for first in range(7)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_the_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(threshold)
    missed = (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows)
    assert missed <= MISSED_SHARE
    assert rows == 32 or (1 - threshold ** (rows + 1)) ** (NUM_PERMUTATIONS // (rows + 1)) > MISSED_SHARE


def test_a_training_row_near_to_a_held_out_one_is_counted_as_held_out(tmp_path: Path) -> None:
    """B7: leaks across the split, near ones too."""
    long = "今天天气很好，我们一起去公园散步，看见许多人在湖边放风筝，孩子们跑来跑去，非常热闹。" * 3
    heldout = [dialogue(long, "好的，明天再去。", source="held")]
    train = [dialogue(long, "好的，明天再去吧。", source="1"), dialogue("别的问题", "别的回答", source="2")]
    fates, dropped = judged(tmp_path, train, heldout, 0.9)
    assert fates == [Fate.LEAK, Fate.LEARN]
    assert dropped.counts == {"also held out": 1}


def test_held_out_rows_near_to_each_other_both_count(tmp_path: Path) -> None:
    """B7: near to the second of two held-out rows that resemble each other, but not to the first."""
    words = [f"word{i}" for i in range(100)]

    def text(num_changed: int) -> Conversation:
        return dialogue("q", " ".join([*words[num_changed:], *(f"new{i}" for i in range(num_changed))]), source="x")

    first, second, third = text(0), text(4), text(8)
    assert similarity(first, second) >= 0.9 <= similarity(second, third)
    assert similarity(first, third) < 0.9
    fates, dropped = judged(tmp_path, [third], [first, second], 0.9)
    assert fates == [Fate.LEAK]
    assert dropped.counts == {"also held out": 1}


@pytest.mark.parametrize(
    ("row", "leaks"),
    [
        (dialogue("What is it?", "another answer"), True),
        (dialogue("what  is it", "another answer"), True),
        (dialogue("Ｗhat is it？", "another answer"), True),
        (dialogue("What is it?", "x", "and then?", "y"), True),
        (dialogue("What is it?", "x", given="material"), False),
        (dialogue("before", "x", "What is it?", "y"), False),
        (dialogue("What is that?", "x"), False),
    ],
)
def test_a_held_out_question_is_known_whatever_its_answer(row: Conversation, leaks: bool) -> None:
    """B7: the same question in a training row, also as the first of several turns."""
    assert gives_away(row, asked_in([dialogue("What is it?", "this")])) == leaks


def test_a_held_out_follow_up_is_known_with_the_turns_before_it_only() -> None:
    asked = asked_in([dialogue("a", "b", "c", "d")])
    rows = [dialogue("a", "b"), dialogue("a", "b", "c", "e"), dialogue("c", "d")]
    assert [gives_away(row, asked) for row in rows] == [False, True, False]
