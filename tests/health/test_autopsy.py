"""The autopsy: runs, stages and logs read, signs of one fault put together, the recipe's own lines to change."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from logged_runs import (
    RECIPE,
    climb,
    crashed,
    good,
    incident,
    recovered,
    rollback,
    step_line,
    write_json,
    write_run,
    write_stage,
)

from graftlm.errors import UserError
from graftlm.health.autopsy import autopsy
from graftlm.health.cures import Asked, recipe_lines
from graftlm.health.finding import alarms
from graftlm.health.logs import own_and_abandoned
from graftlm.health.rates import RateCuts
from graftlm.recipe_file import load_recipe
from graftlm.release.autopsy_page import state_in_words
from graftlm.run import RunFolder
from graftlm.text.dialogue import Rendered
from graftlm.text.rows import RowsBuilder
from graftlm.text.rows_file import save_rows
from graftlm.text.tokenizer import train_base_tokenizer

PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "reference" / "published-runs"
CONSOLE = """\
{'loss': 9.1402, 'grad_norm': 3.1, 'learning_rate': 0.0002, 'epoch': 0.01}
  3%|          | 10/300 [00:50<25:00,  5.0s/it]
[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 2, reducing to 1
  4%|          | 11/300 [00:55<25:00,  5.0s/it]
Traceback (most recent call last):
  File "train.py", line 5, in <module>
Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.
[2023-08-01 10:00:00,000] [ERROR] [launch.py:321:sigkill_handler] exits with return code = 1
"""


def alarm_causes(path: Path) -> list[str]:
    return [finding.cause for finding in alarms(told.finding for told in autopsy(path).diagnoses)]


def test_a_healthy_run_gives_no_alarm_whatever_its_state(tmp_path: Path) -> None:
    run = write_run(tmp_path, [good(1, 80), good(1, 60)])
    write_json(run / "4-lora" / "done.json", {})
    write_stage(run / "5-lora1", good(1, 60), tail='{"event": "step", "st')
    found = autopsy(run)
    assert (found.verdict, found.diagnoses, found.name, found.is_run) == ("healthy", [], "small", True)
    assert [(c.name, c.state, c.log.last_step) for c in found.courses] == [
        ("4-lora", "finished", 80),
        ("5-lora1", "unfinished", 60),
    ]


def test_lines_of_an_older_version_are_read(tmp_path: Path) -> None:
    newer = ("row_ids", "update_rms", "weight_rms", "zero_gradient_share")
    lines = [{key: value for key, value in line.items() if key not in newer} for line in good(1, 50)]
    assert autopsy(write_run(tmp_path, [lines])).verdict == "healthy"


def test_an_attempt_gone_back_from_is_evidence_and_not_the_runs_own_curve(tmp_path: Path) -> None:
    lines = [*good(1, 8), {"event": "heldout", "step": 8}, rollback(5, 8), *good(6, 7), rollback(3, 7, 2), *good(4, 9)]
    own, attempts = own_and_abandoned(lines)
    assert [line["step"] for line in own if line["event"] == "step"] == list(range(1, 10))
    assert [[line["step"] for line in attempt] for attempt in attempts] == [[6, 7, 8, 8], [4, 5, 6, 7]]
    assert [line["number"] for line in own if line["event"] == "intervention"] == [1, 2]

    found = autopsy(write_run(tmp_path, [recovered()]))
    log = found.courses[0].log
    assert [record.step for record in log.records] == list(range(1, 91))
    assert [record.step for record in log.abandoned[0]] == list(range(41, 47))
    assert found.verdict == "recovered"


def test_what_a_rollback_mended_is_a_warning_with_the_line_that_saves_it(tmp_path: Path) -> None:
    told = autopsy(write_run(tmp_path, [recovered()])).diagnoses
    assert [(d.finding.cause, d.finding.severity, d.finding.step, d.lines) for d in told] == [
        # The adapter has no rate of its own: the rollback cut all, and came through with that.
        ("loss-rose", "warning", 46, ("stages.lora.peak_lr=3e-05", "stages.lora.groups.new_rows.peak_lr=0.0001"))
    ]
    assert "adapter" in told[0].finding.evidence


def test_a_crash_is_one_finding_with_count_and_place_and_cut(tmp_path: Path) -> None:
    found = autopsy(write_run(tmp_path, [crashed()]))
    assert (found.verdict, found.courses[0].state) == ("crashed", "stopped")
    [told] = found.diagnoses
    assert (told.finding.cause, told.finding.severity, told.finding.step) == ("forward-overflow", "fatal", 21)
    assert (told.count, told.last_step) == (6, 23)
    assert told.finding.where == "model.layers.1.mlp.down_proj"
    for words in ("adapter", "Seen 6 times", "3 of the steps logged", "ended the run at step 23, after 2 rollbacks"):
        assert words in told.finding.evidence, words
    # Two cuts of all rates were not enough: the next run takes a tenth of what they had come to.
    assert told.lines == ("stages.lora.peak_lr=3e-07", "stages.lora.groups.new_rows.peak_lr=1e-06")
    assert "0.01 of the recipe's rates" in told.finding.cure


def test_where_one_roles_rate_was_cut_the_line_is_of_that_role_alone(tmp_path: Path) -> None:
    def cut(number: int) -> dict[str, Any]:
        return {**rollback(20, 30, number), "rate_factor": 1.0, "rate_factors": {"new_rows": 0.1**number}}

    blamed = incident(30, "loss-rose", module="", row_id=-1, token_id=-1, culprits=["new_rows"], loss=5.0, best=3.3)
    attempts = [*good(1, 20)]
    for number in (1, 2):
        attempts += [*climb(21, 30, 4, 7), blamed, cut(number)]
    mended = autopsy(write_run(tmp_path / "mended", [[*attempts, *good(21, 90)]]))
    assert (mended.verdict, mended.changes) == ("recovered", ["stages.lora.groups.new_rows.peak_lr=1e-05"])
    [told] = mended.diagnoses
    assert "It came through with the recipe's rates, the new rows at 0.01 of theirs." in told.finding.cure
    stop = {"event": "stopped", "step": 30, "text": "lora, step 30: the loss rose. 2 rollbacks did not help."}
    dead = autopsy(write_run(tmp_path / "dead", [[*attempts, *climb(21, 30, 4, 7), blamed, stop]]))
    # The new rows' own 1e-3 has come down to 1e-5, below the stage's 3e-4: now all are cut.
    assert dead.changes == ["stages.lora.peak_lr=3e-05", "stages.lora.groups.new_rows.peak_lr=1e-06"]


def test_a_mended_run_that_learned_nothing_did_not_recover(tmp_path: Path) -> None:
    def held(step: int, loss: float) -> dict[str, Any]:
        return {"event": "heldout", "step": step, "new": {"loss_per_answer_token": loss}}

    for last, verdict in ((8.9, "diverged"), (8.0, "recovered")):
        lines = [held(0, 8.8), *recovered(), held(90, last)]
        assert autopsy(write_run(tmp_path / verdict, [lines])).verdict == verdict


def test_damage_to_the_old_language_is_part_of_the_verdict(tmp_path: Path) -> None:
    def held(step: int, new: float, old: float) -> dict[str, Any]:
        told = {"new": {"loss_per_answer_token": new}, "old": {"loss_per_answer_token": old}}
        return {"event": "heldout", "step": step, **told}

    found = {}
    for name, lines in {"mended": recovered(), "well": good(1, 90)}.items():
        for old in (3.5, 9.0):
            run = write_run(tmp_path / f"{name}{old}", [[held(0, 8.8, 3.2), *lines, held(90, 4.0, old)]])
            found[name, old] = autopsy(run)
    verdicts = {key: one.verdict for key, one in found.items()}
    assert verdicts == {
        ("mended", 3.5): "recovered", ("mended", 9.0): "damaged", ("well", 3.5): "healthy", ("well", 9.0): "healthy",
    }  # fmt: skip
    told = {key for key, one in found.items() if "old language ended far above its start" in one.told}
    assert told == {("mended", 9.0), ("well", 9.0)}
    [lost] = [d.finding for d in found["well", 9.0].diagnoses]
    assert (lost.cause, lost.severity, lost.step) == ("old-language-lost", "note", 90)  # its price, no alarm
    assert "3.20" in lost.evidence
    assert "9.00" in lost.evidence


@pytest.mark.parametrize("num_good", [3, 12])
def test_a_run_still_going_is_not_called_recovered_while_it_is_in_trouble(tmp_path: Path, num_good: int) -> None:
    bad = [step_line(n, math.nan, skipped=True) for n in range(21, 25)]
    storm = [*good(1, 20), *bad, incident(23, "forward-overflow", culprits=["adapter"])]
    back = [*storm, rollback(15, 24), *good(16, 15 + num_good)]
    one_bad_row = [*good(1, 20), bad[0], incident(21, "forward-not-finite", bad_rows=[1], num_rows=8)]
    long_storm = [*good(1, 20), *(step_line(n, math.nan, skipped=True) for n in range(21, 60))]
    expected = {"storm": "damaged", "back": "recovered" if num_good > 10 else "damaged", "one_bad_row": "recovered",
                "long_storm": "damaged"}  # fmt: skip
    runs = {"storm": storm, "back": back, "one_bad_row": one_bad_row, "long_storm": long_storm}
    for name, lines in runs.items():
        found = autopsy(write_run(tmp_path / name, [lines]))
        assert found.verdict == expected[name], name
        assert ("in trouble at its last step" in found.told) == (expected[name] == "damaged"), name
    write_json(tmp_path / "back" / "4-lora" / "done.json", {})
    assert autopsy(tmp_path / "back").verdict == "recovered"  # it came to its end


def test_a_stop_that_was_gone_on_from_is_no_end(tmp_path: Path) -> None:
    found = autopsy(write_run(tmp_path, [[*crashed(), rollback(20, 23, 3), *good(21, 80)]]))
    assert (found.verdict, found.courses[0].log.ending) == ("recovered", "")


@pytest.mark.parametrize(("end", "verdict"), [(12.0, "diverged"), (6.0, "damaged")])
def test_damage_nobody_mended_is_judged_by_its_end(tmp_path: Path, end: float, verdict: str) -> None:
    lines = [*good(1, 60), *climb(61, 90, 3, end), *climb(91, 110, end, end)]
    lines.insert(75, incident(75, "loss-rose", culprits=["new_rows"], loss=4.0, best=2.5))
    found = autopsy(write_run(tmp_path, [lines]))
    assert found.verdict == verdict
    [told] = [d for d in found.diagnoses if d.finding.severity == "fatal"]
    assert (told.finding.cause, told.finding.step) == ("loss-rose", 75)
    assert f"ended at {end:.2f}" in told.finding.evidence  # of the curve, behind what the incident says
    assert told.lines == ("stages.lora.groups.new_rows.peak_lr=0.0001",)


def test_bad_rows_are_named_by_token_text_and_file_and_line(tmp_path: Path) -> None:
    tokenizer = train_base_tokenizer(["one two three", "four five six"], 300)
    tokenizer.save(tmp_path / "1-tokenizer")
    builder = RowsBuilder(tokenizer.num_pieces)
    for number in range(3):
        builder.add(Rendered([1, 290], [False, True], 3), f"rows.jsonl:{number + 7}")
    save_rows(builder.rows(), tmp_path / "3-data" / "train")
    bad = incident(9, "forward-not-finite", token_id=290, is_new_token=True, bad_rows=[2], num_rows=8)
    found = autopsy(write_run(tmp_path, [[*good(1, 8), step_line(9, math.nan, skipped=True), bad, *good(10, 60)]]))
    [told] = [d for d in found.diagnoses if d.finding.cause == "forward-not-finite"]
    assert repr(tokenizer.decode_continuation([290])) in told.finding.evidence
    assert "row 2 is rows.jsonl:9" in told.finding.evidence.lower()
    assert told.lines == ("grow.embedding=subpiece-mean", "grow.head=subpiece-mean-norm")
    assert found.verdict == "recovered"  # the step was skipped, nothing was harmed


def test_benign_overflows_are_a_note_and_the_run_healthy(tmp_path: Path) -> None:
    lines = good(1, 60)
    for n in (2, 3, 4):
        lines[n - 1] = step_line(n, 8.5, skipped=True)
    lines[4:4] = [incident(n, "scale-too-high") for n in (2, 4)]
    found = autopsy(write_run(tmp_path, [lines]))
    assert found.verdict == "healthy"
    assert [(d.finding.severity, d.count, d.lines) for d in found.diagnoses] == [("note", 2, ())]


def test_a_storm_that_the_scale_alone_caused_is_not_told_with_a_lower_rate(tmp_path: Path) -> None:
    """No step touched a weight: whatever the rate was, it did nothing."""
    lines = [step_line(n, 9.0, skipped=True, scale=2.0 ** (43 - n)) for n in range(1, 24)]
    lines[3:3] = [incident(n, "scale-too-high", phase="backward") for n in (1, 2, 3)]
    text = "lora: each of its 23 steps had gradients that are not finite; nothing was learned (loss scale 1e+06)."
    found = autopsy(write_run(tmp_path, [[*lines, {"event": "stopped", "step": 23, "text": text}]]))
    assert found.verdict == "crashed"
    assert [d.finding.cause for d in found.diagnoses] == ["scale-starts-too-high", "scale-too-high"]
    assert "23 steps in a row overflowed" in found.diagnoses[1].finding.evidence
    assert not any("peak_lr" in line for line in found.changes)


def preflight_finding(**values: Any) -> dict[str, Any]:
    given = {"cause": "no-forward-headroom", "severity": "fatal", "where": "layer 3", "step": None,
             "evidence": "It lies above.", "cure": "Set precision."}  # fmt: skip
    return {**given, **values}


def test_a_stage_refused_by_its_pre_flight_crashed_before_its_first_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, [good(1, 50), []])
    write_json(run / "5-lora1" / "preflight.json", {"findings": [preflight_finding()], "look": {"lora_factor": 0.5}})
    (run / "5-lora1" / "metrics.jsonl").unlink()
    found = autopsy(run)
    assert found.verdict == "crashed"
    assert [(c.verdict, c.state) for c in found.courses] == [("healthy", "unfinished"), ("crashed", "stopped")]
    assert [(d.stage, d.finding.step, d.lines) for d in found.diagnoses] == [
        ("5-lora1", None, ("stages.lora1.precision=fp32",))
    ]


def test_findings_are_told_gravest_first_and_one_line_a_knob(tmp_path: Path) -> None:
    run = write_run(tmp_path, [[*good(1, 60), *climb(61, 110, 3, 12)], good(1, 50)])
    pushed = preflight_finding(cause="adapter-push-high", severity="warning")
    tiny = preflight_finding(cause="tiny-new-rows", severity="note", where="new rows of the embedding")
    write_json(run / "4-lora" / "preflight.json", {"findings": [pushed, tiny], "look": {"lora_factor": 4.0}})
    found = autopsy(run)
    assert [d.finding.severity for d in found.diagnoses] == ["fatal", "warning", "note"]
    assert found.changes == [
        "stages.lora.peak_lr=3e-05",
        "stages.lora.groups.new_rows.peak_lr=0.0001",
        "stages.lora.groups.adapter.peak_lr=5e-05",
    ]


def test_what_a_run_came_through_with_outweighs_what_pre_flight_would_take(tmp_path: Path) -> None:
    blamed = incident(46, "loss-rose", module="", row_id=-1, token_id=-1, culprits=["adapter", "new_rows"], loss=5.0)
    cut = {**rollback(40, 46), "rate_factor": 1.0, "rate_factors": {"new_rows": 0.3}}
    run = write_run(tmp_path, [[*good(1, 40), *climb(41, 46, 4, 7), blamed, cut, *good(41, 90)]])
    pushed = preflight_finding(cause="adapter-push-high", severity="warning")
    write_json(run / "4-lora" / "preflight.json", {"findings": [pushed], "look": {"lora_factor": 4.0}})
    found = autopsy(run)
    # The group that was cut, hot by a rate of its own, is named first and alone in the line.
    assert found.changes == ["stages.lora.groups.new_rows.peak_lr=0.0003", "stages.lora.groups.adapter.peak_lr=5e-05"]
    told = next(d for d in found.diagnoses if d.finding.cause == "loss-rose")
    assert "the new rows of embedding and head or the adapter alone" in told.finding.evidence
    assert told.finding.cure.startswith("Lower peak_lr (groups.new_rows.peak_lr")
    cut["rate_factors"] = {"adapter": 0.3}
    recipe = {**RECIPE, "stages": []}
    run = write_run(tmp_path / "own", [[*good(1, 40), *climb(41, 46, 4, 7), blamed, cut, *good(41, 90)]], recipe)
    asked = json.loads((run / "recipe.json").read_text())
    asked["recipe"]["stages"][0]["groups"] = {"adapter": {"peak_lr": 1e-2}}
    write_json(run / "recipe.json", asked)
    write_json(run / "4-lora" / "preflight.json", {"findings": [pushed], "look": {"lora_factor": 4.0}})
    assert autopsy(run).changes == ["stages.lora.groups.adapter.peak_lr=0.003"]


def test_a_run_that_goes_on_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path, [good(1, 50)])
    (run / "4-lora" / "done.json").unlink(missing_ok=True)
    assert autopsy(run).courses[0].is_running is None  # there is no lock
    with RunFolder(run, "small"):
        assert autopsy(run).courses[0].is_running
        assert "it is running" in state_in_words(autopsy(run).courses[0])
    assert "interrupted or killed" in state_in_words(autopsy(run).courses[0])


def test_of_two_rates_the_lower_is_proposed(tmp_path: Path) -> None:
    """Pre-flight knew that a tenth of the rate would not do; a stage that came through with a rate proves that one."""
    foreseen = preflight_finding(cause="rate-too-high", where="body", severity="warning")
    look = {"findings": [foreseen], "look": {"roles": {"body": {"weight_rms": 0.05}}}}
    lines = [*good(1, 20), *climb(21, 60, 4, 9)]
    run = write_run(tmp_path, [lines])
    write_json(run / "4-lora" / "preflight.json", look)
    asked = json.loads((run / "recipe.json").read_text())
    asked["recipe"]["stages"][0]["peak_lr"] = 3.0
    write_json(run / "recipe.json", asked)
    assert autopsy(run).verdict == "damaged"
    assert autopsy(run).changes[0] == "stages.lora.peak_lr=0.005"
    blamed = incident(46, "loss-rose", module="", row_id=-1, token_id=-1, culprits=["body"], loss=5.0)
    mended = write_run(
        tmp_path / "mended", [[*good(1, 40), *climb(41, 46, 4, 7), blamed, rollback(40, 46), *good(41, 90)]]
    )
    write_json(mended / "4-lora" / "preflight.json", look)
    write_json(mended / "recipe.json", asked)
    assert autopsy(mended).verdict == "recovered"
    assert autopsy(mended).changes[0] == "stages.lora.peak_lr=0.3"


@pytest.mark.parametrize(
    ("cause", "asked", "more", "lines"),
    [
        ("ratchet", {"peak_lr": 1.0}, {}, ["stages.s.peak_lr=0.1"]),
        (
            "forward-overflow",
            {"peak_lr": 1.0, "groups": {"body": {"peak_lr": 2.0}, "adapter": {"peak_lr": 3.0}}},
            {"cuts": RateCuts(1.0, {"body": 0.3})},
            ["stages.s.groups.body.peak_lr=0.6"],
        ),
        ("not-finite", {}, {}, []),
        ("forward-not-finite", {"peak_lr": 1.0}, {"is_start": True}, ["grow.embedding=subpiece-mean"]),
        ("huge-new-rows", {}, {"where": "new rows of the embedding"}, ["grow.embedding=subpiece-mean"]),
        ("tiny-new-rows", {}, {"where": "new rows of the head"}, []),
        ("no-forward-headroom", {}, {}, ["stages.s.precision=fp32"]),
        ("eps-underflow", {}, {}, ["stages.s.eps=1e-06"]),
        ("scale-starts-too-high", {"loss_scale": {"initial": 1e13}}, {}, ["stages.s.loss_scale.initial=65536"]),
        ("scale-starts-too-high", {"loss_scale": {"initial": 1024.0}}, {}, []),
        ("adapter-push-high", {}, {"lora_factor": 8.0}, ["stages.s.groups.adapter.peak_lr=2.5e-05"]),
        ("over-fitted", {"keep": "last"}, {}, ["stages.s.keep=best"]),
        ("over-fitted", {"keep": "best"}, {}, []),
        ("empty-labels", {"peak_lr": 1.0}, {}, []),
        ("out-of-memory", {"peak_lr": 1.0}, {}, []),
    ],
)
def test_each_cause_has_its_knob(cause: str, asked: dict[str, Any], more: dict[str, Any], lines: list[str]) -> None:
    stage = Asked("stages.s", asked, {"embedding": "normal"})
    assert list(recipe_lines(cause, stage, **more)) == lines


def test_the_lines_are_overrides_a_recipe_takes(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    recipe = load_recipe(demo)
    stage = recipe.stages[-1]
    asked = Asked(f"stages.{stage.name}", stage.model_dump(mode="json"), recipe.grow.model_dump(mode="json"))
    causes = ("loss-rose", "huge-new-rows", "no-forward-headroom", "eps-underflow", "adapter-push-high")
    lines = [line for cause in causes for line in recipe_lines(cause, asked, lora_factor=2.0)]
    changed = load_recipe(demo, lines)
    assert changed.stages[-1].peak_lr == pytest.approx(0.1 * stage.peak_lr)
    assert changed.stages[-1].groups.adapter.peak_lr == pytest.approx(1e-4)
    assert (changed.stages[-1].eps, changed.stages[-1].precision) == (1e-6, "fp32")


def test_a_stage_and_its_bare_metrics_know_the_run_around_them(tmp_path: Path) -> None:
    stage = write_run(tmp_path / "run", [crashed()]) / "4-lora"
    for path in (stage, stage / "metrics.jsonl"):
        found = autopsy(path)
        assert (found.verdict, found.is_run, bool(found.changes)) == ("crashed", False, True)
    alone = write_stage(tmp_path / "copied", crashed())
    found = autopsy(alone / "metrics.jsonl")
    assert (found.verdict, [d.finding.cause for d in found.diagnoses], found.changes) == (
        "crashed", ["forward-overflow"], [],
    )  # fmt: skip


def test_the_scratch_base_of_a_run_is_a_stage_of_its_own(tmp_path: Path) -> None:
    base = {"model": None, "scratch": {"training": {"peak_lr": 1.0}}}
    run = write_run(tmp_path, [good(1, 30)], {**RECIPE, "base": base})
    write_stage(run / "0-scratch", [*good(1, 60), *climb(61, 110, 3, 12)])
    found = autopsy(run)
    assert [course.name for course in found.courses] == ["0-scratch", "4-lora"]
    assert found.changes == ["base.scratch.training.peak_lr=0.1"]


def test_a_pasted_deepspeed_log_that_ends_at_the_floor_crashed(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text(CONSOLE, encoding="utf-8")
    found = autopsy(path)
    assert found.verdict == "crashed"
    assert [(d.finding.cause, d.finding.severity, d.finding.step) for d in found.diagnoses] == [
        ("scale-at-floor", "fatal", 10)
    ]


def test_the_folder_of_a_checkpoint_of_hf_trainer_is_read(tmp_path: Path) -> None:
    history = [{"step": n, "loss": 3.0 - n / 100, "grad_norm": 1.0} for n in range(10, 100, 10)]
    write_json(tmp_path / "trainer_state.json", {"log_history": history})
    assert autopsy(tmp_path).verdict == "healthy"


@pytest.mark.parametrize("name", ["base-full", "base-lora", "chat-lora", "chat-lora-100steps-scale-collapse"])
def test_the_four_published_runs_are_healthy(name: str) -> None:
    path = PUBLISHED / f"{name}{'' if 'collapse' in name else '-3epoch'}.train.csv"
    if not path.is_file():
        pytest.skip("the published curves are not here")
    assert (autopsy(path).verdict, alarm_causes(path)) == ("healthy", [])


def test_health_json_is_json_to_anyone(tmp_path: Path) -> None:
    told = autopsy(write_run(tmp_path, [crashed()])).to_json()
    text = json.dumps(told, allow_nan=False)
    assert {"findings", "verdict"} <= json.loads(text).keys()
    assert {"cause", "where", "step", "evidence", "cure"} <= told["findings"][0].keys()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none", None),
        ("empty/", None),
        ("foreign/recipe.json", b'{"ingredients": ["flour"]}'),
        ("untrained/recipe.json", json.dumps({"recipe": RECIPE}).encode()),
        ("empty.log", b""),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b'{"event": "step", "step": 1}\n'),
        ("binary.log", b"\x7fELF\xff\xfe\x00" * 9),
        ("prices.csv", b"step,price\n1,2\n"),
        ("prices.csv", b"date,loss\n2024-01-01,3\n"),
        ("trainer_state.json", b'{"a": 1}'),
    ],
)
def test_what_is_no_run_and_no_log_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    given = path.parent if path.name == "recipe.json" else path
    with pytest.raises(UserError) as refusal:
        autopsy(given)
    assert str(given) in refusal.value.problem
    assert refusal.value.fix


def test_a_line_cut_inside_a_character_does_not_hide_the_rest(tmp_path: Path) -> None:
    stage = write_stage(tmp_path, good(1, 20))
    with (stage / "metrics.jsonl").open("ab") as stream:
        stream.write('{"event": "note", "text": "好'.encode()[:-1])
    assert autopsy(stage / "metrics.jsonl").courses[0].log.last_step == 20
