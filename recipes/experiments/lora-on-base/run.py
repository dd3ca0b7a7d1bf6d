"""Why did LoRA on an expanded base diverge? A grid of rates, each cell plain, with the neighbours' mistake, and mended.

    python recipes/experiments/lora-on-base/run.py --out DIR [--steps 120] [--seeds 3] [--native]

Every cell starts from the same grafted base and sees the same rows in fp16. On a CPU a product of fp16 matrices is made
as a GPU's tensor cores make it, from fp16 numbers with sums in fp32, rounded to fp16 (`HalfProducts`; torch's own
emulation gives the same and takes twenty times as long); `--native` leaves them to a processor that has fp16 products
of its own, sums in fp32 too. Arms:

- `plain`: fp32 masters and DeepSpeed's loss scale; nothing looks, nothing is rolled back, the last weights are kept;
- `no-master`: the same, with weights and optimizer in fp16 (`model.half()`), as trainers beside DeepSpeed do
  (at the mildest rate only: it breaks there);
- `automatic`: the recipe's default: replay, rollback, rate cut, best weights kept.

Orders: `lora` straight on the base, or `full-first`: the same LoRA stage, with half as many full-parameter steps at the
card's rate before it (the card's order and shares: one epoch of full training, then two of LoRA).
The other axes of the card's grid (rank, alpha, dropout, warm-up) are thinned to one changed value each, at a rate where
the plain recipe breaks (`CHANGES`); seeds after the first are run there too, straight on the base.
Held-out loss (nats per answer token, fp32) is written for each; `results.json` grows cell by cell, so that an
interrupted grid goes on where it was. Nothing here is tuned on the cells: rates, budget and cut are the defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftlm.device import Precision
from graftlm.errors import NumericalStop
from graftlm.model.causal import body_of, load_causal
from graftlm.model.packed import attend_packed
from graftlm.pipeline import preflight_recipe
from graftlm.recipe import Stage
from graftlm.recipe_file import load_recipe
from graftlm.run import read_metrics, write_json
from graftlm.text.rows import TokenRows
from graftlm.text.tokenizer import load_tokenizer
from graftlm.training.heldout import RowLosses, heldout_losses
from graftlm.training.recorder import Recorder
from graftlm.training.stage import StageRun

matplotlib.use("Agg")
HERE = Path(__file__).parent
RATES = (4e-4, 4e-3, 2e-2, 1e-1)
ARMS = ("plain", "no-master", "automatic")
ORDERS = ("lora", "full-first")
BREAKING = (2e-2, 1e-1)
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "rank 8": {"trains": {"kind": "lora", "rank": 8, "alpha": 32}},
    "alpha 128": {"trains": {"kind": "lora", "rank": 64, "alpha": 128}},
    "dropout 0.1": {"trains": {"kind": "lora", "rank": 64, "alpha": 32, "dropout": 0.1}},
    "no warm-up": {"warmup_steps": 0},
}
FP32 = Precision(torch.float32, torch.device("cpu"))


class HalfProducts(TorchDispatchMode):
    """Products of fp16 matrices with sums in fp32, rounded once to fp16: inf where they pass 65,504."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default) and args[-1].dtype == torch.float16:
            return func(*(x.float() for x in args), **(kwargs or {})).half()
        if func is aten.mm.out and args[-1].dtype == torch.float16:
            return kwargs["out"].copy_(aten.mm(*(x.float() for x in args)))  # pyright: ignore[reportOptionalSubscript]
        return func(*args, **(kwargs or {}))


def cut(rows: TokenRows, count: int) -> TokenRows:
    """The first `count` rows."""
    offsets = np.asarray(rows.offsets[: count + 1])
    last = int(offsets[-1])
    return TokenRows(rows.ids[:last], rows.is_target[:last], offsets, rows.target_bytes[:count])


def knobs(arm: str, seed: int) -> dict[str, Any]:
    """What an arm does differently."""
    own = {"recovery": "automatic", "keep": "best"} if arm == "automatic" else {"recovery": "off", "keep": "last"}
    return {**own, "seed": seed}


def judged(model: Any, heldout: TokenRows) -> RowLosses:
    """Held-out losses in fp32."""
    attend_packed(body_of(model))  # a finished stage leaves it attending as transformers does, from row to row
    return heldout_losses(model, heldout, FP32, 8192)


def train(
    model: Any, stage: Stage, rows: TokenRows, heldout: TokenRows, folder: Path, first_new_id: int, arm: str,
    is_native: bool,
) -> Any:  # fmt: skip
    """One stage; returns the model, or raises NumericalStop."""
    run = StageRun(model, stage, rows, {"new": heldout}, folder, FP32.device, first_new_id)
    if arm == "no-master":
        run.model.half()
        run.recorder = Recorder(run.parts.roles)
    with contextlib.nullcontext() if is_native else HalfProducts():
        run.run()
    return run.finished_model().float()


def cell(base: Path, rows: TokenRows, heldout: TokenRows, first_new_id: int, recipe_stage: Stage, key: tuple, out: Path,
         num_steps: int, is_native: bool) -> dict[str, Any]:  # fmt: skip
    """Train one cell; what came of it."""
    order, arm, rate, seed, change = key
    began = time.perf_counter()
    folder = out / "cells" / "-".join(str(part).replace(" ", "-") for part in key if part != "")
    shutil.rmtree(folder, ignore_errors=True)
    model: Any = load_causal(base)
    found: dict[str, Any] = {"order": order, "arm": arm, "rate": rate, "seed": seed, "change": change}
    own = {"peak_lr": rate, **knobs(arm, seed), **CHANGES[change]}
    stages = [Stage.model_validate({**recipe_stage.model_dump(), **own})]
    if order == "full-first":
        full = {
            **recipe_stage.model_dump(),
            "name": "full",
            "trains": {"kind": "full"},
            "peak_lr": 2e-4,
            **knobs(arm, seed),
        }
        stages.insert(0, Stage.model_validate(full))
    try:
        for stage in stages:
            place = folder / stage.name
            place.mkdir(parents=True)
            steps = num_steps // 2 if stage.name == "full" else num_steps
            part = cut(rows, steps * stage.batch_rows)
            model = train(model, stage, part, heldout, place, first_new_id, arm, is_native)
        losses = judged(model, heldout)
        found |= {"ending": "finished", "loss": losses.loss_per_target, "bits_per_byte": losses.bits_per_byte}
    except NumericalStop as stop:
        found |= {"ending": "stopped", "text": stop.problem, "loss": None}
    lines = [line for file in folder.glob("*/metrics.jsonl") for line in read_metrics(file)]
    found |= {
        "skipped": sum(line.get("skipped", False) for line in lines),
        "rollbacks": sum(line["event"] == "intervention" for line in lines),
        "lowest_scale": min((line["loss_scale"] for line in lines if line["event"] == "step"), default=None),
        "culprits": sorted({c for line in lines if line["event"] == "incident" for c in line["culprits"]}),
        "seconds": round(time.perf_counter() - began, 1),
    }
    shutil.rmtree(folder)
    return found


def grid(num_seeds: int, rates: Sequence[float]) -> list[tuple]:
    """Every cell, those that matter most first: (order, arm, rate, seed, change)."""
    arms = ("plain", "automatic")
    keys = [(order, "no-master", rates[0], 0, "") for order in ORDERS]  # broken at the mildest rate already
    keys += [(order, arm, rate, 0, "") for order in ORDERS for rate in rates for arm in arms]
    broken = [rate for rate in rates if rate in BREAKING]
    keys += [("lora", arm, rate, seed, "") for seed in range(1, num_seeds) for rate in broken for arm in arms]
    return keys + [
        ("lora", arm, rate, 0, change) for rate in broken[:1] for change in CHANGES if change for arm in arms
    ]


def map_of(cells: Sequence[dict[str, Any]], rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Median held-out loss by order and arm (down) and rate (across), and what the map says there.

    The loss is NaN where no cell was run, and where one stopped: the words tell the two apart.
    """
    rows = [(order, arm) for order in ORDERS for arm in ARMS]
    losses = np.full((len(rows), len(rates)), np.nan)
    words = np.full(losses.shape, "not run", dtype=object)
    for place, (order, arm) in enumerate(rows):
        for column, rate in enumerate(rates):
            key = (order, arm, rate)
            found = [c["loss"] for c in cells if not c["change"] and (c["order"], c["arm"], c["rate"]) == key]
            if not found:
                continue
            finite = [x for x in found if x is not None and np.isfinite(x)]
            if len(finite) == len(found):
                losses[place, column] = np.median(finite)
                words[place, column] = f"{np.median(finite):.2f}"
            else:
                words[place, column] = "stopped" if None in found else "not finite"
    return losses, words


def draw(results: dict[str, Any], file: Path) -> None:
    """A map: orders and arms down, rates across, held-out loss as colour; in words where a run stopped, or none was."""
    from matplotlib import pyplot

    rates = sorted({c["rate"] for c in results["cells"]})
    losses, words = map_of(results["cells"], rates)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    untrained = results["untrained_loss"]
    image = axes.imshow(np.clip(losses, None, 1.3 * untrained), cmap="viridis_r", aspect="auto")
    for (place, column), told in np.ndenumerate(words):
        is_dark = np.isfinite(losses[place, column]) and image.norm(losses[place, column]) > 0.5
        colour = "white" if is_dark else "grey" if told == "not run" else "black"
        axes.text(column, place, told, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(ORDERS) * len(ARMS)), [f"{order}, {arm}" for order in ORDERS for arm in ARMS])
    axes.set_xlabel("peak learning rate of the LoRA stage")
    axes.set_title(f"held-out loss, {results['steps']} steps of LoRA (untrained {untrained:.2f} nats)")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=120, help="of the LoRA stage")
    arguments.add_argument("--heldout", type=int, default=60, help="held-out rows read")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--native", action="store_true", help="fp16 products as the processor has them")
    arguments.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak rates of the LoRA stage")
    arguments.add_argument("overrides", nargs="*", help="of the recipe, section.key=value")
    given = arguments.parse_args()
    recipe = load_recipe(HERE / "lora-on-base.yaml", given.overrides)
    prepared = given.out / "prepared"
    preflight_recipe(recipe, prepared)
    rows = TokenRows.load(prepared / "3-data" / "train")
    heldout = cut(TokenRows.load(prepared / "3-data" / "heldout-new"), given.heldout)
    first_new_id = load_tokenizer(prepared / "1-tokenizer").first_new_id
    assert first_new_id is not None
    file = given.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"steps": given.steps, "cells": []}
    results["untrained_loss"] = judged(load_causal(prepared / "2-base"), heldout).loss_per_target
    done = {(c["order"], c["arm"], c["rate"], c["seed"], c["change"]) for c in results["cells"]}
    for key in grid(given.seeds, given.rates):
        if key in done:
            continue
        found = cell(prepared / "2-base", rows, heldout, first_new_id, recipe.stages[0], key, given.out, given.steps,
                     given.native)  # fmt: skip
        print(json.dumps(found), flush=True)
        results["cells"].append(found)
        write_json(file, results)
        draw(results, given.out / "map.svg")


if __name__ == "__main__":
    main()
