"""What the flight recorder costs: the same steps without and with it, A/B/A, medians.

    python bench/recorder.py [--out bench/results/DATE-cpu-recorder.json]

A random Llama of 23 million parameters, rows of 40 to 96 tokens, 32 a step, full training and LoRA. The recorder's own
seconds are timed inside the very steps it records; loss and weights do not depend on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from graftlm.model.causal import new_causal
from graftlm.recipe import Stage
from graftlm.text.rows import TokenRows
from graftlm.training.recorder import Recorder
from graftlm.training.stage import StageRun

NUM_PIECES, FIRST_NEW_ID, STEPS = 40_000, 32_000, 12


def rows(count: int) -> TokenRows:
    """Random rows whose last third is the answer."""
    random = np.random.default_rng(0)
    lengths = random.integers(40, 97, count)
    ids = random.integers(4, NUM_PIECES, int(lengths.sum())).astype(np.uint16)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    return TokenRows(ids, place >= np.repeat(2 * lengths // 3, lengths), offsets, np.full(count, 90, np.int64))


def seconds_of(trains: dict, with_recorder: bool) -> tuple[list[float], list[float]]:
    """Seconds of every step but the first two, and of the recorder inside them."""
    stage = Stage.model_validate(
        {"name": "bench", "trains": trains, "batch_rows": 32, "precision": "fp32", "epochs": 1, "keep": "last",
         "checkpoint_every": 1000, "recovery": "off"}
    )  # fmt: skip
    model = new_causal(num_rows=NUM_PIECES, hidden_size=256, num_layers=8, num_heads=8, intermediate_size=688, seed=0)
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = StageRun(model, stage, rows(32 * STEPS), {}, Path(folder), torch.device("cpu"), FIRST_NEW_ID)
        read = Recorder.read

        class Timed(Recorder):
            def read(self) -> dict:
                began = time.perf_counter()
                found = read(self) if with_recorder else {}
                inside.append(time.perf_counter() - began)
                return found

        run.recorder = Timed(run.parts.roles)
        run.run()
        steps = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    seconds = [line["seconds"] for line in steps if line["event"] == "step"]
    return seconds[2:], inside[2:]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", default=f"bench/results/{date.today()}-cpu-recorder.json")
    out = Path(arguments.parse_args().out)
    found = {}
    for name, trains in (("full", {"kind": "full"}), ("lora", {"kind": "lora", "rank": 16, "alpha": 16})):
        arms = [seconds_of(trains, with_recorder) for with_recorder in (False, True, False)]
        medians = [statistics.median(seconds) for seconds, _ in arms]
        cost = statistics.median(arms[1][1])
        found[name] = {
            "step_seconds_without_with_without": medians,
            "recorder_seconds": cost,
            "share_of_a_step": cost / medians[1],
        }
        print(f"{name}: step {medians[0]:.3f} / {medians[1]:.3f} / {medians[2]:.3f} s, recorder {1000 * cost:.2f} ms, "
              f"{cost / medians[1]:.2%} of a step")  # fmt: skip
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, **found}, indent=1))
    print(out)


if __name__ == "__main__":
    main()
