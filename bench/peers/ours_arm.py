"""Our arm of `bench/cpu.py`: a stage as `graftlm run` trains it, on the rows and weights of the job."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Result, read_rows, run

from graftlm.model.causal import load_causal
from graftlm.recipe import Stage
from graftlm.run import Metrics
from graftlm.text.rows import TokenRows
from graftlm.training.heldout import heldout_losses
from graftlm.training.stage import StageRun

Adjust = Callable[[StageRun], None]
CPU = torch.device("cpu")


class TimedMetrics(Metrics):
    """The stage's record, which tells when a step's line was written."""

    def __init__(self, path: Path, result: Result) -> None:
        super().__init__(path)
        self.result = result

    def append(self, event: str, **values: Any) -> None:
        """One line."""
        super().append(event, **values)
        if event == "step":
            self.result.losses.append(values["loss"])
            self.result.end_step()


def token_rows(rows: list[dict[str, list[int]]]) -> TokenRows:
    """Rows in memory as the data step leaves them on disk."""
    lengths = [len(row["input_ids"]) for row in rows]
    ids = np.concatenate([np.array(row["input_ids"], np.uint16) for row in rows])
    is_target = np.concatenate([np.array(row["labels"]) >= 0 for row in rows])
    return TokenRows(ids, is_target, np.r_[0, np.cumsum(lengths)].astype(np.int64), np.array(lengths, np.int64))


def stage_of(job: dict[str, Any]) -> Stage:
    """The job as a stage of a recipe; `settings` are further keys of it."""
    trains: dict[str, Any] = {"kind": "full"}
    if job["trains"] != "full":
        rows = "all" if job["trains"] == "lora-rows" else "none"
        trains = {"kind": "lora", "rank": 64, "alpha": 32, "rows": rows, "targets": tuple(job["targets"])}
    return Stage.model_validate(
        {"name": "bench", "trains": trains, "batch_rows": job["batch_rows"], "precision": job["precision"],
         "peak_lr": job["peak_lr"], "schedule": "constant", "weight_decay": job["weight_decay"],
         "max_grad_norm": job["max_grad_norm"], "checkpoint_every": 10**6, "keep": "last", **job["settings"]}
    )  # fmt: skip


def in_training_order(rows: list[dict[str, list[int]]], seed: int) -> list[dict[str, list[int]]]:
    """The rows placed so that the stage, which shuffles them, takes them in the order given here."""
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    placed = [rows[0]] * len(rows)
    for row, place in zip(rows, order, strict=True):
        placed[place] = row
    return placed


def others_moved(stage_run: StageRun, rows: list[dict[str, list[int]]]) -> float:
    """Change the answer of the first of these rows: the most any other row's loss a token moves (nats)."""
    answer = [label if label < 0 else 5 for label in rows[0]["labels"]]
    ids = [piece if label < 0 else label for piece, label in zip(rows[0]["input_ids"], answer, strict=True)]
    found = []
    for first in (rows[0], {"input_ids": ids, "labels": answer}):
        told = token_rows([first, *rows[1:]])
        losses = heldout_losses(stage_run.model, told, stage_run.precision, stage_run.stage.micro_batch_tokens)
        found.append(losses.nats / losses.num_targets)
    assert found[0][0] != found[1][0]
    return float(np.abs(found[0] - found[1])[1:].max())


def train_stage(
    model: Any,
    stage: Stage,
    rows: TokenRows,
    first_new_id: int | None,
    result: Result,
    adjust: Adjust | None = None,
    device: torch.device = CPU,
) -> StageRun:
    """Take the stage's steps as `graftlm run` does, timed; `adjust` may change what is about to run."""
    with tempfile.TemporaryDirectory() as folder:
        stage_run = StageRun(model, stage, rows, {}, Path(folder), device, first_new_id)
        if adjust is not None:
            adjust(stage_run)
        stage_run.metrics = TimedMetrics(stage_run.metrics.path, result)
        result.see_memory()  # the stage forgets the peak of loading when it begins
        result.begin()
        stage_run.run()
    first = stage_run.steps.micro_batches(0, device)
    result.facts |= {
        "num_targets": sum(len(batch.targets_N) for batch in first),
        "num_learning_parameters": sum(p.numel() for role in stage_run.parts.roles.values() for p in role),
        "dtypes": sorted({str(p.dtype) for p in stage_run.model.parameters()}),
        "optimizer": type(stage_run.optimizer).__name__,
    }
    return stage_run


def train(job: dict[str, Any], result: Result, adjust: Adjust | None = None) -> None:
    """Take the job's steps."""
    stage, given = stage_of(job), read_rows(job["rows"])
    rows = token_rows(in_training_order(given, stage.seed))
    stage_run = train_stage(load_causal(job["model"]), stage, rows, job["first_new_id"], result, adjust)
    assert len(result.losses) == job["num_steps"], result.losses
    if job["check"]:
        result.facts["others_moved"] = others_moved(stage_run, given[: job["batch_rows"]])


if __name__ == "__main__":
    run(train)
