"""Checkpoints written beside training: the bytes of those written within the step, and nothing lost or late."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import FIRST_NEW_ID, FULL, course_of, make_rows, make_stage, tiny_model, weights_sha256

from graftlm.errors import DiskError, Interrupted
from graftlm.health.plan import PROCESS_BYTES
from graftlm.recipe import Stage
from graftlm.run import Metrics, read_metrics
from graftlm.training import checkpoint as checkpoint_module
from graftlm.training import room
from graftlm.training import saving as saving_module
from graftlm.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, step_folder, whole_checkpoints
from graftlm.training.saving import HostMemory, Saver, facts_of_saves
from graftlm.training.stage import StageRun

LORA = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.2}
SECONDS = 20.0  # no test of ours may hang
CPU = torch.device("cpu")


def run_of(stage: Stage, folder: Path, beside: bool = True) -> StageRun:
    folder.mkdir(exist_ok=True)
    heldout = {"new": make_rows(4, seed=9)} if stage.keep == "best" else {}
    return StageRun(tiny_model(), stage, make_rows(), heldout, folder, CPU, FIRST_NEW_ID, saves_beside=beside)


def hashes_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Gate:
    """Holds every write of a checkpoint until it is opened, and counts how many are at it at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self._write = threading.Event(), checkpoint_module._write
        self.open, self.close = self._open.set, self._open.clear
        self.at_once = self.most_at_once = 0
        monkeypatch.setattr(checkpoint_module, "_write", self._held)

    def _held(self, temporary: Path, checkpoint: Checkpoint) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self._open.wait(SECONDS)
        self._write(temporary, checkpoint)
        self.at_once -= 1


def after_step(monkeypatch: pytest.MonkeyPatch, run: StageRun, step: int, act: Callable[[], Any]) -> None:
    record = run._record

    def seen(step_record: Any) -> None:
        record(step_record)
        if step_record.step == step:
            act()

    monkeypatch.setattr(run, "_record", seen)


def saves_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "saved"]


@pytest.mark.parametrize(("trains", "precision"), [(FULL, "fp16"), (LORA, "fp32")], ids=["full-fp16", "lora-fp32"])
def test_written_steps_later_it_is_still_the_checkpoint_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: dict[str, Any], precision: str
) -> None:
    """The write of step 3 may begin only after step 5; every file is what the step itself would have written."""
    stage = make_stage(trains, precision=precision, checkpoint_every=3)
    within = run_of(stage, tmp_path / "within", beside=False)
    within.run()
    beside = run_of(stage, tmp_path / "beside")
    assert (within.saver.in_background, beside.saver.in_background) == (False, True)
    gate = Gate(monkeypatch)
    gate.open()
    after_step(monkeypatch, beside, 3, gate.close)
    after_step(monkeypatch, beside, 5, gate.open)
    beside.run()
    expected = hashes_of(tmp_path / "within" / "checkpoints")
    assert expected.keys() >= {f"step-{step:08d}/optimizer.safetensors" for step in (3, 6)}
    for folder in ("checkpoints", "trained"):
        assert hashes_of(tmp_path / "beside" / folder) == hashes_of(tmp_path / "within" / folder)
    assert weights_sha256(beside.finished_model()) == weights_sha256(within.finished_model())
    assert course_of(tmp_path / "beside") == course_of(tmp_path / "within")


def test_the_best_weights_are_kept_beside_training_too(tmp_path: Path) -> None:
    stage = make_stage(FULL, keep="best", epochs=4, heldout_every=1)
    for name in ("beside", "within"):
        run_of(stage, tmp_path / name, beside=name == "beside").run()
    assert list((tmp_path / "within" / "best").iterdir())
    for folder in ("best", "checkpoints", "trained"):
        assert hashes_of(tmp_path / "beside" / folder) == hashes_of(tmp_path / "within" / folder)


def test_one_write_at_a_time_and_all_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save at every step, each of which waits for the one before."""
    gate = Gate(monkeypatch)
    gate.open()
    run = run_of(make_stage(FULL, checkpoint_every=1), tmp_path / "run")
    run.run()
    assert gate.most_at_once == 1
    told = saves_of(tmp_path / "run")
    assert [line["step"] for line in told] == list(range(7))
    assert {line["what"] for line in told} == {"checkpoints"}
    facts = run.facts()
    assert facts["num_saves"] == 7
    assert facts["largest_save_bytes"] == max(line["num_bytes"] for line in told) > 2 * told[0]["num_bytes"]
    for name, key in (("waited_for_saves_seconds", "waited_seconds"), ("written_saves_seconds", "written_seconds")):
        assert facts[name] == pytest.approx(sum(line[key] for line in told), abs=1e-3)
    assert facts_of_saves([]) == {
        "num_saves": 0, "largest_save_bytes": 0, "waited_for_saves_seconds": 0, "written_saves_seconds": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("failing", "last_step"), [(2, 3), (6, 6)])
def test_a_write_that_fails_ends_the_stage_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, last_step: int
) -> None:
    """D1: exit 4, also of the last write of all; what was saved before is there to go on from."""
    stage = make_stage(FULL)
    whole = run_of(stage, tmp_path / "whole")
    whole.run()
    run = run_of(stage, tmp_path / "run")
    write = checkpoint_module._write

    def full_at_one(temporary: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.values["step"] == failing:
            full()
        write(temporary, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write", full_at_one)
        after_step(patch, run, failing + 1, lambda: run.saver._in_flight.job.thread.join(SECONDS))  # type: ignore[union-attr]
        with pytest.raises(DiskError, match="bytes free") as error:
            run.run()
    assert (error.value.exit_code, run.step) == (4, last_step)
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert load_checkpoint(newest).values["step"] == failing - 2
    assert not (tmp_path / "run" / "trained").exists()
    again = run_of(stage, tmp_path / "run")
    again.run()
    assert weights_sha256(again.finished_model()) == weights_sha256(whole.finished_model())


def test_saved_is_only_said_of_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: asked to stop, the stage leaves when its checkpoint is whole; where that fails, it says so instead."""
    stage = make_stage(FULL, checkpoint_every=4)
    gate = Gate(monkeypatch)
    gate.open()
    run = run_of(stage, tmp_path / "run")

    def ask_with_a_slow_disk() -> None:
        run.stop.is_asked = True
        gate.close()
        threading.Timer(0.3, gate.open).start()

    after_step(monkeypatch, run, 3, ask_with_a_slow_disk)
    with pytest.raises(Interrupted, match="stopped after step 3 of 6, saved"):
        run.run()
    assert load_checkpoint(step_folder(run.checkpoints, 3)).values["step"] == 3
    run = run_of(stage, tmp_path / "full")

    def ask_and_fill_the_disk() -> None:
        run.stop.is_asked = True
        run.saver.wait()
        monkeypatch.setattr(checkpoint_module, "_write", full)

    after_step(monkeypatch, run, 3, ask_and_fill_the_disk)
    with pytest.raises(DiskError):
        run.run()


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_rollback_reads_what_was_saved_however_slow_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(make_stage(FULL), tmp_path / "run")
    run._save()
    run.saver.wait()
    gate = Gate(monkeypatch)
    run.step = 4
    run._save()
    opening = threading.Timer(0.3, gate.open)
    opening.start()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(7.0)
    good = run._last_good()
    assert good is not None
    assert {folder.name for folder in whole_checkpoints(run.checkpoints)} == {"step-00000000", "step-00000004"}
    assert not any((tensor == 7.0).all() for name, tensor in good.items() if "norm" not in name)


def test_asked_twice_it_leaves_at_once_and_otherwise_only_with_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(Metrics(tmp_path / "metrics.jsonl"), in_background=True)
    checkpoint = Checkpoint({"weights": {"a": torch.ones(3)}}, {"step": 1})
    saver.save(step_folder(tmp_path, 1), checkpoint)
    with pytest.raises(KeyboardInterrupt), saver.settled():
        raise KeyboardInterrupt
    assert whole_checkpoints(tmp_path) == []
    threading.Timer(0.3, gate.open).start()
    with pytest.raises(ZeroDivisionError), saver.settled():
        raise ZeroDivisionError
    assert whole_checkpoints(tmp_path) == [step_folder(tmp_path, 1)]


def test_where_memory_holds_no_copy_the_step_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = make_stage(FULL)
    for room_bytes, is_beside in ((PROCESS_BYTES + 10_000, False), (2 * PROCESS_BYTES, True), (None, False)):
        monkeypatch.setattr(room, "memory_here_bytes", lambda *_, room_bytes=room_bytes: room_bytes)
        run = run_of(stage, tmp_path / str(room_bytes))
        assert run.saver.in_background is is_beside
    run.run()
    assert "a step waits while a checkpoint is written: memory holds no copy of it" in capsys.readouterr().err
    told = saves_of(tmp_path / "None")
    assert all(line["waited_seconds"] >= line["written_seconds"] > 0 for line in told)


def test_the_copy_keeps_to_its_memory() -> None:
    """Taken once, as large as the largest; values are copied too."""
    memory = HostMemory()
    tensors, values = {"weights": {"a": torch.ones(4, 4).T, "b": torch.tensor(3)}}, {"step": 1, "in": {"a": [1]}}
    first = memory.copied(Checkpoint(tensors, values))
    values["in"]["a"].append(2)
    tensors["weights"]["a"].mul_(5)
    assert first.values["in"] == {"a": [1]}
    assert torch.equal(first.tensors["weights"]["a"], torch.ones(4, 4))
    second = memory.copied(Checkpoint(tensors, values))
    assert second.tensors["weights"]["a"].data_ptr() == first.tensors["weights"]["a"].data_ptr()
    assert second.tensors["weights"]["b"] == 3


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_kill_while_one_takes_anothers_place_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """R9: a rollback saves a step anew; killed between the two renames, the only whole one is put back."""
    saved = Checkpoint({"weights": {"a": torch.ones(2)}}, {"step": 4, "time": 1})
    for step in (4,) if is_alone else (2, 4):
        saving_module.save_checkpoint(step_folder(tmp_path, step), saved)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == step_folder(tmp_path, 4):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        saving_module.save_checkpoint(step_folder(tmp_path, 4), Checkpoint(saved.tensors, {"step": 4, "time": 2}))
    monkeypatch.undo()
    assert not step_folder(tmp_path, 4).exists()
    found = checkpoint_module.newest_stored(tmp_path, ["weights"])
    assert found is not None
    assert found.values == {"step": 4, "time": 1}
