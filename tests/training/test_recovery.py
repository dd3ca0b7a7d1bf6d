"""Recovery: what goes wrong is mended within a budget, written down, and resumes exactly; advice changes nothing."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import FIRST_NEW_ID, LORA_ALL, spoken_rows, stage_of, weights_sha256

from graftlm.errors import NumericalStop
from graftlm.health.autopsy import autopsy
from graftlm.health.incident import HOPELESS, Incident, finding_of
from graftlm.health.rates import RATE_CUT, RateCuts, rate_cuts_of
from graftlm.release.autopsy_page import autopsy_page
from graftlm.run import read_metrics, write_json
from graftlm.training.checkpoint import good_checkpoints, save_checkpoint, step_folder
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
    # The adapter is to blame and has a rate of its own: it is cut, and nothing else is.
    assert [line["rate_factors"]["adapter"] for line in told] == pytest.approx(
        [RATE_CUT**n for n in range(1, len(told) + 1)]
    )
    assert [(line["rate_factor"], line["cut"]) for line in told] == [(1.0, ["adapter"])] * len(told)
    assert all("cut for the adapter to 0." in line["text"] for line in told)
    shares = {group["role"]: group["peak_lr"] / group["asked_lr"] for group in run.optimizer.param_groups}
    assert shares == pytest.approx({"adapter": RATE_CUT ** len(told), "old_rows": 1.0, "new_rows": 1.0})
    assert all("Rolled back to step" in line["text"] and "adapter" in line["text"] for line in told)
    steps = events(tmp_path, "step")
    assert steps[-1]["step"] == 48
    assert steps[-1]["loss"] < 2  # it began at about 0.4 and knows nothing at 3.9
    assert max(line["lr"] for line in steps[-40:]) <= 3.0 * RATE_CUT * 1.001


def test_without_rates_of_their_own_all_are_cut_alike(tmp_path: Path, base: Any) -> None:
    run = make(tmp_path, base, groups={}, peak_lr=3.0)
    run.run()
    told = events(tmp_path, "intervention")
    assert told
    assert [line["rate_factor"] for line in told] == pytest.approx([RATE_CUT**n for n in range(1, len(told) + 1)])
    assert [(line["rate_factors"], line["cut"]) for line in told] == [({}, ["all"])] * len(told)
    assert "the learning rate is 0.1 of the recipe's from there on." in told[0]["text"]
    assert all(group["peak_lr"] == group["asked_lr"] for group in run.optimizer.param_groups)


def test_whose_rate_is_cut() -> None:
    """A blamed role that learns faster than the stage alone, until it does no more; else everybody."""
    own = {"adapter": None, "body": None, "old_rows": 1e-4, "new_rows": 2e-2}
    cuts = [RateCuts()]
    for _ in range(3):
        cuts.append(cuts[-1].cut(["new_rows", "adapter", "old_rows"], 3e-4, own))
    assert [one.of_roles.get("new_rows") for one in cuts[1:]] == pytest.approx([RATE_CUT, RATE_CUT**2, RATE_CUT**2])
    assert [one.of_all for one in cuts] == [1.0, 1.0, 1.0, RATE_CUT]
    assert cuts[3].of("new_rows") == pytest.approx(RATE_CUT**3)
    assert cuts[3].roles_cut_since(cuts[2]) == ["all"]
    assert cuts[2].roles_cut_since(cuts[1]) == ["new_rows"]
    assert RateCuts().cut([], 3e-4, own) == RateCuts().cut(["adapter", "old_rows"], 3e-4, own) == RateCuts(RATE_CUT)
    assert rate_cuts_of(json.loads(json.dumps(cuts[3].state()))) == cuts[3]
    assert rate_cuts_of({"rate_factor": 0.09}) == RateCuts(0.09)  # as earlier versions wrote it


def test_what_was_rolled_back_leaves_no_trace(tmp_path: Path, base: Any) -> None:
    """Back at the start with a tenth of the rate it is the run that began with a tenth: moments are forgotten too."""
    run = make(tmp_path / "mended", base, precision="fp32", epochs=3)
    run.run()
    told = events(tmp_path / "mended", "intervention")
    assert told
    assert {line["step"] for line in told} == {0}
    knobs = {"groups": {"adapter": {"peak_lr": 3.0 * run.recovery.rates.of("adapter")}}}
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
    told = events(tmp_path, "intervention")
    assert [line["rate_factor"] for line in told] == pytest.approx([RATE_CUT, RATE_CUT, RATE_CUT**2])
    assert [line["cut"] for line in told] == [["all"], [], ["all"]]  # the state was to blame, not the rate cut for it
    assert "Rolled back to step 0, since the later state was no good either;" in told[1]["text"]


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
    assert run.recovery.rates == RateCuts()
    assert events(tmp_path, "intervention") == []
    assert bool(events(tmp_path, "incident")) == (recovery == "advise")


def test_advice_blames_the_rate_and_not_the_start_of_rows_that_began_well(tmp_path: Path, base: Any) -> None:
    """The state before the first step is kept to tell the two apart."""
    folder = tmp_path / "run" / "4-sft"
    folder.mkdir(parents=True)
    run = make(folder, base, recovery="advise", groups={}, peak_lr=3.0)
    with contextlib.suppress(NumericalStop):
        run.run()
    hopeless = [line for line in events(folder, "incident") if line["cause"] in HOPELESS]
    assert hopeless
    assert all(line["culprits"] and not line["bad_from_start"] for line in hopeless)
    stage = {**run.stage.model_dump(mode="json"), "name": "sft"}
    grow = {"embedding": "normal", "head": "normal"}
    write_json(tmp_path / "run" / "recipe.json", {"recipe": {"name": "r", "stages": [stage], "grow": grow}})
    changes = autopsy(tmp_path / "run").changes
    assert "stages.sft.peak_lr=0.02" in changes
    assert not [line for line in changes if line.startswith("grow.")]


@pytest.mark.parametrize(
    ("bad_from_start", "has_good", "cure"),
    [
        (("new_rows",), True, "grow.embedding"),
        (("new_rows",), False, "groups.new_rows.peak_lr"),
        (("adapter",), True, "groups.adapter.peak_lr"),
        (("adapter",), False, "groups.adapter.peak_lr"),
    ],
)
def test_only_new_rows_can_have_begun_badly(bad_from_start: tuple[str, ...], has_good: bool, cure: str) -> None:
    found = finding_of(Incident(7, "forward-overflow", 1.0, bad_from_start=bad_from_start, has_good=has_good))
    assert cure in found.cure
    assert ("the last good state does not" in found.evidence) == has_good


@pytest.mark.parametrize("recovery", ["automatic", "advise", "off"])
def test_what_a_stop_leaves_a_good_state_and_the_rows_it_failed_on(tmp_path: Path, base: Any, recovery: str) -> None:
    """Checkpoints from inside the storm push no good one out."""
    scale = {"initial": 2.0**16, "floor": 2.0**4}
    folder = tmp_path / "run" / "4-sft"
    folder.mkdir(parents=True)
    run = make(folder, base, recovery=recovery, max_rollbacks=1, checkpoint_every=2, loss_scale=scale, peak_lr=1e-5,
               groups={}, schedule="constant", epochs=12)  # fmt: skip
    see = run.recovery.see

    def poisoned_later(record: StepRecord) -> None:
        see(record)
        if record.step == 15:
            with torch.no_grad():  # finite itself; what it makes of fp16 is not
                next(p for n, p in run.model.named_parameters() if "layers.0.mlp.up_proj.lora_B" in n).fill_(1e6)

    run.recovery.see = poisoned_later  # type: ignore[method-assign]
    with pytest.raises(NumericalStop):
        run.run()
    good = good_checkpoints(run.checkpoints)
    assert good
    assert good[-1].name == "step-00000014"
    write_json(tmp_path / "run" / "recipe.json", {"recipe": {"name": "r", "stages": [{"name": "sft"}]}})
    found = autopsy(tmp_path / "run")
    told = found.to_json()
    assert told["stages"][0]["good_checkpoint"] == "4-sft/checkpoints/step-00000014"
    assert "last good state is kept: 4-sft/checkpoints/step-00000014" in autopsy_page(found)
    if recovery == "off":
        return
    grave = next(f for f in told["findings"] if f["cause"] == "forward-overflow")
    assert sorted(grave["row_ids"]) == sorted(run.steps.row_ids(grave["step"] - 1))
    assert grave["batch_file"] in autopsy_page(found)
    kept = [json.loads(line) for line in (tmp_path / "run" / grave["batch_file"]).read_text().splitlines()]
    assert [row["row_id"] for row in kept] == grave["row_ids"]
    ids, is_target = run.steps.rows.row(kept[3]["row_id"])
    assert (kept[3]["ids"], kept[3]["is_target"]) == (ids.tolist(), is_target.astype(int).tolist())


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
