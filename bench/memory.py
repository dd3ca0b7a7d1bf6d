"""What the planner says a stage needs in memory, against what stages take: real ones, each in a process of its own.

    python bench/memory.py [--out bench/results/DATE-cpu-memory.json] [--only NAME]

Counted: the most resident memory of the process (VmHWM) from before the look to the end of the stage, less what was
resident (VmRSS) just before the model was built, with all libraries loaded, one small stage run to warm them up, and
what was free given back. Each stage runs with malloc told to give back all that is freed (ALIVE): then what is resident
is what is alive, which is what a plan can know. Those in fp32 run twice more: with malloc set as `graftlm` sets it, and
as it is, when glibc's keeps freed blocks of less than 32 MiB, and before 2.38 seldom uses an aligned one again.

Random Llamas, random rows that begin with the same 29 tokens, two steps. One thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import machine_name, peak_memory_bytes
from graftlm.health.activations import counts_of
from graftlm.health.memory import StageSize, moments, peak
from graftlm.health.plan import LOOK_ROWS, LOOK_TOKENS, size_of
from graftlm.malloc import AS_SET, KERNELS
from graftlm.model.causal import new_causal
from graftlm.model.shapes import Shape
from graftlm.recipe import Stage
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Steps, all_sparing, row_batches
from graftlm.training.precision import make_precision
from graftlm.training.room import facts_of, wish_of
from graftlm.training.stage import StageRun

NUM_OLD, NUM_SHARED = 32_000, 29
ALIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", **KERNELS}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 64, "alpha": 32},
    "lora-dropout": {"kind": "lora", "rank": 64, "alpha": 32, "dropout": 0.05},
    "lora-no-rows": {"kind": "lora", "rank": 64, "alpha": 32, "rows": "none"},
    "new-rows": {"kind": "new-rows"},
}


@dataclass(frozen=True)
class Case:
    """One stage to run."""

    name: str
    kind: str
    precision: str
    hidden: int
    layers: int
    new_rows: int
    budget: int
    batch_rows: int
    checkpointing: bool = False
    steps: int = 2
    keep: str = "last"
    tied: bool = False

    @property
    def shape(self) -> Shape:
        inner = self.hidden * 43 // 16
        return Shape(self.layers, self.hidden, inner, 8, 8, self.hidden // 8, NUM_OLD + self.new_rows, self.tied)


SMALL: dict[str, Any] = {"hidden": 256, "layers": 8, "new_rows": 8000}
LARGE: dict[str, Any] = {"hidden": 512, "layers": 6, "new_rows": 0}
CASES = [
    Case("small full fp32, 1k", "full", "fp32", **SMALL, budget=1024, batch_rows=28),
    Case("small full fp32, 4k", "full", "fp32", **SMALL, budget=4096, batch_rows=88),
    Case("small full fp32, 4k, one micro-batch", "full", "fp32", **SMALL, budget=8192, batch_rows=32),
    Case("small full fp32, 4k, recomputed", "full", "fp32", **SMALL, budget=4096, batch_rows=88, checkpointing=True),
    Case("small full fp32, 1k, best kept", "full", "fp32", **SMALL, budget=1024, batch_rows=28, keep="best"),
    Case("small lora fp32, 1k", "lora", "fp32", **SMALL, budget=1024, batch_rows=28),
    Case("small lora fp32, 4k", "lora", "fp32", **SMALL, budget=4096, batch_rows=88),
    Case("small lora fp32, 4k, recomputed", "lora", "fp32", **SMALL, budget=4096, batch_rows=88, checkpointing=True),
    Case("small lora with dropout fp32, 4k", "lora-dropout", "fp32", **SMALL, budget=4096, batch_rows=88),
    Case("small new rows fp32, 4k", "new-rows", "fp32", **SMALL, budget=4096, batch_rows=88),
    Case("large full fp32, 1k", "full", "fp32", **LARGE, budget=1024, batch_rows=28),
    Case("large full fp32, 4k", "full", "fp32", **LARGE, budget=4096, batch_rows=88),
    Case("large full fp32, 4k, tied", "full", "fp32", **LARGE, budget=4096, batch_rows=88, tied=True),
    Case("large lora fp32, 4k, rows frozen", "lora-no-rows", "fp32", **LARGE, budget=4096, batch_rows=88),
    Case("small full bf16, 1k", "full", "bf16", **SMALL, budget=1024, batch_rows=28),
    Case("small full bf16, 2k, recomputed", "full", "bf16", **SMALL, budget=2048, batch_rows=44, checkpointing=True),
    Case("small lora bf16, 2k", "lora", "bf16", **SMALL, budget=2048, batch_rows=44),
    Case("small new rows fp32, 4k, tied", "new-rows", "fp32", **SMALL, budget=4096, batch_rows=88, tied=True),
    Case("small new rows bf16, 1k", "new-rows", "bf16", **SMALL, budget=1024, batch_rows=28),
    Case("large full bf16, 1k", "full", "bf16", **LARGE, budget=1024, batch_rows=28),
]  # fmt: skip


def rows(count: int, num_pieces: int) -> TokenRows:
    """Random rows with one beginning, half of each an answer."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.6, 0.5, count), NUM_SHARED + 8, 400).astype(np.int64)
    ids = random.integers(4, num_pieces, int(lengths.sum())).astype(np.uint32)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    ids[place < NUM_SHARED] = 5 + place[place < NUM_SHARED]
    is_target = place >= np.repeat(np.maximum(lengths // 2, NUM_SHARED + 1), lengths)
    return TokenRows(ids, is_target, offsets, np.full(count, 90, np.int64))


def stage_of(case: Case) -> Stage:
    return Stage.model_validate(
        {"name": "bench", "trains": KINDS[case.kind], "batch_rows": case.batch_rows, "precision": case.precision,
         "micro_batch_tokens": case.budget, "gradient_checkpointing": case.checkpointing, "keep": case.keep,
         "heldout_every": 1 if case.keep == "best" else None}
    )  # fmt: skip


def planned(case: Case, given: TokenRows) -> tuple[list[StageSize], StageSize]:
    """The stage as the planner sees it: with each micro-batch it will really take, and with the one that
    `graftlm plan` expects of such rows."""
    stage = stage_of(case)
    wish = wish_of(stage, "bench", case.shape, case.new_rows, facts_of(given, "bench"))
    expected = size_of(wish, case.precision, True, case.budget, case.checkpointing)
    spared = all_sparing(make_precision(stage, torch.device("cpu")))
    steps = Steps(
        given, batch_rows=case.batch_rows, micro_batch_tokens=case.budget, epochs=1, seed=stage.seed,
        sparing=replace(spared, prefix=wish.shares_prefix),
    )  # fmt: skip
    look = row_batches(given, steps.row_ids(0)[:LOOK_ROWS], LOOK_TOKENS, torch.device("cpu"), steps.sparing)[0]
    expected_here = replace(expected, look=counts_of(look.layout, len(look.targets_N)))
    sizes = []
    for step in range(1, steps.num_steps):  # Adam's moments are there from the second on
        for place, batch in enumerate(steps.micro_batches(step, torch.device("cpu"))):
            counts = counts_of(batch.layout, len(batch.targets_N))
            sizes.append(replace(expected_here, batch=counts, is_accumulating=place > 0))
    return sizes, expected


def resident_bytes() -> int:
    """VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def run(case: Case, given: TokenRows, heldout: TokenRows) -> None:
    shape = case.shape
    with tempfile.TemporaryDirectory() as folder:
        model = new_causal(
            num_rows=shape.num_rows, hidden_size=shape.hidden_size, num_layers=shape.num_layers,
            num_heads=shape.num_heads, intermediate_size=shape.intermediate_size, is_tied=shape.is_tied,
        )  # fmt: skip
        held = {"new": heldout} if case.keep == "best" else {}
        new_id = NUM_OLD if case.new_rows else None
        StageRun(
            model, stage_of(case), given, held, Path(folder), torch.device("cpu"), new_id, saves_beside=False
        ).run()


def measure(case: Case) -> dict[str, Any]:
    """Run one stage in this process; what it took and what was planned."""
    warm = replace(case, hidden=32, layers=2, new_rows=case.new_rows and 8, budget=512, batch_rows=2)
    run(warm, rows(4, NUM_OLD), rows(2, NUM_OLD))
    given = rows(case.steps * case.batch_rows, case.shape.num_rows)
    sizes, expected = planned(case, given)
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what comes
    before = resident_bytes()
    began = time.process_time()
    run(case, given, rows(4, NUM_OLD))
    taken = peak_memory_bytes(torch.device("cpu")) - before
    worst = max((moment for size in sizes for moment in moments(size)), key=lambda moment: moment.num_bytes)
    guess = peak(expected).num_bytes
    return {
        **asdict(case), "measured_bytes": taken, "planned_bytes": worst.num_bytes,
        "error": worst.num_bytes / taken - 1, "moment": worst.name, "items": worst.items,
        "expected_bytes": guess, "error_of_expected": guess / taken - 1,
        "micro_batch_tokens_taken": [size.batch.num_tokens for size in sizes],
        "micro_batch_tokens_expected": expected.batch.num_tokens,
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def in_a_process(number: int, environment: dict[str, str]) -> dict[str, Any]:
    """Measure one case in a fresh process."""
    command = [sys.executable, __file__, "--case", str(number)]
    ran = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="Cases whose name holds this.")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(measure(CASES[given.case])))
        return
    found = []
    for number, case in enumerate(CASES):
        if given.only and given.only not in case.name:
            continue
        told = in_a_process(number, ALIVE)
        line = f"{case.name:<40} planned {told['planned_bytes'] / 2**20:7.0f}"
        line += f"  measured {told['measured_bytes'] / 2**20:7.0f} MiB  {told['error']:+6.1%}  ({told['moment']})"
        line += f"  from row lengths {told['error_of_expected']:+6.1%}"
        if case.precision == "fp32":
            for name, environment in {"as_run": AS_SET, "with_default_malloc": {}}.items():
                other = in_a_process(number, environment)
                told[f"measured_{name}_bytes"] = other["measured_bytes"]
                told[f"cpu_seconds_{name}"] = other["cpu_seconds"]
                line += f"  {name} {other['measured_bytes'] / 2**20:5.0f} MiB {other['cpu_seconds']:3.0f} s"
        found.append(told)
        print(line, flush=True)
    worst, worst_expected = (max(abs(told[key]) for told in found) for key in ("error", "error_of_expected"))
    print(f"largest error {worst:.1%}; from row lengths {worst_expected:.1%}")
    if given.out:
        about = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "machine": machine_name(torch.device("cpu")),
        }
        content = {**about, "libc": " ".join(platform.libc_ver()), "largest_error": worst, "cases": found}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
