"""Two ranks against one on a CPU: tokens a second, scaling efficiency, and how much of a step the sums take.

    python bench/ranks.py [--ranks 2] [--quick] [--out bench/results/DATE-cpu-ranks.json]

A random Llama, rows of 40 to 250 tokens, 32 a step in micro-batches of 1,024 tokens, full training and LoRA, fp32.
Arms, A/B/B'/A: one rank of one thread; N ranks of one thread each; the same with the decoder layers shared out
(ranks.shard=full), whose collectives come within the passes; and, once, one rank of N threads, which is what the same
cores do without ranks. Every rank is bound to a core of its own where there are enough. Gate: the first step's
loss is that of one rank. Take it on a quiet machine; `--quick` is a small model and two timed steps, for trying the
script out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

WARM_UP = 2
TRAINS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 16, "alpha": 16}}
NUM_PIECES, FIRST_NEW_ID = 40_000, 32_000


@dataclass(frozen=True, slots=True)
class Work:
    """What every arm trains."""

    trains: str
    hidden_size: int
    num_layers: int
    num_steps: int


def rows(count: int) -> Any:
    """Random rows whose last half is the answer."""
    import numpy as np

    from graftlm.text.rows import TokenRows

    random = np.random.default_rng(0)
    lengths = random.integers(40, 251, count)
    ids = random.integers(4, NUM_PIECES, int(lengths.sum())).astype(np.uint16)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    return TokenRows(ids, place >= np.repeat(lengths // 2, lengths), offsets, np.full(count, 90, np.int64))


def train(rank: int, count: int, threads: int, port: int, work: Work, shard: str, folder: Path) -> None:
    """One rank of an arm, in a process of its own; rank 0 leaves what it measured in `folder`."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= count * threads:
        os.sched_setaffinity(0, set(cores[rank * threads : (rank + 1) * threads]))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from graftlm.model.causal import new_causal
    from graftlm.recipe import Stage
    from graftlm.training.joining import joined
    from graftlm.training.place import Place
    from graftlm.training.stage import StageRun

    torch.set_num_threads(threads)
    stage = Stage.model_validate(
        {"name": "bench", "trains": TRAINS[work.trains], "batch_rows": 32, "micro_batch_tokens": 1024,
         "precision": "fp32", "epochs": 1, "keep": "last", "checkpoint_every": 10_000, "recovery": "off"}
    )  # fmt: skip
    model = new_causal(
        num_rows=NUM_PIECES, hidden_size=work.hidden_size, num_layers=work.num_layers, num_heads=8,
        intermediate_size=work.hidden_size * 8 // 3, seed=0,
    )  # fmt: skip
    with joined(Place(rank, count, rank, count), {}, torch.device("cpu"), 600, 120, shard) as ranks:
        run = StageRun(
            model, stage, rows(32 * work.num_steps), {}, folder, torch.device("cpu"), FIRST_NEW_ID, ranks=ranks
        )
        inside: list[float] = []
        add_up = ranks.sum_gradients

        def timed(parameters: Sequence[Any]) -> None:
            began = time.perf_counter()
            add_up(parameters)
            inside.append(time.perf_counter() - began)

        ranks.sum_gradients = timed  # type: ignore[method-assign]
        run.run()
    if rank:
        return
    steps = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    steps = [line for line in steps if line["event"] == "step"]
    lengths = run.steps.rows.lengths
    timed_steps = steps[WARM_UP:]
    row_tokens = [int(sum(lengths[row] for row in line["row_ids"])) for line in timed_steps]
    seconds = [line["seconds"] for line in timed_steps]
    found = {
        "ranks": count, "threads": threads, "shard": shard, "first_loss": steps[0]["loss"], "step_seconds": seconds,
        "row_tokens_per_second": sum(row_tokens) / sum(seconds),
        "sum_seconds": statistics.median(inside[WARM_UP:]) if count > 1 else 0.0,
    }  # fmt: skip
    (folder / "found.json").write_text(json.dumps(found))


def arm(count: int, threads: int, work: Work, shard: str = "none") -> dict[str, Any]:
    """Train with `count` ranks of `threads` threads, their layers cut as `shard` says; raises where a rank failed."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = (count, threads, port, work, shard, Path(folder))
        processes = [context.Process(target=train, args=(rank, *given)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"{count} ranks of {threads} threads ended with {codes}")
        return json.loads((Path(folder) / "found.json").read_text())


def measured(count: int, work: Work) -> dict[str, Any]:
    """One rank, several, one again, and one of several threads; with what they say of each other."""
    before, many, cut, after = arm(1, 1, work), arm(count, 1, work), arm(count, 1, work, "full"), arm(1, 1, work)
    threaded = arm(1, count, work)
    losses = [one["first_loss"] for one in (before, many, cut, after, threaded)]
    if max(losses) - min(losses) > 1e-4 * losses[0]:
        raise RuntimeError(f"the arms do not train the same: first losses {losses}")
    one = (before["row_tokens_per_second"] + after["row_tokens_per_second"]) / 2
    return {
        "work": asdict(work),
        "arms": [before, many, cut, after, threaded],
        "speed_up": many["row_tokens_per_second"] / one,
        "efficiency": many["row_tokens_per_second"] / one / count,
        "sharded_against_many": cut["row_tokens_per_second"] / many["row_tokens_per_second"],
        "against_threads": many["row_tokens_per_second"] / threaded["row_tokens_per_second"],
        "share_of_a_step_in_sums": many["sum_seconds"] / statistics.median(many["step_seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small model, two timed steps")
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/{date.today()}-cpu-ranks.json"))
    asked = parser.parse_args()
    size = (64, 2, WARM_UP + 2) if asked.quick else (512, 8, WARM_UP + 10)
    found: dict[str, Any] = {}
    for name in TRAINS:
        found[name] = told = measured(asked.ranks, Work(name, *size))
        speeds = ", ".join(
            f"{one['ranks']}x{one['threads']}{'' if one['shard'] == 'none' else ' sharded'} "
            f"{one['row_tokens_per_second']:,.0f}"
            for one in told["arms"]
        )
        print(
            f"{name}: row tokens/s by ranks x threads {speeds}; {asked.ranks} ranks {told['speed_up']:.2f} times one, "
            f"efficiency {told['efficiency']:.0%}, {told['share_of_a_step_in_sums']:.1%} of a step in sums"
        )
    import torch

    from graftlm.device import machine_name

    machine = {"name": machine_name(torch.device("cpu")), "cores": sorted(os.sched_getaffinity(0))}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "torch": torch.__version__, "quick": asked.quick, **found}
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


if __name__ == "__main__":
    main()
