"""The run folder: lock, foreign places, metrics that survive, whose disk errors are ours."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from graftlm import run as run_module
from graftlm.errors import DiskError, UserError
from graftlm.run import Metrics, ProgressShown, RunFolder, disk_errors, progress, read_json, read_metrics, write_json


def refusal(folder: Path, name: str = "tiny") -> str:
    with pytest.raises(UserError) as error, RunFolder(folder, name):
        pass
    assert error.value.fix
    return error.value.problem


def test_second_run_is_told_the_first_pid_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    """R8: two runs in one folder."""
    with RunFolder(tmp_path / "run", "tiny"):
        assert f"in use by process {os.getpid()}" in refusal(tmp_path / "run")
    with RunFolder(tmp_path / "run", "tiny"):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys) -> None:
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_module.fcntl, "flock", no_locks)
    with RunFolder(tmp_path / "run", "tiny"):
        assert "No locks available" in capsys.readouterr().err


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    """P1: nothing is written into a place that is not ours, not even a lock."""
    (tmp_path / "letters.txt").write_text("mine")
    assert "not a run folder: it holds letters.txt" in refusal(tmp_path)
    (tmp_path / "recipe.json").write_text('["another program"]')
    assert "not a run folder" in refusal(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters.txt", "recipe.json"]


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "first") as run:
        run.write_recipe({"name": "first"}, {"zh.txt": "mark"})
    assert "holds a run of recipe first, not of second" in refusal(tmp_path / "run", "second")
    (tmp_path / "run" / "recipe.json").write_text("{")
    assert "not JSON" in refusal(tmp_path / "run", "first")


def test_places_that_cannot_be_a_folder_are_told(tmp_path: Path) -> None:
    """P1: a file, a folder below a file, a link to nowhere."""
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")
    assert "file is a file" in refusal(tmp_path / "file" / "runs" / "tiny")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link to nowhere" in refusal(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_links_and_dots_in_an_output_are_the_users_own_word(tmp_path: Path) -> None:
    """P1: `--out` may point anywhere; only what lies there decides."""
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    for place in (tmp_path / "link" / "run", tmp_path / "big" / ".." / "other"):
        with RunFolder(place, "tiny") as run:
            run.write_recipe({"name": "tiny"}, {})
    assert (tmp_path / "big" / "run" / "recipe.json").exists()
    assert (tmp_path / "other" / "recipe.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_told_at_once(tmp_path: Path) -> None:
    """D2: exit 4 before anything else."""
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match="Permission denied"), RunFolder(tmp_path / "run", "tiny"):
        pass
    tmp_path.chmod(0o700)


def test_disk_errors_are_told_with_free_bytes_and_others_pass(tmp_path: Path) -> None:
    """D1 D2: full, over quota, too large a file, read-only; not an input that may not be read."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        with pytest.raises(DiskError, match=r"[\d,]+ bytes free") as error, disk_errors(tmp_path / "new" / "deep"):
            raise OSError(number, os.strerror(number))
        assert error.value.exit_code == 4
    with pytest.raises(DiskError, match=r"Read-only file system.\n.*make it writable"), disk_errors(tmp_path):
        raise OSError(errno.EROFS, "read-only")
    with pytest.raises(DiskError), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "denied", str(tmp_path / "file"))
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "denied", "/elsewhere/input.txt")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise OSError(errno.ENOENT, "gone")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "fsync", full)
        with pytest.raises(DiskError):
            write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    with pytest.raises(UserError, match="There is no"):
        read_json(tmp_path / "b.json")


def test_metrics_survive_a_half_written_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append("step", step=step)
    with metrics.path.open("a") as stream:
        stream.write('{"event": "st')
    metrics.cut_after(2)
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2]


def test_metrics_are_json_whatever_the_numbers_and_come_back_as_they_were(tmp_path: Path) -> None:
    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    metrics = Metrics(tmp_path / "metrics.jsonl")
    values = {"step": 1, "loss": math.inf, "norms": {"body": -math.inf}, "losses": [1.0, math.inf], "text": "NaN"}
    metrics.append("step", **values)
    metrics.append("step", step=2, loss=math.nan)
    metrics.cut_after(2)
    text = metrics.path.read_text(encoding="utf-8")
    told = [json.loads(line, parse_constant=strict) for line in text.splitlines()]
    assert (told[0]["loss"], told[1]["loss"]) == ("Infinity", "NaN")
    first, second = read_metrics(metrics.path)
    assert first == {"event": "step", **values}
    assert math.isnan(second["loss"])
    metrics.path.write_text('{"event": "step", "step": 1, "loss": NaN, "grad_norm": -Infinity}\n', encoding="utf-8")
    [old] = read_metrics(metrics.path)  # as earlier versions wrote it
    assert (math.isnan(old["loss"]), old["grad_norm"]) == (True, -math.inf)


def test_progress_yields_everything_and_tells_time_left_without_a_terminal(monkeypatch, capsys) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress("abcde", 5, "reading")) == list("abcde")
    assert capsys.readouterr().err.splitlines() == ["reading: 2/5, 18 s left", "reading: 4/5, 6 s left"]


def test_time_left_is_not_judged_by_what_came_before_the_first_thing(monkeypatch, capsys) -> None:
    """A minute of preparation, then a second for each of a thousand things: never 16 hours left."""
    clock = [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with ProgressShown("learning", 1000) as shown:
        clock[0] = 60
        for count in range(1, 1001):
            shown.reach(count)
            clock[0] += 1
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["learning: 1/1,000", "learning: 11/1,000, 16 min 29 s left"]
    assert told[-1] == "learning: 991/1,000, 9 s left"
