"""Logs of ours and of others become the same records; what is no log is refused."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
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
