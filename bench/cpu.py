"""Our trainer against TRL and LLaMA-Factory on this machine's CPU: same weights, rows, order, optimizer and class.

    python bench/cpu.py [--size 57m] [--classes fp32 bf16] [--trains full lora lora-rows] [--arms WORD ...] [--steps 5]
                        [--threads 1] [--quick] [--add] [--out bench/results/DATE-cpu.json]     (or: make bench-cpu)

bf16 is measured unasked only where the processor computes it: emulated, a step takes minutes. `--add` puts what is
measured now beside what `--out` holds, each group with its own command and size.

Every arm is a process of its own in an environment of its own (made below BENCH_VENVS, else .bench), at its documented
default and at our best tuning of it; ours with malloc as `graftlm` sets it for itself, and so the best peer once more.
A step is 16 rows everywhere. Arms take turns, ours between any two others; figures are medians over the steps after
warm-up. An arm counts when its first loss is ours within 0.5 %, it saw the same labels, and a changed row moves no
other; one that fails is shown as failing. Row-tokens are real tokens of the rows: padding is none, and what rows share
is counted in every row. Memory is the most the process ever held (VmHWM), libraries included, up to the last step;
"above" is what it held more than before the first weight was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, BATCH_ROWS, OURS, QUICK, Arm, in_turns
from judging import figures, headline, judge, table
from venvs import PEERS, python_of
from workload import ROOT, SIZES, Workload, job_of, make_workload

from graftlm.device import fastest_precision, machine_name
from graftlm.malloc import AS_SET

SECONDS_PER_ARM = 3600


def environment(threads: int) -> dict[str, str]:
    """The same for every arm, but for what one says of its own."""
    count = str(threads)
    return {
        **os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "",
    }  # fmt: skip


def run_script(
    python: Path, script: Path, job: dict[str, Any], folder: Path, also: dict[str, str] = AS_SET
) -> dict[str, Any]:
    """One run in a process of its own, `also` in its environment; one that ends in an error is a record of it."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, asked = Path(scratch) / "result.json", Path(scratch) / "job.json"
        asked.write_text(json.dumps({**job, "work": scratch, "out": str(out)}))
        try:
            ended = subprocess.run(
                [str(python), str(script), str(asked)], env=environment(job["threads"]) | also, cwd=scratch,
                capture_output=True, text=True, timeout=SECONDS_PER_ARM,
            )  # fmt: skip
            error = (ended.stderr.strip().splitlines() or ["it told nothing"])[-1]
        except subprocess.TimeoutExpired:
            error = f"not done in {SECONDS_PER_ARM} s"
        if out.is_file():
            return json.loads(out.read_text())
        return {"arm": job["arm"], "settings": job["settings"], "error": error[:300]}


def measure_group(
    arms: list[Arm], pythons: dict[str, Path], workload: Workload, folder: Path, trains: str, precision: str,
    num_steps: int, warm_up: int, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """All arms of one class and training, in turns."""
    group: list[dict[str, Any]] = []
    for arm in in_turns(arms):
        job = job_of(workload, arm, trains, precision, num_steps, threads)
        is_first = arm.name not in {run["arm"] for run in group}
        script = PEERS / f"{'ours' if arm.peer == OURS else arm.peer}_arm.py"
        record = run_script(pythons[arm.peer], script, {**job, "check": is_first}, folder, arm.environment)
        if "error" not in record:
            record["figures"] = figures(record, workload.num_tokens, BATCH_ROWS, warm_up)
            told = f"{record['figures']['row_tokens_per_second']:.1f} tok/s, loss {record['losses'][0]:.4f}"
        else:
            told = record["error"]
        print(f"{trains} {precision}: {arm.name}: {told}", flush=True)
        group.append(record)
    return judge(group)


def machine() -> dict[str, Any]:
    """What computes."""
    cpu = torch.device("cpu")
    return {
        "processor": machine_name(cpu), "cores": os.cpu_count(), "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": fastest_precision(cpu) == "bf16", "load_average": os.getloadavg(),
    }  # fmt: skip


def commit() -> str:
    """The tree measured."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def asked_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="57m")
    parser.add_argument("--classes", nargs="+", choices=("bf16", "fp32"), help="default: what is in hardware")
    parser.add_argument("--trains", nargs="+", choices=("full", "lora", "lora-rows"), default=["full", "lora"])
    parser.add_argument("--arms", nargs="+", help="of the peers only those whose names hold one of these words")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one setting a peer, two timed steps")
    parser.add_argument("--add", action="store_true", help="keep other groups that --out holds already")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "real", help="folder of real rows")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{date.today()}-cpu.json")
    return parser.parse_args(words)


def write(out: Path, groups: dict[str, Any], measured_on: dict[str, Any], workload: Workload) -> None:
    """After every group, so that a run cut short keeps what it has."""
    report = {
        "date": str(date.today()), "machine": measured_on, "data": workload.data, "rows_a_step": BATCH_ROWS,
        **headline(groups), "groups": groups,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    asked = asked_of()
    arms = [arm for arm in ARMS if not asked.quick or arm.name in (OURS, *QUICK)]
    if asked.arms:
        arms = [arm for arm in arms if arm.name == OURS or any(word in arm.name for word in asked.arms)]
    warm_up, num_steps = (1, 3) if asked.quick else (asked.warm_up, asked.warm_up + asked.steps)
    home = Path(os.environ.get("BENCH_VENVS", ROOT / ".bench"))
    work = home / "work"
    work.mkdir(parents=True, exist_ok=True)
    peers = dict.fromkeys(arm.peer for arm in arms if arm.peer != OURS)
    pythons = {OURS: Path(sys.executable), **{peer: python_of(peer, home) for peer in peers}}
    workload = make_workload(work.absolute(), asked.size, num_steps, asked.real)
    before, groups = machine(), {}
    if asked.add and asked.out.is_file():
        groups = json.loads(asked.out.read_text())["groups"]
    words = [word if word != str(asked.out) else asked.out.name for word in sys.argv[1:]]
    for precision in asked.classes or (["fp32", "bf16"] if before["bf16_in_hardware"] else ["fp32"]):
        for trains in asked.trains:
            measured = measure_group(
                arms, pythons, workload, work, trains, precision, num_steps, warm_up, asked.threads
            )
            groups[f"{trains} {precision}"] = measured | {
                "command": " ".join(["python bench/cpu.py", *words]), "commit": commit(), "threads": asked.threads,
                "model": {"size": asked.size, **SIZES[asked.size]}, "warm_up_steps": warm_up,
                "timed_steps": num_steps - warm_up, "tokens_of_steps": workload.num_tokens,
                "load_average_after": os.getloadavg(),
            }  # fmt: skip
            write(asked.out, groups, before, workload)
    print(table(groups))
    for name, value in headline(groups).items():
        print(f"{name}: {'not measured' if value is None else f'{value:.2f}'}")
    print(asked.out)


if __name__ == "__main__":
    main()
