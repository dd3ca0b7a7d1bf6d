"""Logs of ours and of others become the same records; what is no log is refused."""

import json
from pathlib import Path

import pytest
from logged_runs import good, rollback

from graftlm.errors import UserError
from graftlm.health.curves import diagnose_curves
from graftlm.health.logs import read_log

CONSOLE = """\
  0%|          | 1/300 [00:05<25:00,  5.0s/it]
[2023-08-01 10:00:00,000] [INFO] [loss_scaler.py:188:update_scale] [deepspeed] OVERFLOW! Rank 0 Skipping step. \
Attempted loss scale: 65536, but hysteresis is 2. Reducing hysteresis to 1
  1%|          | 2/300 [00:10<25:00,  5.0s/it]
[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, reducing to 32768
{'loss': 9.1402, 'grad_norm': nan, 'learning_rate': 0.0002, 'epoch': 0.01}
  3%|          | 10/300 [00:50<25:00,  5.0s/it]
{'loss': 7.5, 'learning_rate': 0.0001, 'epoch': 0.03}
{'eval_loss': 7.1, 'eval_runtime': 3.2, 'epoch': 0.03}
Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.
"""


def test_a_pasted_console_log(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text(CONSOLE, encoding="utf-8")
    log = read_log(path)
    assert [(r.step, r.loss) for r in log.records] == [(2, 9.1402), (10, 7.5)]
    assert log.scales == [(1, 65536.0), (2, 32768.0)]
    assert log.heldout == [(10, 7.1)]
    assert "already at minimum" in log.ending


def overflow(scale: float) -> str:
    return f"[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: {scale}, reducing to {scale / 2}\n"


def test_loss_lines_between_overflows_do_not_break_a_storm(tmp_path: Path) -> None:
    """Without a bar, lines are counted; DeepSpeed's reports say where the count stands."""
    path = tmp_path / "console.log"
    lines = [f"{{'loss': {9 - step / 10}, 'learning_rate': 1e-05}}\n" for step in range(20)]
    lines += ["[log_dist] [Rank 0] step=40, skipped=0, lr=[1e-05], mom=[(0.9, 0.999)]\n"]
    for part in range(5):
        lines += [overflow(2.0 ** (16 - 10 * part - bit)) for bit in range(10)]
        lines += ["{'loss': 0.0, 'learning_rate': 0.0002, 'epoch': 0.30}\n"]
    lines += ["Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.\n"]
    path.write_text("".join(lines), encoding="utf-8")
    log = read_log(path)
    assert [step for step, _ in log.scales] == list(range(41, 91))
    assert all(record.is_filtered and record.is_bad for record in log.records[-5:])
    findings, verdict = diagnose_curves(log)
    storm = next(finding for finding in findings if finding.cause == "overflow-storm")
    assert (verdict, storm.step) == ("crashed", 41)
    assert "50 steps in a row" in storm.evidence
    assert "from 32,768 to 5.82e-11, behind a loss of 7.10" in storm.evidence


def test_reports_of_deepspeed_alone(tmp_path: Path) -> None:
    """Loss reports are a curve; where every step between two reports was skipped, each of them was."""
    path = tmp_path / "console.txt"
    path.write_text("".join(f"steps: {n} loss: {10 / n:.4f} iter time (s): 0.5\n" for n in (10, 20, 30)))
    assert [(r.step, r.loss) for r in read_log(path).records] == [(10, 1.0), (20, 0.5), (30, 0.3333)]
    reports = [(10, 0), (20, 5), (30, 15), (40, 25)]
    path.write_text("".join(f"[Rank 0] step={n}, skipped={k}, lr=[0.0001], mom=[]\n" for n, k in reports))
    log = read_log(path)
    assert [r.step for r in log.records if r.skipped] == list(range(21, 41))
    assert "20 steps in a row overflowed, from step 21" in diagnose_curves(log)[0][0].evidence


@pytest.mark.parametrize("norm", [{}, {"grad_norm": float("nan")}])
def test_zeros_that_hide_a_loss_that_was_not_finite(tmp_path: Path, norm: dict[str, float]) -> None:
    """A run that ends in NaN has diverged, whatever HF Trainer prints; a loss learned down to zero has not."""
    path = tmp_path / "trainer_state.json"
    history = [{"step": step, "loss": 9.0 - step / 100, "grad_norm": 1.0} for step in range(1, 300)]
    history += [{"step": step, "loss": 0.0, **norm} for step in range(300, 600)]
    path.write_text(json.dumps({"log_history": history}), encoding="utf-8")
    findings, verdict = diagnose_curves(read_log(path))
    assert verdict == "diverged"
    assert findings[0].step == 300
    assert "HF Trainer prints 0.0" in findings[0].evidence
    learned = [{"step": step, "loss": round(9 * 0.9**step, 4)} for step in range(1, 300)]
    path.write_text(json.dumps({"log_history": learned}), encoding="utf-8")
    assert diagnose_curves(read_log(path)) == ([], "healthy")


def test_trainer_state(tmp_path: Path) -> None:
    history = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-4, "grad_norm": 1.5},
        {"step": 20, "eval_loss": 2.5},
        {"step": 20, "train_runtime": 3.0},
    ]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}), encoding="utf-8")
    log = read_log(path)
    assert [(r.step, r.loss, r.lr, r.grad_norm) for r in log.records] == [(10, 3.0, 1e-4, 1.5)]
    assert log.heldout == [(20, 2.5)]


def test_our_metrics(tmp_path: Path) -> None:
    step = {"event": "step", "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "loss_scale": 8.0, "skipped": True}
    lines = [{**step, "step": 1}, {"event": "heldout", "step": 1, "new": {"loss_per_answer_token": 1.75}}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st', encoding="utf-8")
    log = read_log(path)
    assert (log.records[0].loss, log.scales, log.heldout) == (2.0, [(1, 8.0)], [(1, 1.75)])


def test_csv_files_of_one_run_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "a.train.csv").write_text("step,loss,learning_rate\n1,9.0,0.1\n", encoding="utf-8")
    (tmp_path / "a.overflow.csv").write_text("step,scale_before,scale_after\n3,8,4\n", encoding="utf-8")
    log = read_log(tmp_path / "a.train.csv")
    assert (log.name, log.records[0].loss, log.scales, log.last_step) == ("a", 9.0, [(3, 4.0)], 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.log", b"nothing here\n"),
        ("x.csv", b"a,b\n1,2\n"),
        ("trainer_state.json", b"[]"),
        ("x.log", b"\xff\xfe\x00"),
        ("metrics.jsonl", b"\n"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_log(path)
    assert str(path) in refusal.value.problem
    assert refusal.value.fix


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no log"):
        read_log(tmp_path / "none.jsonl")


def test_a_log_that_says_zero_from_its_first_line_on_is_not_healthy(tmp_path: Path) -> None:
    """HF Trainer prints 0.0 for a loss that is not finite: so it is where every loss was, or where one says nan."""
    for name, first in (("zero", 0.0), ("nan", float("nan"))):
        path = tmp_path / name / "trainer_state.json"
        path.parent.mkdir()
        lines = [{"step": 1, "loss": first}, *({"step": step, "loss": 0.0} for step in range(2, 100))]
        path.write_text(json.dumps({"log_history": lines}), encoding="utf-8")
        findings, verdict = diagnose_curves(read_log(path))
        assert verdict not in ("healthy", "recovered")
        assert "HF Trainer prints 0.0" in findings[0].evidence


def test_a_log_that_ends_with_a_rollback_to_its_start_is_a_log(tmp_path: Path) -> None:
    """The moment at which a person asks: nothing of the run's own course is left for now."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*good(1, 5), rollback(0, 5)]), encoding="utf-8")
    log = read_log(path)
    assert (log.records, len(log.interventions), len(log.abandoned)) == ([], 1, 1)
