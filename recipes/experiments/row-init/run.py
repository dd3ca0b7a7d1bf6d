"""How should the rows of new pieces start, and does training them alone first pay? Measured on the real graft, in fp32.

    python recipes/experiments/row-init/run.py --out DIR [--steps 60]

For every initialisation: the first loss on new and old pieces, the largest gradient norm (before clipping) and the
held-out loss after the same number of steps on the same rows, for LoRA straight away and for a new-rows stage of a
third of the steps before it. Writes results.json and prints a line for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import Precision
from graftlm.model.causal import body_of, load_causal
from graftlm.model.grow import expand_model
from graftlm.model.packed import attend_packed
from graftlm.pipeline import preflight_recipe
from graftlm.recipe import Stage
from graftlm.recipe_file import load_recipe
from graftlm.run import read_json, read_metrics, write_json
from graftlm.text.rows import TokenRows
from graftlm.text.tokenizer import load_tokenizer
from graftlm.training.heldout import heldout_losses
from graftlm.training.stage import StageRun

RECIPE = Path(__file__).parents[1] / "lora-on-base" / "lora-on-base.yaml"
INITS = ("normal", "mean", "subpiece-mean", "subpiece-mean-norm")
ORDERS = ("lora", "new-rows, lora")
FP32 = Precision(torch.float32, torch.device("cpu"))


def part(rows: TokenRows, first: int, last: int) -> TokenRows:
    """Rows `first` to `last`."""
    offsets = np.asarray(rows.offsets[first : last + 1])
    ids = slice(int(offsets[0]), int(offsets[-1]))
    return TokenRows(rows.ids[ids], rows.is_target[ids], offsets - offsets[0], rows.target_bytes[first:last])


def stages_of(order: str, lora: Stage, steps: int) -> list[tuple[Stage, int]]:
    """The stages of an order, each with its steps."""
    lora = lora.model_copy(update={"precision": "fp32", "keep": "last", "heldout_every": 10**6})
    if order == "lora":
        return [(lora, steps)]
    rows = {**lora.model_dump(), "name": "rows", "trains": {"kind": "new-rows"}, "peak_lr": 1e-3}
    return [(Stage.model_validate(rows), steps // 3), (lora, steps - steps // 3)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--heldout", type=int, default=100, help="held-out rows read")
    given = arguments.parse_args()
    recipe = load_recipe(RECIPE)
    prepared = given.out / "prepared"
    preflight_recipe(recipe, prepared)
    data, tokenizer = prepared / "3-data", prepared / "1-tokenizer"
    rows, first_new_id = TokenRows.load(data / "train"), load_tokenizer(tokenizer).first_new_id
    heldout = part(TokenRows.load(data / "heldout-new"), 0, given.heldout)
    assert recipe.base.model is not None
    table = []
    for init in INITS:
        base = given.out / init
        if not base.is_dir():
            expand_model(recipe.base.model, tokenizer, init, base, seed=0)
        for order in ORDERS:
            model: Any = load_causal(base)
            found: dict[str, Any] = {"init": init, "order": order, "gradient_peak": 0.0}
            done = 0
            for stage, steps in stages_of(order, recipe.stages[0], given.steps):
                folder = given.out / "cells" / f"{init}-{order.replace(', ', '-')}-{stage.name}"
                folder.mkdir(parents=True, exist_ok=True)
                some = part(rows, done * stage.batch_rows, (done + steps) * stage.batch_rows)
                run = StageRun(model, stage, some, {"new": heldout}, folder, FP32.device, first_new_id)
                run.run()
                if "first_loss" not in found:
                    found["first_loss"] = read_json(folder / "preflight.json")["look"]["first_loss"]
                norms = [
                    line["grad_norm"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step"
                ]
                found["gradient_peak"] = max(found["gradient_peak"], *norms)
                model, done = run.finished_model(), done + steps
            attend_packed(body_of(model))  # the finished stage left it attending from row to row
            losses = heldout_losses(model, heldout, FP32, 8192)
            found |= {"loss": losses.loss_per_target, "bits_per_byte": losses.bits_per_byte}
            print(json.dumps(found), flush=True)
            table.append(found)
            write_json(given.out / "results.json", {"steps": given.steps, "cells": table})


if __name__ == "__main__":
    main()
