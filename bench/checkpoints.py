"""What a step waits while a checkpoint is saved: written within the step, and beside training from a copy; and, of two
ranks that share the layers out, put together on rank 0, and written in parts.

    python bench/checkpoints.py [--ranks] [--quick] [--out bench/results/DATE-cpu-checkpoints.json]

A random Llama of 58 million parameters, full training in fp32: weights and two moments, a save every fourth step,
A/B/A. `waited` is what training stood still for, from the run's own metrics; `written` the seconds of building,
hashing, flushing and renaming; step times are those of steps during which nothing was written, and those in which a
write went on. Gate: every file of the last checkpoint and the trained weights are the same bytes in all arms.

`--ranks` takes the arms of two ranks instead, each of one thread, with 20 million parameters: whole, parts, whole. Per
save `held` is what rank 0's training stood still for (putting together, copying, waiting for the save before),
`durable` the seconds from its beginning until the checkpoint has its name; `bytes_written` what each rank wrote of the
last one; `peak_memory` the most each process held from its first step to its last. Gate: tensors and trained weights of
all arms are the same bits.

`extrapolated` is no measurement: bytes of a 7B model's state (fp32 weights and moments) at the rates found here.
`--quick` is a small model, for trying the script out. Take it on a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import machine_name, peak_memory_bytes
from graftlm.model.causal import new_causal
from graftlm.recipe import Stage
from graftlm.run import read_metrics
from graftlm.text.rows import TokenRows
from graftlm.training.checkpoint import load_checkpoint, step_folder
from graftlm.training.joining import joined
from graftlm.training.place import Place
from graftlm.training.saving_parts import PartSaver
from graftlm.training.stage import StageRun
from graftlm.training.trained import TRAINED

SIZE_OF_RANKS = {"num_rows": 8_000, "hidden_size": 384, "num_layers": 8, "num_heads": 6, "intermediate_size": 1032}
NUM_STEPS, EVERY, RANKS_EVERY = 24, 4, 6
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


def stage_of(every: int) -> Stage:
    """What all arms train, with a save every so many steps."""
    return Stage.model_validate(
        {"name": "bench", "trains": {"kind": "full"}, "batch_rows": 4, "micro_batch_tokens": 1024, "precision": "fp32",
         "epochs": 1, "keep": "last", "checkpoint_every": every, "recovery": "off"}
    )  # fmt: skip


def arm(size: dict[str, int], beside: bool, scratch: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """One training; what it took, and the hashes of what it left."""
    stage = stage_of(EVERY)
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


def rank_arm(size: dict[str, int], in_parts: bool, scratch: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """One training by two ranks; what it took, and the hashes of the tensors it left."""
    with tempfile.TemporaryDirectory(dir=scratch) as name, socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.close()
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=train_rank, args=(rank, port, size, in_parts, folder)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"the ranks ended with {[rank.exitcode for rank in ranks]}")
        found, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
        last = sorted((folder / "0" / "checkpoints").iterdir())[-1]
        states = (load_checkpoint(last), load_checkpoint(folder / "0" / TRAINED))
        hashes = {
            f"{place}/{group}/{key}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for place, state in zip(("last", TRAINED), states, strict=True)
            for group, named in state.tensors.items()
            for key, tensor in named.items()
        }
        parts = [file.stat().st_size for file in sorted(last.glob("shard-*"))]
        written = parts or [sum(file.stat().st_size for file in last.iterdir()), 0]
    return {
        "in_parts": in_parts,
        **found,
        "bytes_written": written,
        "peak_memory_bytes": [found["peak_memory_bytes"], other["peak_memory_bytes"]],
    }, hashes


def train_rank(rank: int, port: int, size: dict[str, int], in_parts: bool, folder: Path) -> None:
    """One of two ranks, in a process of its own. Without a disk in common nothing is written in parts."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    own = folder / ("0" if in_parts else str(rank))
    own.mkdir(exist_ok=True)
    device = torch.device("cpu")
    with joined(Place(rank, 2, rank, 2), {}, device, 600, 120, "full") as ranks:
        model, rows = new_causal(**size, seed=0), rows_of(size["num_rows"])  # type: ignore[arg-type]
        run = StageRun(model, stage_of(RANKS_EVERY), rows, {}, own, device, None, ranks=ranks)
        if isinstance(run.saver, PartSaver) is not in_parts or not run.saver.in_background:
            raise RuntimeError("this arm does not save as it should")
        held, durable, peak = [], [], []
        save, keep = run._save, run._keep_result

        def timed() -> None:
            began = time.perf_counter()
            save()
            held.append(time.perf_counter() - began)
            place = step_folder(run.checkpoints, run.step)
            threading.Thread(target=watch, args=(place, began, durable), daemon=True).start()

        def measured() -> None:
            run.saver.wait()
            peak.append(peak_memory_bytes(device))
            keep()

        run._save, run._keep_result = timed, measured  # type: ignore[method-assign]
        run.run()
    steps = [line["seconds"] for line in read_metrics(run.metrics.path) if line["event"] == "step"] if rank == 0 else []
    found = {
        "held_seconds": held, "durable_seconds": durable, "step_seconds": steps, "peak_memory_bytes": peak[0],
        "saved": [line for line in read_metrics(run.metrics.path) if line["event"] == "saved"] if rank == 0 else [],
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))


def watch(place: Path, began: float, durable: list[float]) -> None:
    """Note when a checkpoint has its name."""
    while not place.exists():
        time.sleep(0.002)
    durable.append(time.perf_counter() - began)


def of_ranks(quick: bool, scratch: Path | None) -> dict[str, Any]:
    """The arms of two ranks, and their medians."""
    size = SIZES[quick] if quick else SIZE_OF_RANKS
    arms, left = zip(*(rank_arm(size, in_parts, scratch) for in_parts in (False, True, False)), strict=True)
    if left[0] != left[1] or left[0] != left[2]:
        raise RuntimeError("the arms left other tensors behind")
    medians = [
        {name: statistics.median(one[name][1:]) for name in ("held_seconds", "durable_seconds", "step_seconds")}
        for one in arms
    ]
    for one, median in zip(arms, medians, strict=True):
        print("parts" if one["in_parts"] else "whole", median, one["bytes_written"], one["peak_memory_bytes"])
    return {"arms": arms, "medians": dict(zip(("whole", "parts", "whole_again"), medians, strict=True))}


def told(found: dict[str, Any]) -> dict[str, float]:
    """Medians of an arm, without its first save, which takes memory, and the last, which is waited for at the end."""
    return {
        name: statistics.median(found[name][1:-1] if name in ("waited_seconds", "written_seconds") else found[name])
        for name in ("waited_seconds", "written_seconds", "seconds_of_steps_after_a_save", "seconds_of_other_steps")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", action="store_true", help="the arms of two ranks")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument(
        "--scratch", type=Path, help="where checkpoints are written; the system's scratch folder if not"
    )
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/{date.today()}-cpu-checkpoints.json"))
    asked = parser.parse_args()
    machine = {
        "name": machine_name(torch.device("cpu")), "cores": sorted(os.sched_getaffinity(0)),
        "threads": 1 if asked.ranks else torch.get_num_threads(), "note": asked.note,
    }  # fmt: skip
    taken = of_ranks if asked.ranks else of_one
    report = {
        "machine": machine, "torch": torch.__version__, "quick": asked.quick, **taken(asked.quick, asked.scratch),
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


def of_one(quick: bool, scratch: Path | None) -> dict[str, Any]:
    """The arms of one process, their medians, and what they would be for a 7B model."""
    arms, left = zip(*(arm(SIZES[quick], beside, scratch) for beside in (False, True, False)), strict=True)
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
    medians = {"within": within, "beside": beside, "within_again": again}
    return {"arms": arms, "medians": medians, "extrapolated": extrapolated}


if __name__ == "__main__":
    main()
