"""Runs as they are logged, made by hand: stages that went well, went back, or ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from graftlm.health.rates import RATE_CUT

Line = dict[str, Any]
STAGE = {"name": "lora", "peak_lr": 3e-4, "precision": "fp16", "keep": "best",
         "groups": {"adapter": {"peak_lr": None}, "new_rows": {"peak_lr": 1e-3}}}  # fmt: skip
RECIPE = {"name": "small", "base": {"model": "base", "scratch": None}, "stages": [STAGE],
          "grow": {"embedding": "normal", "head": "subpiece-mean"}}  # fmt: skip


def step_line(step: int, loss: float, skipped: bool = False, scale: float = 1024.0) -> Line:
    norms = {"adapter": 0.5, "body": 0.0, "old_rows": 0.2, "new_rows": 0.3}
    return {
        "event": "step", "step": step, "num_updates": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.9,
        "grad_norms": norms, "loss_scale": scale, "skipped": skipped, "num_rows": 8, "num_tokens": 80,
        "num_targets": 40, "seconds": 0.1, "row_ids": [0, 1], "zero_gradient_share": {"adapter": 0.25},
        "update_rms": {"adapter": 0.0 if skipped else 1e-3}, "weight_rms": {"adapter": 0.02},
    }  # fmt: skip


def good(first: int, last: int, end: float = 2.0) -> list[Line]:
    """Steps whose loss falls from 9 to `end`."""
    return [step_line(n, end + (9 - end) * math.exp(-n / 25) + 0.1 * (n % 3)) for n in range(first, last + 1)]


def climb(first: int, last: int, begin: float, end: float) -> list[Line]:
    """Steps whose loss climbs evenly."""
    return [step_line(n, begin + (end - begin) * (n - first) / max(last - first, 1)) for n in range(first, last + 1)]


def incident(step: int, cause: str, **values: Any) -> Line:
    place = {"phase": "forward", "module": "model.layers.1.mlp.down_proj", "row_id": 1, "token_id": 5}
    return {"event": "incident", "step": step, "cause": cause, "loss_scale": 1024.0, **place, **values}


def rollback(to: int, at: int, number: int = 1) -> Line:
    return {
        "event": "intervention", "step": to, "number": number, "at_step": at, "action": "rollback",
        "rate_factor": RATE_CUT**number, "text": f"Step {at}: the loss rose. More. Rolled back to step {to}.",
    }  # fmt: skip


def recovered() -> list[Line]:
    """Two attempts, the first gone back from; then on to a good end."""
    blamed = incident(46, "loss-rose", module="", row_id=-1, token_id=-1, culprits=["adapter"], loss=5.0, best=3.3)
    return [*good(1, 40), *climb(41, 46, 4, 7), blamed, rollback(40, 46), *good(41, 90)]


def crashed() -> list[Line]:
    """Steps that overflow in the forward pass, twice gone back from."""
    lines = good(1, 20)
    for number in (1, 2, 3):
        lines += [step_line(n, math.nan, skipped=True) for n in range(21, 24)]
        lines += [incident(21, "forward-overflow"), incident(23, "forward-overflow", culprits=["adapter"])]
        lines += [rollback(20, 23, number)] if number < 3 else []
    text = "lora, step 23: 3 steps in a row were not finite, and no loss scale helps. 2 rollbacks did not help."
    return [*lines, {"event": "stopped", "step": 23, "text": text}]


def write_stage(folder: Path, lines: Iterable[Line], tail: str = "") -> Path:
    """Write a stage's metrics.jsonl, `tail` as its half-written last line."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def write_run(folder: Path, stages: Sequence[Iterable[Line]], recipe: Line | None = None) -> Path:
    """Write a run's recipe and the metrics of its stages; those of a stage None are not there."""
    names = [{**STAGE, "name": f"lora{n or ''}"} for n in range(len(stages))]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"recipe": {**(recipe or RECIPE), "stages": names}, "versions": {}}
    (folder / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    for number, (stage, lines) in enumerate(zip(names, stages, strict=True), start=4):
        write_stage(folder / f"{number}-{stage['name']}", lines)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
