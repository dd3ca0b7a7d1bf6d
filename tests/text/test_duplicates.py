"""Duplicates: exact, near, and rows that give away what is held out."""

import random

import pytest

from graftlm.text.dialogue import Conversation, Message
from graftlm.text.duplicates import (
    MISSED_SHARE,
    NUM_PERMUTATIONS,
    drop_exact_duplicates,
    drop_heldout,
    drop_near_duplicates,
    rows_per_band,
    shingles,
)
from graftlm.text.tally import Tally


def dialogue(*said: str, source: str = "", given: str = "") -> Conversation:
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(said)]
    turns[0] = Message("user", said[0], given)
    return Conversation(tuple(turns), source)


def similarity(one: Conversation, other: Conversation) -> float:
    mine, theirs = set(shingles(one.text)), set(shingles(other.text))
    return len(mine & theirs) / len(mine | theirs)


def test_exact_duplicates_go_and_near_misses_stay() -> None:
    """B7: word for word; another input, another answer, another order of roles are other rows."""
    rows = [
        dialogue("a", "b", source="1"),
        dialogue("a", "b", source="2"),
        dialogue("a", "b", source="3", given="x"),
        dialogue("a", "c", source="4"),
        dialogue("a\nb", "", source="5"),
    ]
    dropped = Tally()
    assert [c.source for c in drop_exact_duplicates(rows, dropped)] == ["1", "3", "4", "5"]
    assert (dropped.counts, dropped.examples) == ({"exact duplicate": 1}, {"exact duplicate": ["2"]})


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_planted_near_duplicates_are_found_and_nothing_else(threshold: float) -> None:
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
    dropped = Tally()
    kept = {c.source for c in drop_near_duplicates([*rows, *copies], [], threshold, dropped)}
    assert {c.source for c in copies} - kept == expected
    assert {c.source for c in rows} <= kept
    assert dropped.counts == {"near duplicate": len(expected)}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_the_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(threshold)
    missed = (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows)
    assert missed <= MISSED_SHARE
    assert rows == 32 or (1 - threshold ** (rows + 1)) ** (NUM_PERMUTATIONS // (rows + 1)) > MISSED_SHARE


def test_a_training_row_near_to_a_held_out_one_is_counted_as_held_out() -> None:
    """B7: leaks across the split, near ones too."""
    long = "今天天气很好，我们一起去公园散步，看见许多人在湖边放风筝，孩子们跑来跑去，非常热闹。" * 3
    heldout = [dialogue(long, "好的，明天再去。", source="held")]
    train = [dialogue(long, "好的，明天再去吧。", source="1"), dialogue("别的问题", "别的回答", source="2")]
    dropped = Tally()
    assert [c.source for c in drop_near_duplicates(train, heldout, 0.9, dropped)] == ["2"]
    assert dropped.counts == {"also held out": 1}


def test_held_out_rows_near_to_each_other_both_count() -> None:
    """B7: near to the second of two held-out rows that resemble each other, but not to the first."""
    words = [f"word{i}" for i in range(100)]

    def text(num_changed: int) -> Conversation:
        return dialogue("q", " ".join([*words[num_changed:], *(f"new{i}" for i in range(num_changed))]), source="x")

    first, second, third = text(0), text(4), text(8)
    assert similarity(first, second) >= 0.9 <= similarity(second, third)
    assert similarity(first, third) < 0.9
    dropped = Tally()
    assert drop_near_duplicates([third], [first, second], 0.9, dropped) == []
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
    dropped = Tally()
    kept = drop_heldout([row], [dialogue("What is it?", "this")], dropped)
    assert (not kept) == leaks
    assert dropped.counts == ({"also held out": 1} if leaks else {})


def test_a_held_out_follow_up_is_known_with_the_turns_before_it_only() -> None:
    heldout = [dialogue("a", "b", "c", "d")]
    rows = [dialogue("a", "b", source="1"), dialogue("a", "b", "c", "e", source="2"), dialogue("c", "d", source="3")]
    assert [c.source for c in drop_heldout(rows, heldout, Tally())] == ["1", "3"]
