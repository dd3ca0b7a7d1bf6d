"""Experiments: what their maps say, how they judge, and that each of their arms still trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.tiny_training import FIRST_NEW_ID, FULL, make_rows, stage_of, tiny_model

RUN = Path(__file__).parents[1] / "recipes" / "experiments" / "lora-on-base" / "run.py"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_on_base", RUN)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(arm: str, rate: float, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"order": "lora", "arm": arm, "rate": rate, "seed": 0, "change": "", "loss": loss, **more}


def test_a_map_tells_what_stopped_from_what_was_never_run(experiment: ModuleType, tmp_path: Path) -> None:
    cells = [
        cell("plain", 0.1, None), cell("plain", 0.2, 9.0), cell("plain", 0.2, 7.0, seed=1), cell("automatic", 0.1, 7.5),
        cell("automatic", 0.2, float("nan")), cell("no-master", 0.1, 8.0, change="rank 8"),
    ]  # fmt: skip
    losses, words = experiment.map_of(cells, [0.1, 0.2])
    told = {arm: words[place].tolist() for place, arm in enumerate(experiment.ARMS)}
    assert told == {
        "plain": ["stopped", "8.00"],
        "no-master": ["not run", "not run"],
        "automatic": ["7.50", "not finite"],
    }
    assert set(words[len(experiment.ARMS) :].ravel()) == {"not run"}
    assert np.isfinite(losses).sum() == 2
    experiment.draw({"cells": cells, "untrained_loss": 11.0, "steps": 40}, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").is_file()


@pytest.mark.parametrize("arm", ["plain", "automatic", "no-master"])
def test_every_arm_trains_a_stage(experiment: ModuleType, tmp_path: Path, arm: str) -> None:
    """And keeps fp32 masters, but for the one that is there to have none."""
    stage = stage_of(FULL, precision="fp16", **experiment.knobs(arm, 0))
    heldout = make_rows(5, seed=1)
    model = experiment.train(tiny_model(), stage, make_rows(), heldout, tmp_path, FIRST_NEW_ID, arm, False)
    assert np.isfinite(experiment.judged(model, heldout).loss_per_target)
    has_masters = any(not torch.equal(p, p.half().float()) for p in model.parameters())
    assert has_masters is (arm != "no-master")


def test_a_finished_model_is_judged_on_rows_apart(experiment: ModuleType) -> None:
    """As a stage leaves it, it would let each row see those packed before it."""
    rows, model = make_rows(6), tiny_model()
    alone = [experiment.judged(model, experiment.cut(rows, count)).nats[-1] for count in range(1, 7)]
    assert experiment.judged(model, rows).nats == pytest.approx(alone, rel=1e-6)
