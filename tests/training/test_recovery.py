"""Recovery: what goes wrong is mended within a budget, written down, and resumes exactly; advice changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import FIRST_NEW_ID, LORA_ALL, spoken_rows, stage_of, weights_sha256

from graftlm.errors import NumericalStop
from graftlm.run import read_metrics
from graftlm.training.checkpoint import save_checkpoint, step_folder
from graftlm.training.loop import StepRecord
from graftlm.training.stage import StageRun

TOO_FAST = {"groups": {"adapter": {"peak_lr": 3.0}}, "epochs": 6, "batch_rows": 8, "precision": "fp16"}


class Killed(Exception):
    pass


def make(folder: Path, base: Any, **knobs: Any) -> StageRun:
    folder.mkdir(exist_ok=True)
    stage = stage_of(LORA_ALL, **{**TOO_FAST, "max_rollbacks": 10, **knobs})
    return StageRun(copy.deepcopy(base), stage, spoken_rows(), {}, folder, torch.device("cpu"), FIRST_NEW_ID)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] == name]


def test_a_rate_far_too_high_is_cut_until_the_run_goes_well(tmp_path: Path, base: Any) -> None:
    run = make(tmp_path, base)
    run.run()
    told = events(tmp_path, "intervention")
    assert 1 <= len(told) == run.recovery.num_rollbacks == run.facts()["num_rollbacks"] <= 10
    assert [line["number"] for line in told] == list(range(1, len(told) + 1))
    assert [line["rate_factor"] for line in told] == pytest.approx([0.3**n for n in range(1, len(told) + 1)])
    assert all("Rolled back to step" in line["text"] and "adapter" in line["text"] for line in told)
    steps = events(tmp_path, "step")
    assert steps[-1]["step"] == 48
    assert steps[-1]["loss"] < 2  # it began at about 0.4 and knows nothing at 3.9
    assert max(line["lr"] for line in steps[-40:]) <= 3.0 * 0.3 * 1.001


def test_what_was_rolled_back_leaves_no_trace(tmp_path: Path, base: Any) -> None:
    """Back at the start with a tenth of the rate it is the run that began with a tenth: moments are forgotten too."""
    run = make(tmp_path / "mended", base, precision="fp32", epochs=3)
    run.run()
    told = events(tmp_path / "mended", "intervention")
    assert told
    assert {line["step"] for line in told} == {0}
    factor = run.recovery.rate_factor
    knobs = {"peak_lr": 1e-3 * factor, "groups": {"adapter": {"peak_lr": 3.0 * factor}}}
    fresh = make(tmp_path / "fresh", base, precision="fp32", epochs=3, **knobs)
    fresh.run()
    assert fresh.recovery.num_rollbacks == 0
    for mended, other in zip(run.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(mended, other, rtol=1e-4, atol=1e-5)


def test_a_state_that_fails_again_was_no_good(tmp_path: Path, base: Any) -> None:
    run = make(tmp_path, base)
    for step in (0, 4):
        run.step = step
        save_checkpoint(step_folder(run.checkpoints, step), run.state())
    targets = [run.recovery.roll_back("it failed", 7, run.checkpoints).values["step"] for _ in range(3)]
    assert targets == [4, 0, 0]
    assert run.recovery.rate_factor == pytest.approx(0.3**3)


def test_killed_after_a_rollback_it_ends_with_the_same_weights(tmp_path: Path, base: Any) -> None:
    """R1, R3: the cut of the rate, the watch and the budget survive; each intervention is told once."""
    whole = make(tmp_path / "whole", base)
    whole.run()
    first = events(tmp_path / "whole", "intervention")[-1]
    again = make(tmp_path / "again", base)
    see = again.recovery.see

    def killed_later(record: StepRecord) -> None:
        see(record)
        if again.recovery.num_rollbacks == whole.recovery.num_rollbacks and record.step > first["step"] + 7:
            raise Killed

    again.recovery.see = killed_later  # type: ignore[method-assign]
    with pytest.raises(Killed):
        again.run()
    resumed = make(tmp_path / "again", base)
    resumed.run()
    assert weights_sha256(resumed.finished_model()) == weights_sha256(whole.finished_model())
    assert events(tmp_path / "again", "intervention") == events(tmp_path / "whole", "intervention")


@pytest.mark.parametrize("recovery", ["advise", "off"])
def test_advice_changes_nothing(tmp_path: Path, base: Any, recovery: str) -> None:
    run = make(tmp_path, base, recovery=recovery, precision="fp32")
    run.run()
    assert run.recovery.rate_factor == 1.0
    assert events(tmp_path, "intervention") == []
    assert bool(events(tmp_path, "incident")) == (recovery == "advise")


def test_beyond_the_budget_it_stops_and_says_what_was_tried(tmp_path: Path, base: Any) -> None:
    """N2: exit 3 with the culprit, after the rollbacks allowed."""
    run = make(tmp_path, base, max_rollbacks=1)
    with pytest.raises(NumericalStop, match="1 rollback did not help") as error:
        run.run()
    assert error.value.exit_code == 3
    assert "adapter" in error.value.problem
    assert "groups.adapter.peak_lr" in error.value.fix
    assert "graftlm autopsy" in error.value.fix
    assert events(tmp_path, "stopped")[-1]["text"] == error.value.problem
