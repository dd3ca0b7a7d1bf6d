"""Training as the waiting person sees it: a line every ten seconds without a terminal, a bar with one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from graftlm import run as run_module
from graftlm.training import show as show_module
from graftlm.training.loop import StepRecord
from graftlm.training.show import steps_shown

RECORD = StepRecord(
    step=1, num_updates=1, loss=4.0, lr=1e-3, grad_norm=1.0, grad_norms={}, loss_scale=1.0, skipped=False,
    num_rows=4, num_tokens=600, num_targets=50, seconds=0.1, row_ids=[0, 1, 2, 3],
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time both modules read, and nobody else: a server's loop in another thread lives by the same `time`."""
    now = [0.0]
    for module in (run_module, show_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_line_every_ten_seconds_tells_loss_speed_and_time_left(clock, capsys) -> None:
    """Resumed at step 10: the time left is judged by the steps taken since."""
    with steps_shown("full", 100, 10) as see:
        for step in range(11, 21):
            clock[0] += 6
            see(replace(RECORD, step=step, num_updates=step))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "full: 12/100, loss 4.000, 100 tokens/s, 8 min 48 s left"
    assert len(lines) == 5


def test_the_loss_shown_is_smoothed_and_skipped_steps_are_only_counted(clock, capsys) -> None:
    with steps_shown("lora", 4, 0) as see:
        see(RECORD)
        see(replace(RECORD, step=2, loss=float("nan"), skipped=True))
        clock[0] += 20
        see(replace(RECORD, step=3, num_updates=2, loss=3.0))
    assert capsys.readouterr().err == "lora: 3/4, loss 3.900, 90 tokens/s, 1 skipped, 10 s left\n"


def test_in_a_terminal_it_is_a_bar_that_leaves_nothing_behind(monkeypatch, capsys) -> None:
    """Also with another bar (held-out rows) inside."""
    monkeypatch.setattr(run_module.sys.stderr, "isatty", lambda: True, raising=False)
    run_module._bars.cache_clear()
    with steps_shown("full", 2, 0) as see:
        see(RECORD)
        (task,) = run_module._bars().tasks
        assert (task.description, task.completed, task.total) == ("full", 1, 2)
        assert "loss 4.000" in task.fields["note"]
        for _ in run_module.progress("ab", 2, "held-out"):
            assert [task.description for task in run_module._bars().tasks] == ["full", "held-out"]
    assert not run_module._bars().tasks
    assert not run_module._bars().live.is_started
    run_module._bars.cache_clear()
