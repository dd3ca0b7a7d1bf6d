"""What every arm of `bench/cpu.py` does alike, ours and the peers': read its job, time its steps, read its memory.

Runs in each arm's own environment, so it needs nothing but the standard library, torch and, for a peer, transformers.
A job and a result are JSON files. A step's end is the moment after the weights moved, on the same clock everywhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Moment = tuple[float, float]  # by the clock, and in this process's own processor time
READY = "ready for a step"  # what a process that takes turns with others tells them
IGNORED = -100  # torch's own mark of a position without a label
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl", "llamafactory", "numpy")


def memory_bytes(field: str) -> int:
    """VmRSS (held now) or VmHWM (the most ever held) of this process. Source: proc(5), status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def versions() -> dict[str, str]:
    """Of the packages that matter, those that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_rows(path: str | Path) -> list[dict[str, list[int]]]:
    """Rows in the order of training: `input_ids`, and `labels` that are the ids where they are learned."""
    rows = json.loads(Path(path).read_text())
    return [
        {
            "input_ids": row["ids"],
            "labels": [
                piece if learned else IGNORED for piece, learned in zip(row["ids"], row["is_target"], strict=True)
            ],
        }
        for row in rows
    ]


def _now() -> Moment:
    return time.perf_counter(), time.process_time()


class Result:
    """What an arm found, gathered while it trains."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.start_memory_bytes = memory_bytes("VmRSS")  # libraries are loaded, no weight is
        self.steps: list[tuple[Moment, Moment]] = []  # beginning and end of each
        self._began: Moment = (0.0, 0.0)
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}

    def begin(self) -> None:
        """Training begins: the first step's time counts from here."""
        self._began = self._turn()

    def end_step(self) -> None:
        """A step's weights have moved."""
        self.steps.append((self._began, _now()))
        self.see_memory()
        self._began = self._turn()

    def _turn(self) -> Moment:
        """Now; or, where processes take turns, when this one is told to go on."""
        if self.job.get("in_turns"):
            print(READY, flush=True)
            sys.stdin.readline()
        return _now()

    def see_memory(self) -> None:
        """Remember the most memory held so far, should the arm forget it itself."""
        self.facts["peak_memory_bytes"] = max(memory_bytes("VmHWM"), self.facts.get("peak_memory_bytes", 0))

    def record(self) -> dict[str, Any]:
        """All of it, as `judging` reads it."""
        return {
            "arm": self.job["arm"], "settings": self.job["settings"],
            "step_seconds": [after[0] - before[0] for before, after in self.steps],
            "step_cpu_seconds": [after[1] - before[1] for before, after in self.steps], "losses": self.losses,
            "start_memory_bytes": self.start_memory_bytes, "versions": versions(), **self.facts,
        }  # fmt: skip


def read_job() -> dict[str, Any]:
    """The job named on the command line; torch is given its threads."""
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    return job


def num_targets(batches: Iterable[dict[str, Any]]) -> int:
    """Labelled positions that some earlier position predicts."""
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)


def others_moved(model: Any, batch: dict[str, Any], first_id: int) -> float:
    """Change the answer of a batch's first row: the most any other row's token loss moves (nats).

    Rows are told apart by the token each begins with and none holds elsewhere, however they were laid together.
    """
    import torch

    row_of = (batch["input_ids"].flatten() == first_id).cumsum(0).view_as(batch["input_ids"])
    is_label = batch["labels"] != IGNORED
    changed = {**batch, "input_ids": torch.where(is_label & (row_of == 1), 5, batch["input_ids"])}
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    kept = (is_label & (row_of != 1))[:, 1:]
    if not kept.any():
        return 0.0
    targets = batch["labels"][:, 1:][kept]
    losses = []
    with torch.no_grad():
        for given in (batch, changed):
            logits = model(**{key: value for key, value in given.items() if key != "labels"}).logits
            losses.append(torch.nn.functional.cross_entropy(logits[:, :-1][kept].float(), targets, reduction="none"))
    return (losses[0] - losses[1]).abs().max().item()


def watcher(result: Result, batches_a_step: int) -> Any:
    """A callback for the Trainer of transformers, on which both peers stand."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            result.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            result.end_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                result.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            model, batches = told["model"], iter(told["train_dataloader"])
            first = [next(batches) for _ in range(batches_a_step)]
            learning = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
            result.facts |= {"num_targets": num_targets(first), "num_learning_parameters": sum(learning)}
            result.facts["dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
            if result.job["check"]:
                model.eval()
                result.facts["others_moved"] = others_moved(model, first[0], result.job["first_id"])

    return Watcher()


def run(train: Callable[[dict[str, Any], Result], None]) -> None:
    """An arm's whole process."""
    job = read_job()
    result = Result(job)
    train(job, result)
    Path(job["out"]).write_text(json.dumps(result.record()))
