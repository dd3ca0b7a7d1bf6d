"""A stage killed at random moments, most of them while a thread writes a checkpoint, ends as if it had never been."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from child import in_child
from tiny_training import FIRST_NEW_ID, course_of, make_rows, make_stage, tiny_model

from graftlm.training.stage import StageRun
from graftlm.training.trained import TRAINED

LORA = {"kind": "lora", "rank": 2, "alpha": 4, "rows": "new", "dropout": 0.1}
WRITING, OPENED = "writing ", 27  # the thread that writes, and how many files it opens and changes in one write


def train(folder: Path, num_steps: int) -> None:
    """The stage, begun or gone on with."""
    folder.mkdir(exist_ok=True)
    stage = make_stage(LORA, epochs=num_steps // 3, keep="last", heldout_every=7)
    heldout = {"new": make_rows(4, seed=9)}
    StageRun(tiny_model(), stage, make_rows(), heldout, folder, torch.device("cpu"), FIRST_NEW_ID).run()


def kill_until_it_ends(folder: Path, num_steps: int, dice: random.Random, seconds: float) -> tuple[int, int]:
    """Returns how many kills there were, and how many of them left half a checkpoint behind."""
    num_kills = num_in_write = 0
    while True:
        if dice.random() < 0.8:
            code, _ = in_child(train, folder, num_steps, kill_at=dice.randint(1, 2 * OPENED), in_threads=WRITING)
        else:
            code, _ = in_child(train, folder, num_steps, kill_after=dice.uniform(0.1, 1.0) * seconds)
        if code == 0:
            return num_kills, num_in_write
        assert code == -signal.SIGKILL
        num_kills += 1
        num_in_write += any(folder.glob("*/.step-*"))
        assert num_kills < 20 * num_steps, "it makes no progress"


def hold_equal(folder: Path, num_steps: int, least_kills: int, seed: int) -> None:
    """Runs killed until they end, as many as make `least_kills`; each is as the one that nothing happened to."""
    whole, dice, num_kills, num_in_write = folder / "whole", random.Random(seed), 0, 0
    in_child(str)  # the libraries are loaded now
    began = time.monotonic()
    assert in_child(train, whole, num_steps)[0] == 0
    seconds = time.monotonic() - began
    for attempt in itertools.count():
        if num_kills >= least_kills:
            break
        killed = folder / f"killed-{attempt}"
        kills, in_write = kill_until_it_ends(killed, num_steps, dice, seconds)
        num_kills, num_in_write = num_kills + kills, num_in_write + in_write
        for name in ("weights.safetensors", "values.json", "manifest.json"):
            assert (killed / TRAINED / name).read_bytes() == (whole / TRAINED / name).read_bytes()
        assert course_of(killed) == course_of(whole)
    assert num_in_write >= num_kills // 4


def test_ten_kills_and_more_leave_no_trace(tmp_path: Path) -> None:
    """R1: kill -9, mostly inside the write of a checkpoint; weights, their sha256 and the metrics are the same."""
    hold_equal(tmp_path, 12, 10, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills_leave_no_trace(tmp_path: Path) -> None:
    """R1."""
    hold_equal(tmp_path, 120, 100, seed=1)
