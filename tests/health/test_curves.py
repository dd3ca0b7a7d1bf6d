"""Curves alone tell a storm, a ratchet, a crash and a rise of the loss, and say nothing of healthy runs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graftlm.health.curves import diagnose_curves
from graftlm.health.finding import alarms
from graftlm.health.logs import read_log
from graftlm.health.records import LogRecord, RunLog

PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "reference" / "published-runs"


def healthy(seed: int = 0, num_steps: int = 400, noise: float = 0.15) -> RunLog:
    """A loss that falls from 9 to 2 with noise, and a scale that calibrates, then overflows once a window."""
    dice = np.random.default_rng(seed)
    log = RunLog("healthy")
    for step in range(1, num_steps + 1):
        loss = 2 + 7 * math.exp(-step / 60) + noise * dice.standard_normal()
        log.records.append(LogRecord(step, float(loss), 1e-3, 1.0, 65536.0))
    calibrating = [(step, 2.0 ** (16 - step)) for step in range(1, 8)]
    log.scales = [*calibrating, *((step, 512.0 * (1 + step % 200 // 100)) for step in range(110, num_steps, 100))]
    return log


@pytest.mark.parametrize("seed", range(10))
def test_healthy_runs_raise_no_alarm(seed: int) -> None:
    findings, verdict = diagnose_curves(healthy(seed))
    assert (alarms(findings), verdict) == ([], "healthy")


@pytest.mark.parametrize("name", ["base-full", "base-lora", "chat-lora", "chat-lora-100steps-scale-collapse"])
def test_the_four_published_runs_raise_no_alarm(name: str) -> None:
    path = PUBLISHED / f"{name}{'' if 'collapse' in name else '-3epoch'}.train.csv"
    if not path.is_file():
        pytest.skip("the published curves are not here")
    log = read_log(path)
    findings, verdict = diagnose_curves(log)
    assert log.records
    assert log.scales
    assert log.heldout
    assert (alarms(findings), verdict) == ([], "healthy")


def test_over_fitting_nobody_noticed_is_noted() -> None:
    log = healthy()
    log.heldout = [(100, 2.1), (200, 1.9), (300, 2.0), (400, 2.3)]
    findings, verdict = diagnose_curves(log)
    assert [(f.cause, f.step, f.severity) for f in findings] == [("over-fitted", 200, "note")]
    assert verdict == "healthy"


@pytest.mark.parametrize(("first", "verdict"), [(366, "crashed"), (210, "recovered")])
def test_a_storm_is_named_with_its_first_step_and_is_the_end_if_nothing_follows(first: int, verdict: str) -> None:
    log = healthy()
    log.scales += [(step, 1.0) for step in range(first, first + 35)]
    findings, found = diagnose_curves(log)
    storm = next(f for f in findings if f.cause == "overflow-storm")
    assert (storm.step, found) == (first, verdict)


def test_a_ratchet_is_a_scale_that_never_rises_again() -> None:
    log = healthy()
    log.scales += [(step, 2.0 ** (9 - (step - 100) // 15)) for step in range(115, 400, 15)]
    findings, _ = diagnose_curves(log)
    assert "ratchet" in {f.cause for f in findings}


@pytest.mark.parametrize(("end", "verdict"), [(9.5, "diverged"), (5.0, "damaged"), (2.0, "recovered")])
def test_a_rise_is_judged_by_where_it_ends(end: float, verdict: str) -> None:
    log = healthy()
    climb = [LogRecord(400 + k, 2.0 + 0.2 * k) for k in range(1, 38)]
    log.records += [*climb, *(LogRecord(437 + k, end) for k in range(1, 30))]
    findings, found = diagnose_curves(log)
    assert [f.cause for f in alarms(findings)] == ["loss-rose"]
    assert found == verdict


def test_a_loss_that_is_not_finite_is_told_with_its_step() -> None:
    log = healthy()
    log.records[250] = LogRecord(251, math.nan)
    findings, _ = diagnose_curves(log)
    assert [(f.cause, f.step, f.severity) for f in findings] == [("loss-not-finite", 251, "warning")]


def test_a_rise_of_harder_rows_is_no_alarm_where_held_out_loss_fell_all_the_same() -> None:
    log = healthy()
    log.records = [replace(r, loss=(r.loss or 0) + (2.5 if 300 < r.step < 340 else 0.0)) for r in log.records]
    assert diagnose_curves(log)[1] == "recovered"
    log.heldout = [(0, 9.0), (290, 2.2), (400, 2.1)]
    findings, verdict = diagnose_curves(log)
    assert ([f.severity for f in findings if f.cause == "loss-rose"], verdict) == (["note"], "healthy")
    log.heldout = [(0, 9.0), (290, 2.2), (400, 2.3)]
    assert diagnose_curves(log)[1] == "recovered"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Exception: Current loss scale already at minimum - cannot decrease scale anymore.", "scale-at-floor"),
        ("ValueError: Attempting to unscale FP16 gradients.", "no-fp32-master"),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "out-of-memory"),
        ("full, step 7: 3 steps in a row were not finite, and no loss scale helps.", "not-finite"),
        ("KeyError: 'instruction'", "stopped"),
    ],
)
def test_last_words_are_understood(said: str, cause: str) -> None:
    log = healthy()
    log.ending = said
    findings, verdict = diagnose_curves(log)
    assert [(f.cause, f.evidence, f.severity) for f in findings] == [(cause, said, "fatal")]
    assert verdict == "crashed"


def test_a_run_that_ended_by_itself_crashed() -> None:
    log = healthy()
    log.ending = "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    findings, verdict = diagnose_curves(log)
    assert findings[-1].cause == "scale-at-floor"
    assert verdict == "crashed"


def test_a_harmless_static_scale_is_no_alarm() -> None:
    log = healthy()
    log.records = [LogRecord(r.step, r.loss, r.lr, r.grad_norm, 2.0**-6) for r in log.records]
    log.scales = []
    assert diagnose_curves(log) == ([], "healthy")


def test_a_stage_too_short_for_its_scale_to_come_down_is_not_cured_by_its_rate() -> None:
    ending = "a: each of its 15 steps had gradients that are not finite; nothing was learned (loss scale 3.05e+08)."
    found, verdict = diagnose_curves(RunLog("a", ending=ending))
    assert [(one.cause, one.where) for one in found] == [("scale-starts-too-high", "loss_scale.initial")]
    assert found[0].cure.startswith("Lower loss_scale.initial")
    assert verdict == "crashed"
