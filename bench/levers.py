"""Every lever of our trainer alone: the same steps with it off and with all of them on, in turn.

    python bench/levers.py [--size 57m] [--precision fp32] [--trains full] [--levers WORD ...] [--steps 5] [--quick]
                           [--out bench/results/DATE-cpu-levers.json]

A lever is switched by a value handed to the stage or to what the stage is about to run, never by a copy of the code.
Two processes of each take their steps one after the other, so that what else the machine does is alike for all: whole
runs differ by more than most levers are worth. All losses must agree, but for those of dropout, drawn anew. The head
has no switch: `head` times it alone, on as many hidden states, against full logits and torch's own cross-entropy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from arms import BATCH_ROWS, OURS, Arm
from cpu import commit, environment, machine
from judging import figures, loss_deviation
from workload import ROOT, SIZES, TARGETS, Workload, job_of, make_workload

from graftlm.device import DTYPES
from graftlm.malloc import AS_SET
from graftlm.model.adapted import AdaptedLinear
from graftlm.model.loss import linear_cross_entropy_sum
from graftlm.model.rows import touch_only_rows_read
from graftlm.training.batches import NO_SPARING, Batch, Steps, row_batches
from graftlm.training.stage import StageRun

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from measure import READY, Result, run  # pyright: ignore[reportMissingImports]
from ours_arm import Adjust, train  # pyright: ignore[reportMissingImports]


class OneByOne(Steps):
    """Steps whose micro-batches hold one row each."""

    def micro_batches(self, step: int, device: torch.device) -> list[Batch]:
        """Nothing packed, nothing shared."""
        alone = [row_batches(self.rows, [row_id], self.micro_batch_tokens, device, NO_SPARING)
                 for row_id in self.row_ids(step)]  # fmt: skip
        return [batch for batches in alone for batch in batches]


def _one_by_one(stage_run: StageRun) -> None:
    stage, steps = stage_run.stage, stage_run.steps
    stage_run.steps = OneByOne(
        steps.rows, batch_rows=stage.batch_rows, micro_batch_tokens=stage.micro_batch_tokens, epochs=stage.epochs,
        seed=stage.seed,
    )  # fmt: skip


def _sparing(**changes: bool | int) -> Adjust:
    def adjust(stage_run: StageRun) -> None:
        stage_run.steps.sparing = replace(stage_run.steps.sparing, **changes)

    return adjust


def _adamw(is_foreach: bool) -> Adjust:
    def adjust(stage_run: StageRun) -> None:
        groups = [
            {key: value for key, value in group.items() if key not in ("foreach", "fused")}
            for group in stage_run.optimizer.param_groups
        ]
        stage_run.optimizer = torch.optim.AdamW(groups, foreach=is_foreach, fused=False)

    return adjust


def _keep_all(stage_run: StageRun) -> None:
    stage_run.prepared.lean.restore()


def _adapters_of_peft(stage_run: StageRun) -> None:
    own_of = {id(getattr(parent, name)): own for parent, name, own in stage_run.prepared.lean.replaced}
    found = [
        (parent, name, stand_in)
        for parent in stage_run.model.modules()
        for name, stand_in in parent.named_children()
        if isinstance(stand_in, AdaptedLinear)
    ]
    assert found
    for parent, name, stand_in in found:
        own = own_of[id(stand_in)]
        stand_in.hand_on(own)
        setattr(parent, name, own)


def _whole_embedding(stage_run: StageRun) -> None:
    touch_only_rows_read(stage_run.model, False)


LEVERS: dict[str, tuple[dict[str, Any], Adjust | None]] = {
    "no packing, nothing shared": ({}, _one_by_one),
    "no shared prefix": ({}, _sparing(prefix=False)),
    "whole last layer": ({}, _sparing(last_layer=False)),
    "last layer at labelled positions": ({}, _sparing(last_layer=True)),
    "neither prefix nor last layer": ({}, _sparing(prefix=False, last_layer=False)),
    "micro-batches of any number of tokens": ({}, _sparing(like_tokens=1)),
    "layers that keep all": ({}, _keep_all),
    "AdamW foreach": ({}, _adamw(is_foreach=True)),
    "AdamW loop": ({}, _adamw(is_foreach=False)),
    "micro-batches of 1024 tokens": ({"micro_batch_tokens": 1024}, None),
    "gradient checkpointing": ({"gradient_checkpointing": True}, None),
    "compile": ({"compile": True}, None),
    "split master": ({"split_master": True}, None),
    "no recovery": ({"recovery": "off"}, None),
    "the other precision": ({"precision": "other"}, None),
    "small micro-batches": ({"micro_batch_tokens": 512}, None),
    "small micro-batches, split master": ({"micro_batch_tokens": 512, "split_master": True}, None),
    "small micro-batches, the embedding's gradient whole": ({"micro_batch_tokens": 512}, _whole_embedding),
}
DROPPING = {"trains": {"kind": "lora", "rank": 64, "alpha": 32, "rows": "none", "targets": TARGETS, "dropout": 0.05}}
LORA_LEVERS: dict[str, tuple[dict[str, Any], Adjust | None]] = {
    "adapters as PEFT computes them": ({}, _adapters_of_peft),
    "dropout 0.05": (DROPPING, None),
    "dropout 0.05, whole last layer": (DROPPING, _sparing(prefix=False, last_layer=False)),
    "dropout 0.05 as PEFT computes it": (DROPPING, _adapters_of_peft),
}
ALL_LEVERS = LEVERS | LORA_LEVERS


def lever_run(job: dict[str, Any], result: Result) -> None:
    """The process of one run; the job's arm names the lever."""
    train(job, result, ALL_LEVERS[job["arm"]][1] if job["arm"] in ALL_LEVERS else None)


def measure(
    levers: list[str], workload: Workload, folder: Path, trains: str, precision: str, num_steps: int, warm_up: int
) -> dict[str, Any]:
    """Each lever off, in turn with all on: how many times longer a step takes without it, and its memory.

    Two processes of each, as one may be luckier in how its memory lies than another of the same; `of_twins` tells by
    how much. Ratios are medians over the same steps.
    """

    def job(name: str, place: int) -> dict[str, Any]:
        settings = dict(ALL_LEVERS[name][0]) if name in ALL_LEVERS else {}
        if settings.get("precision") == "other":
            settings["precision"] = "bf16" if precision == "fp32" else "fp32"
        asked = job_of(workload, Arm(name, OURS, settings), trains, precision, num_steps, 1)
        work = folder / f"{len(found)}-{place}"
        return {**asked, "check": False, "in_turns": True, "work": str(work), "out": str(work / "result.json")}

    found: dict[str, Any] = {}
    for name in levers:
        records = step_by_step([job(arm, place) for place, arm in enumerate((OURS, name, OURS, name))])
        for record in records:
            record["figures"] = figures(record, workload.num_tokens, BATCH_ROWS, warm_up)
        on, off = records[0::2], records[1::2]
        memory = [sum(record["figures"]["memory_above_start_gib"] for record in side) for side in (off, on)]
        found[name] = {
            "times_longer": _median_ratio(off, on, "step_seconds", warm_up),
            "times_longer_cpu": _median_ratio(off, on, "step_cpu_seconds", warm_up),
            "of_twins": [_median_ratio(side[1:], side[:1], "step_seconds", warm_up) for side in (on, off)],
            "memory_ratio_above_start": memory[0] / memory[1], "loss_deviation": loss_deviation(off[0], on[0]),
            "on": [record["figures"] for record in on], "off": [record["figures"] for record in off],
        }  # fmt: skip
        told = found[name]
        print(f"{name:34}{told['times_longer']:6.2f}x the time{told['times_longer_cpu']:6.2f}x the processor time"
              f"{told['memory_ratio_above_start']:6.2f}x the memory, losses within {told['loss_deviation']:.0e}; "
              f"twins {told['of_twins'][0]:.2f}, {told['of_twins'][1]:.2f}", flush=True)  # fmt: skip
    return found


def _median_ratio(above: list[dict[str, Any]], below: list[dict[str, Any]], key: str, warm_up: int) -> float:
    """Of the seconds of one step in all processes above and below, over the steps after warm-up."""
    sums = [
        [sum(step) for step in zip(*(record[key][warm_up:] for record in side), strict=True)] for side in (above, below)
    ]
    return statistics.median(a / b for a, b in zip(*sums, strict=True))


def step_by_step(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the processes of these jobs record that take their steps in turn, each of them first as often as last."""
    processes = []
    for job in jobs:
        work = Path(job["work"])
        work.mkdir()
        (work / "job.json").write_text(json.dumps(job))
        processes.append(subprocess.Popen(
            [sys.executable, __file__, str(work / "job.json")], env=environment(job["threads"]) | AS_SET, cwd=work,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(work / "stderr").open("w"), text=True,
        ))  # fmt: skip
    try:
        for process in processes:
            _until_ready(process)
        for step in range(jobs[0]["num_steps"]):
            for process in processes if step % 2 else reversed(processes):
                _take_turn(process)
        for process in processes:
            process.communicate()
    finally:
        for process in processes:
            process.kill()
    found = []
    for job in jobs:
        if not Path(job["out"]).is_file():
            told = (Path(job["work"]) / "stderr").read_text().strip().splitlines() or ["it told nothing"]
            raise SystemExit(f"{job['arm']}: {told[-1]}")
        found.append(json.loads(Path(job["out"]).read_text()))
    return found


def _take_turn(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what it died of is told when all have ended
        process.stdin.write("\n")
        process.stdin.flush()
    _until_ready(process)


def _until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == READY:
            return


def head(size: str, num_tokens: int, num_targets: int, precision: str, rounds: int) -> dict[str, float]:
    """Seconds of head and loss alone, forward and backward: labelled positions in chunks, and logits of every one."""
    shape, dtype = SIZES[size], DTYPES[precision]
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, shape["hidden_size"], requires_grad=True)
    weight = (0.02 * torch.randn(shape["num_rows"], shape["hidden_size"])).requires_grad_()
    targets = torch.randint(shape["num_rows"], (num_tokens,))
    kept = torch.arange(num_tokens) < num_targets

    def ours() -> torch.Tensor:
        return linear_cross_entropy_sum(hidden[kept], [weight], targets[kept], dtype)

    def plain() -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = torch.nn.functional.linear(hidden, weight)
        labels = targets.masked_fill(~kept, -100)
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    seconds: dict[str, list[float]] = {"labelled": [], "every": []}
    for _ in range(rounds):
        for name, work in (("labelled", ours), ("every", plain)):
            began = time.process_time()
            work().backward()
            seconds[name].append(time.process_time() - began)
    told = {f"{name}_cpu_seconds": statistics.median(values) for name, values in seconds.items()}
    told["times_longer_cpu"] = told["every_cpu_seconds"] / told["labelled_cpu_seconds"]
    print(f"{'head: every position':34}{told['times_longer_cpu']:27.2f}x the processor time, head and loss alone")
    return told


def main() -> None:
    """Measure and write; with the name of a job's file: be the process of one run."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        run(lever_run)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default=None)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trains", choices=("full", "lora", "lora-rows"), default="full")
    parser.add_argument("--levers", nargs="+", help="only those whose names hold one of these words")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small model, one timed step, the two exact levers")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "real")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{date.today()}-cpu-levers.json")
    asked = parser.parse_args()
    size = asked.size or ("15m" if asked.quick else "57m")
    warm_up, steps = (1, 1) if asked.quick else (2, asked.steps)
    words = asked.levers or (["prefix nor"] if asked.quick else [""])
    known = ALL_LEVERS if asked.trains == "lora" else LEVERS
    levers = [name for name in known if any(word in name for word in words)]
    if not levers:
        raise SystemExit(f"No lever is called so; there are: {', '.join(known)}.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workload = make_workload(folder, size, warm_up + steps, asked.real)
        before = machine()
        found = measure(levers, workload, folder, asked.trains, asked.precision, warm_up + steps, warm_up)
        alone = head(size, workload.num_tokens[0], workload.num_targets[0], asked.precision, 1 if asked.quick else 5)
    report = {
        "command": " ".join(["python bench/levers.py", *(w for w in sys.argv[1:] if w != str(asked.out))]),
        "date": str(date.today()), "commit": commit(), "machine": before, "model": {"size": size, **SIZES[size]},
        "data": workload.data, "trains": asked.trains, "precision": asked.precision, "timed_steps": steps,
        "levers": found, "head": alone,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


if __name__ == "__main__":
    main()
