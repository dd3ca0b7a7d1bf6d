"""Held-out readings in training: when, what is kept, when it is over."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import make_rows, make_stage

from graftlm.device import Precision
from graftlm.run import Metrics, read_metrics
from graftlm.training import best as best_module
from graftlm.training.best import HeldoutWatch
from graftlm.training.heldout import RowLosses
from graftlm.training.saving import Saver

PRECISION = Precision(torch.float32, torch.device("cpu"))


def watch_over(
    folder: Path, readings: list[dict[str, float]], monkeypatch, num_steps: int = 10, **knobs
) -> HeldoutWatch:
    """A watch whose readings, in bits per byte by language, are these."""
    left = iter([value for reading in readings for value in reading.values()])

    def read(*_):
        return RowLosses(np.array([next(left) * np.log(2)]), np.array([1]), np.array([1]))

    monkeypatch.setattr(best_module, "heldout_losses", read)
    stage = make_stage({"kind": "full"}, **{"keep": "best", "heldout_every": None, **knobs})
    heldout = {language: make_rows(2) for language in readings[0]} if readings else {}
    metrics = Metrics(folder / "metrics.jsonl")
    return HeldoutWatch(stage, heldout, num_steps, folder, metrics, Saver(metrics, in_background=False))


def read_all(watch: HeldoutWatch, steps: range | list[int]) -> None:
    for step in steps:
        watch.read(step, None, PRECISION, lambda step=step: {"w": torch.tensor([float(step)])})


def test_readings_are_due_every_so_often_and_at_the_end(tmp_path, monkeypatch) -> None:
    default = watch_over(tmp_path, [], monkeypatch, num_steps=23)
    assert [step for step in range(1, 24) if default.is_due(step)] == [5, 10, 15, 20, 23]
    asked = watch_over(tmp_path, [], monkeypatch, num_steps=23, heldout_every=9)
    assert [step for step in range(1, 24) if asked.is_due(step)] == [9, 18, 23]


def test_the_best_in_the_new_language_is_kept_and_only_it(tmp_path, monkeypatch) -> None:
    """The old language rising does not decide."""
    readings = [{"old": 1, "new": 9}, {"old": 2, "new": 5}, {"old": 3, "new": 4}, {"old": 0.5, "new": 4}]
    watch = watch_over(tmp_path, readings, monkeypatch)
    read_all(watch, [0])
    read_all(watch, [2, 4, 6])
    best = watch.best()
    assert best is not None
    assert best.values == {"step": 4}
    assert best.tensors["weights"]["w"].item() == 4.0
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000004"]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "heldout"]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert [line["new"]["bits_per_byte"] for line in lines] == pytest.approx([9, 5, 4, 4])


@pytest.mark.parametrize(("objective", "kept"), [("dialogue", {"step": 0}), ("text", None)])
def test_the_start_is_kept_where_nothing_was_better(tmp_path, monkeypatch, objective, kept) -> None:
    """But for texts: dialogues held out cannot judge what they teach."""
    watch = watch_over(tmp_path, [{"new": 4}, {"new": 5}, {"new": 4.5}], monkeypatch, objective=objective)
    read_all(watch, [0, 5])
    best = watch.best()
    assert (None if best is None else best.values) == kept


def test_one_language_alone_is_judged_and_none_at_all_is_no_error(tmp_path, monkeypatch) -> None:
    watch = watch_over(tmp_path, [{"old": 3}, {"old": 2}], monkeypatch)
    read_all(watch, [0, 2])
    assert watch.best_loss == pytest.approx(2)
    without = watch_over(tmp_path / "none", [], monkeypatch)
    (tmp_path / "none").mkdir()
    read_all(without, [0, 2])
    assert without.best() is None


def test_it_is_over_after_so_many_readings_that_were_not_better(tmp_path, monkeypatch) -> None:
    watch = watch_over(
        tmp_path, [{"new": n} for n in (5, 4, 6, 3, 7, 7)], monkeypatch, heldout_every=2, early_stop_after=2
    )
    over = []
    for step in range(0, 12, 2):
        read_all(watch, [step])
        over.append(watch.is_over)
    assert over == [False, False, False, False, False, True]
    patient = watch_over(tmp_path, [{"new": n} for n in (5, 6, 7)], monkeypatch)
    read_all(patient, [0, 2, 4])
    assert not patient.is_over


def test_a_stage_that_keeps_its_last_weights_writes_none(tmp_path, monkeypatch) -> None:
    watch = watch_over(tmp_path, [{"new": 2}, {"new": 1}], monkeypatch, keep="last")
    read_all(watch, [0, 2])
    assert watch.best() is None
    assert not (tmp_path / "best").exists()


def test_its_state_survives(tmp_path, monkeypatch) -> None:
    watch = watch_over(tmp_path, [{"new": 2}, {"new": 3}], monkeypatch)
    again = watch_over(tmp_path, [{"new": 1}], monkeypatch)
    again.restore(watch.state())
    assert again.best_loss == float("inf")
    watch = watch_over(tmp_path, [{"new": 2}, {"new": 3}], monkeypatch)
    read_all(watch, [0, 2])
    again.restore(watch.state())
    assert (again.best_loss, again.readings_since_best) == (pytest.approx(2), 1)
