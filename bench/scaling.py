"""How our trainer's time and memory grow: with model size, vocabulary, row length and number of rows, one at a time.

    python bench/scaling.py [--axes size vocabulary length rows] [--precision fp32] [--trains full] [--steps 4]
                            [--quick] [--out bench/results/DATE-cpu-scaling.json]

Random Llamas and random rows (a beginning of 29 tokens that all share, then half prompt and half answer), 16 rows a
step, one thread. Each point is a process of its own; the points of an axis are taken forwards, then backwards, so that
a drift of the machine's speed shows as a difference of the two passes. `start_seconds` is what comes before the first
step's end (the look before it, order of rows, buffers) less an ordinary step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import BATCH_ROWS
from cpu import commit, machine, run_script
from judging import figures
from workload import ROOT, TARGETS

from graftlm.model.causal import new_causal
from graftlm.text.rows import TokenRows

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from measure import Result, run  # pyright: ignore[reportMissingImports]
from ours_arm import stage_of, train_stage  # pyright: ignore[reportMissingImports]

NUM_SHARED, WARM_UP = 29, 1
MIDDLE = {"hidden_size": 256, "num_layers": 6, "num_rows": 32_000, "length": 128, "data_rows": 1_000}
QUICK = {"hidden_size": 64, "num_layers": 2, "num_rows": 4_000, "length": 64, "data_rows": 500}
AXES: dict[str, list[dict[str, int]]] = {
    "size": [{"hidden_size": 128, "num_layers": 4}, {"hidden_size": 256, "num_layers": 6},
             {"hidden_size": 512, "num_layers": 8}],
    "vocabulary": [{"num_rows": count} for count in (8_000, 32_000, 64_000, 128_000)],
    "length": [{"length": tokens} for tokens in (64, 128, 256, 512)],
    "rows": [{"data_rows": count} for count in (1_000, 10_000, 100_000)],
}  # fmt: skip
QUICK_AXES: dict[str, list[dict[str, int]]] = {
    "size": [{"hidden_size": 64}, {"hidden_size": 128}],
    "vocabulary": [{"num_rows": 4_000}, {"num_rows": 16_000}],
    "length": [{"length": 64}, {"length": 128}],
    "rows": [{"data_rows": 500}, {"data_rows": 10_000}],
}


def made_rows(count: int, length: int, num_pieces: int) -> TokenRows:
    """Random rows of about this length (three quarters of it to five quarters), the second half the answer."""
    random = np.random.default_rng(0)
    lengths = random.integers(3 * length // 4, 5 * length // 4 + 1, count)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    # 16 bits while they are enough, as the data step writes them.
    ids = random.integers(3, num_pieces, int(offsets[-1])).astype(np.uint16 if num_pieces <= 65_536 else np.uint32)
    ids = np.where(place < NUM_SHARED, (place + 3).astype(ids.dtype), ids)
    return TokenRows(ids, place >= np.repeat(lengths // 2, lengths), offsets, lengths.astype(np.int64))


def point_run(job: dict[str, Any], result: Result) -> None:
    """The process of one point."""
    point = job["point"]
    rows = made_rows(point["data_rows"], point["length"], point["num_rows"])
    epochs = job["num_steps"] / -(-len(rows) // BATCH_ROWS)
    stage = stage_of({**job, "settings": {"epochs": epochs}})
    hidden = point["hidden_size"]
    model = new_causal(num_rows=point["num_rows"], hidden_size=hidden, num_layers=point["num_layers"],
                       num_heads=hidden // 32, intermediate_size=hidden * 8 // 3 // 8 * 8, seed=0)  # fmt: skip
    stage_run = train_stage(model, stage, rows, None, result)
    row_ids = [stage_run.steps.row_ids(step) for step in range(job["num_steps"])]
    result.facts["tokens_of_steps"] = [int(rows.lengths[step].sum()) for step in row_ids]


def measure(axis: list[dict[str, int]], middle: dict[str, int], asked: argparse.Namespace, folder: Path) -> list[Any]:
    """The axis's points, forwards and backwards (forwards only where quick), with the medians of each."""
    passes = axis if asked.quick else [*axis, *reversed(axis)]
    found: dict[int, list[dict[str, Any]]] = {}
    for changed in passes:
        job = {
            "arm": json.dumps(changed), "settings": {}, "point": {**middle, **changed}, "trains": asked.trains,
            "precision": asked.precision, "batch_rows": BATCH_ROWS, "num_steps": WARM_UP + asked.steps, "threads": 1,
            "targets": list(TARGETS), "peak_lr": 2e-5, "weight_decay": 0.01, "max_grad_norm": 1.0,
        }  # fmt: skip
        record = run_script(Path(sys.executable), Path(__file__), job, folder)
        if "error" in record:
            raise SystemExit(f"{changed}: {record['error']}")
        told = figures(record, record["tokens_of_steps"], BATCH_ROWS, WARM_UP)
        told["start_seconds"] = record["step_seconds"][0] - told["step_seconds"]
        told["num_learning_parameters"] = record["num_learning_parameters"]
        found.setdefault(axis.index(changed), []).append(told)
    points = []
    for place, runs in sorted(found.items()):
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        points.append({"changed": axis[place], **medians, "rates_of_runs": [r["row_tokens_per_second"] for r in runs]})
        words = ", ".join(f"{name} {value:,}" for name, value in axis[place].items())
        print(
            f"  {words:34}{medians['num_learning_parameters'] / 1e6:8.1f} M"
            f"{medians['row_tokens_per_second']:9.0f} tok/s{medians['step_seconds']:8.3f} s a step"
            f"{medians['memory_above_start_gib']:7.2f} GiB{medians['start_seconds']:7.2f} s to start",
            flush=True,
        )
    return points


def main() -> None:
    """Measure and write; with the name of a job's file: be the process of one point."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        run(point_run)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=sorted(AXES), default=list(AXES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trains", choices=("full", "lora", "lora-rows"), default="full")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small points, once each: about a minute")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{date.today()}-cpu-scaling.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    middle, axes = (QUICK, QUICK_AXES) if asked.quick else (MIDDLE, AXES)
    before, found = machine(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.axes:
            print(name, flush=True)
            found[name] = measure(axes[name], middle, asked, Path(scratch))
    report = {
        "command": " ".join(["python bench/scaling.py", *(w for w in sys.argv[1:] if w != str(asked.out))]),
        "date": str(date.today()), "commit": commit(), "machine": before, "trains": asked.trains,
        "precision": asked.precision, "middle": middle, "rows_a_step": BATCH_ROWS, "axes": found,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


if __name__ == "__main__":
    main()
