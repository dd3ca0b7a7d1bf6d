"""The watch on the loss: what is an alarm while training goes on, and what is none."""

from graftlm.health.watch import LossWatch


def watching(first: float = 6.8) -> LossWatch:
    """A stage whose training loss stands still, after its reading before the first step."""
    watch = LossWatch()
    assert not watch.see_heldout(first)
    for _ in range(20):
        assert watch.see(7.0) is None
    return watch


def test_one_worse_heldout_reading_is_no_alarm_where_the_next_is_better() -> None:
    """As measured at a healthy rate: 6.79, 7.43, and 6.42 at the end (docs/log.md)."""
    watch = watching()
    assert [watch.see_heldout(loss) for loss in (7.43, 7.2, 6.9, 6.42)] == [False] * 4


def test_heldout_readings_that_stay_worse_are_an_alarm() -> None:
    watch = watching()
    assert [watch.see_heldout(loss) for loss in (7.4, 7.4)] == [False, True]
    watch = watching()
    assert [watch.see_heldout(loss) for loss in (7.4, 6.8, 7.5, 7.6)] == [False, False, False, True]


def test_rows_learned_by_heart_are_no_alarm() -> None:
    watch = watching()
    for _ in range(20):
        watch.see(5.0)
    assert not any(watch.see_heldout(loss) for loss in (7.4, 7.6, 8.0))


def test_a_resumed_watch_judges_as_an_uninterrupted_one() -> None:
    before, after = watching(), LossWatch()
    before.see_heldout(7.4)
    after.restore(before.state())
    assert after.state() == before.state()
    assert after.see_heldout(7.5)
