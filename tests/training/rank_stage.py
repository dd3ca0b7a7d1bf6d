"""The stage that tests of lost ranks train: small, with a step at which something happens."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_training import FIRST_NEW_ID, FULL, make_rows, make_stage, tiny_model, weights_sha256

from graftlm.training.ranks import Ranks
from graftlm.training.stage import StageRun

CPU = torch.device("cpu")
STAGE = make_stage(FULL, epochs=4, keep="last")
PATIENCE = 2.0
AT = 7


def run_of(ranks: Ranks, folder: Path) -> StageRun:
    folder.mkdir(exist_ok=True)
    return StageRun(tiny_model(), STAGE, make_rows(), {}, folder, CPU, FIRST_NEW_ID, ranks=ranks)


def whole(ranks: Ranks, folder: Path) -> str:
    run = run_of(ranks, folder)
    run.run()
    return weights_sha256(run.model)
