"""Counting rows by reason."""

from graftlm.text.tally import Tally


def test_counts_and_the_first_three_places() -> None:
    tally, other = Tally(), Tally()
    for number in range(5):
        tally.add("empty", f"a:{number}")
    other.add("empty", "b:0")
    other.add("long", "b:1")
    other.merge(tally)
    assert other.counts == {"empty": 6, "long": 1}
    assert other.examples == {"empty": ["b:0", "a:0", "a:1"], "long": ["b:1"]}
    assert (other.total, tally.total) == (7, 5)
    assert len(tally.examples["empty"]) == 3
    assert other.told == "empty (6), long (1)"
