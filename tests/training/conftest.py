"""Fixtures for training: one thread, and stages over a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import FIRST_NEW_ID, FULL, make_rows, spoken_rows, stage_of, tiny_model

from graftlm.recipe import Stage
from graftlm.training.stage import StageRun


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def stage_run(tmp_path: Path) -> Callable[..., StageRun]:
    """Make the stage in `folder`, as a fresh process would: 6 steps of 4 rows, some held out."""

    def make(stage: Stage, folder: str = "stage", model: Any = None, tied: bool = False) -> StageRun:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        heldout = {"new": make_rows(4, seed=9)}
        model = tiny_model(tied) if model is None else model
        return StageRun(model, stage, make_rows(), heldout, path, torch.device("cpu"), FIRST_NEW_ID)

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has learned `spoken_rows`: what has learned nothing cannot be damaged. To be copied, not changed."""
    torch.set_num_threads(1)
    stage = stage_of(FULL, epochs=25, batch_rows=12, peak_lr=2e-2)
    folder = tmp_path_factory.mktemp("base")
    run = StageRun(tiny_model(), stage, spoken_rows(), {}, folder, torch.device("cpu"), FIRST_NEW_ID)
    run.run()
    return run.finished_model()
