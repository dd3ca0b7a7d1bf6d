"""What a step waits while a checkpoint is saved: written within the step, and beside training from a copy.

    python bench/checkpoints.py [--quick] [--out bench/results/DATE-cpu-checkpoints.json]

A random Llama of 58 million parameters, full training in fp32: weights and two moments, a save every fourth step,
A/B/A. `waited` is what training stood still for, from the run's own metrics; `written` the seconds of building,
hashing, flushing and renaming; step times are those of steps during which nothing was written, and those in which a
write went on. Gate: every file of the last checkpoint and the trained weights are the same bytes in all arms.

`extrapolated` is no measurement: bytes of a 7B model's state (fp32 weights and moments) at the rates found here.
`--quick` is a small model, for trying the script out. Take it on a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import machine_name
from graftlm.model.causal import new_causal
from graftlm.recipe import Stage
from graftlm.run import read_metrics
from graftlm.text.rows import TokenRows
from graftlm.training.stage import StageRun
from graftlm.training.trained import TRAINED

NUM_STEPS, EVERY = 24, 4
STATE_OF_7B_BYTES = 3 * 4 * 6_885_000_000  # Llama 2 7B with 49,953 rows in embedding and head
SIZES = {
    True: {"num_rows": 4_000, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 172},
    False: {"num_rows": 32_000, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 1376},
}


def rows_of(num_pieces: int) -> TokenRows:
    """Random rows whose last half is the answer: 4 for each step."""
    random = np.random.default_rng(0)
    lengths = random.integers(40, 129, 4 * NUM_STEPS)
    ids = random.integers(4, num_pieces, int(lengths.sum())).astype(np.uint16)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    return TokenRows(ids, place >= np.repeat(lengths // 2, lengths), offsets, np.full(len(lengths), 90, np.int64))


def arm(size: dict[str, int], beside: bool, scratch: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """One training; what it took, and the hashes of what it left."""
    stage = Stage.model_validate(
        {"name": "bench", "trains": {"kind": "full"}, "batch_rows": 4, "micro_batch_tokens": 1024, "precision": "fp32",
         "epochs": 1, "keep": "last", "checkpoint_every": EVERY, "recovery": "off"}
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        model = new_causal(**size, seed=0)  # type: ignore[arg-type]
        rows = rows_of(size["num_rows"])
        run = StageRun(model, stage, rows, {}, folder, torch.device("cpu"), None, saves_beside=beside)
        if run.saver.in_background is not beside:
            raise RuntimeError("memory holds no copy of a checkpoint here")
        run.run()
        lines = read_metrics(run.metrics.path)
        last = sorted(run.checkpoints.iterdir())[-1]
        files = [*last.iterdir(), *(folder / TRAINED).iterdir()]
        hashes = {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    saves = [line for line in lines if line["event"] == "saved"]
    steps = [line["seconds"] for line in lines if line["event"] == "step"]
    during = {step for line in saves for step in (line["step"] + 1,)}
    return {
        "beside": beside,
        "num_bytes": saves[-1]["num_bytes"],
        "waited_seconds": [line["waited_seconds"] for line in saves],
        "written_seconds": [line["written_seconds"] for line in saves],
        "seconds_of_steps_after_a_save": [seconds for step, seconds in enumerate(steps, 1) if step in during],
        "seconds_of_other_steps": [seconds for step, seconds in enumerate(steps, 1) if step not in during],
    }, hashes


def told(found: dict[str, Any]) -> dict[str, float]:
    """Medians of an arm, without its first save, which takes memory, and the last, which is waited for at the end."""
    return {
        name: statistics.median(found[name][1:-1] if name in ("waited_seconds", "written_seconds") else found[name])
        for name in ("waited_seconds", "written_seconds", "seconds_of_steps_after_a_save", "seconds_of_other_steps")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument(
        "--scratch", type=Path, help="where checkpoints are written; the system's scratch folder if not"
    )
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/{date.today()}-cpu-checkpoints.json"))
    asked = parser.parse_args()
    arms, left = zip(*(arm(SIZES[asked.quick], beside, asked.scratch) for beside in (False, True, False)), strict=True)
    if left[0] != left[1] or left[0] != left[2]:
        raise RuntimeError("the arms left other bytes behind")
    within, beside = told(arms[0]), told(arms[1])
    again = told(arms[2])
    for name, one in (("within the step", within), ("beside training", beside), ("within the step", again)):
        print(f"{name}: {', '.join(f'{key} {seconds:.3f}' for key, seconds in one.items())}")
    share = STATE_OF_7B_BYTES / arms[0]["num_bytes"]
    extrapolated = {
        "state_bytes": STATE_OF_7B_BYTES,
        "waited_within_the_step_seconds": share * (within["waited_seconds"] + again["waited_seconds"]) / 2,
        "waited_beside_training_seconds": share * beside["waited_seconds"],
        "written_beside_training_seconds": share * beside["written_seconds"],
    }
    print(f"extrapolated by bytes to a 7B model's state, not measured: {extrapolated}")
    machine = {
        "name": machine_name(torch.device("cpu")), "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "note": asked.note,
    }  # fmt: skip
    report = {
        "machine": machine, "torch": torch.__version__, "quick": asked.quick, "arms": arms,
        "medians": {"within": within, "beside": beside, "within_again": again}, "extrapolated": extrapolated,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


if __name__ == "__main__":
    main()
