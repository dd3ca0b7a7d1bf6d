"""DeepSpeed's ZeRO changes nothing that is learned: step by step the run of one rank, which holds all.

`make soak` installs DeepSpeed into an environment of its own and runs this file there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from test_several_ranks import BAD_ROW, NUMBERS, WEIGHTS, cut_after, lines_of, poisoned, too_fast
from test_sharded_ranks import CASES, CLOSE, hold_alike, hold_equal, trained
from tiny_training import FULL, make_stage

from graftlm.training.ranks import ALONE

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed, so ZeRO is NOT tested here: make soak does it in an environment of its own",
)
pytestmark = [needs_deepspeed, pytest.mark.timeout(900)]

NAMES = ["full", "full-tied", "lora", "lora-new-tied", "new-rows", "bf16", "bf16-lora", "fp16", "uneven"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    trained(ALONE, {name: CASES[name] for name in NAMES}, folder)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    @functools.cache
    def take() -> Path:
        folder = tmp_path_factory.mktemp("zero")
        on_ranks(2, trained, {name: CASES[name] for name in NAMES}, folder, folder=folder / "processes", shard="zero2")
        return folder

    return take


@pytest.mark.parametrize("case", NAMES)
def test_zero_is_one_run(alone: Path, together: Callable[[], Path], case: str) -> None:
    """Loss, norms, rate, scale, skips and recorder of every step; held-out readings; the finished model."""
    close, heavy = CLOSE.get(case.partition("-")[0], (NUMBERS, WEIGHTS))
    hold_equal(alone / case, together() / case, close)
    hold_alike(alone / f"{case}.pt", together() / f"{case}.pt", heavy)
