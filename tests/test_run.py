"""The run folder: locks, done marks, foreign folders, metrics that survive."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.run import Metrics, RunFolder, fingerprint, read_metrics


def test_second_run_is_told_the_first_pid(tmp_path: Path) -> None:
    """R8: two runs in one folder."""
    import os

    with RunFolder(tmp_path / "run", "tiny"), pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "run", "tiny").__enter__()
    assert str(os.getpid()) in caught.value.problem


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path, "tiny").__enter__()
    other = tmp_path / "other"
    with RunFolder(other, "first") as run:
        run.write_recipe({"name": "first"})
    with pytest.raises(UserError, match="recipe first"):
        RunFolder(other, "second").__enter__()
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_changed_maths_of_unfinished_training_is_refused(tmp_path: Path) -> None:
    """R7: the changed keys are listed and nothing is lost."""
    with RunFolder(tmp_path, "tiny") as run:
        step = run.step("4-full")
        step.begin("a", {"epochs": 1, "optim": {"lr": 1}})
        (step.folder / "checkpoints").mkdir()
        with pytest.raises(UserError, match=r"optim\.lr"):
            step.begin("b", {"epochs": 1, "optim": {"lr": 2}})
        step.begin("a", {"epochs": 1, "optim": {"lr": 1}})
        assert (step.folder / "checkpoints").is_dir()
        step.finish("a", 1.0)
        assert step.is_done("a")
        assert not step.is_done("b")


def test_metrics_survive_a_half_written_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append("step", step=step)
    with metrics.path.open("a") as stream:
        stream.write('{"event": "st')
    metrics.cut_after(2)
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2]


def test_fingerprint_follows_content_not_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b").write_text("y")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
