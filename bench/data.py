"""How the data step's time and memory grow with the number of rows: 10^4, 10^5, 10^6, ... rows made up, in shards.

    python bench/data.py [--rows 10000 100000 1000000] [--seek-to N] [--prepare-to N] [--near-to N]
                         [--out bench/results/DATE-cpu-data.json]

Rows are questions and answers put together from the text shipped with the project, 50,000 a shard of JSON lines. Of a
hundred rows one is another's copy, one nearly so, one has no answer; a thousandth of what is left, at most 1,000 rows,
is held out. What must be dropped is known, and checked. Each size and kind of work is a process of its own: `read`
(read, clean, exact duplicates: `graftlm data`), `seek` (the same, and near duplicates), `prepare` (the data step, which
renders, without near duplicates), `near` (with them); all but the first up to so many rows as is asked. Memory is the
most the process ever held (VmHWM), libraries included; `above` is what it held more than before the first row. Seconds
are one core's where the process is pinned to one, and say nothing where other work ran beside; memory does not depend
on that.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from cpu import commit, environment, machine
from workload import ROOT

from graftlm.recipe import Data, Source
from graftlm.text.corpus import prepare_data
from graftlm.text.dialogue import CARD
from graftlm.text.inspection import inspect_data
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.base import train_base_tokenizer

SHARD_ROWS = 50_000
HUNDRED = 100
COPY, NEAR, EMPTY = 50, 75, 99  # which of a hundred rows is a copy, nearly one, or without an answer
BACK = 37  # how far before it stands what is copied
KINDS = ("read", "seek", "prepare", "near")
SIMILARITY = 0.9
HOURS = 6


def made_row(number: int, fragments: list[str]) -> dict[str, str]:
    """Row `number`: a function of that number alone."""
    place = number % HUNDRED
    dice = random.Random(number - BACK if place in (COPY, NEAR) else number)
    asked = 2 + dice.randrange(6)
    answered = max(3, min(60, round(math.exp(dice.gauss(2.6, 0.7)))))
    answer = "".join(dice.choices(fragments, k=answered))
    question = "".join(dice.choices(fragments, k=asked)) + "？"
    # A near copy is a long row with three characters more: its question is another, its shingles are nearly the same.
    return {
        "instruction": question + "还有呢" if place == NEAR else question,
        "input": "",
        "output": "" if place == EMPTY else answer,
    }


def write_shards(folder: Path, num_rows: int, fragments: list[str]) -> None:
    """`num_rows` rows in files of `SHARD_ROWS`."""
    folder.mkdir()
    for begin in range(0, num_rows, SHARD_ROWS):
        numbers = range(begin, min(begin + SHARD_ROWS, num_rows))
        rows = (json.dumps(made_row(number, fragments), ensure_ascii=False) + "\n" for number in numbers)
        with (folder / f"{begin // SHARD_ROWS:05}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(rows)


def fragments_of(dice: random.Random) -> list[str]:
    """Pieces of the shipped text, four to twelve characters each."""
    text = "".join(read_texts(ROOT / "examples" / "data" / "chinese.txt"))
    places = [(dice.randrange(len(text) - 12), dice.randrange(4, 13)) for _ in range(20_000)]
    return [text[begin : begin + length] for begin, length in places]


def memory_mib(name: str) -> float:
    """VmHWM or VmRSS of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def work(job: dict[str, Any]) -> dict[str, Any]:
    """The process of one point: the work, and what it held."""
    tokenizer = load_tokenizer(job["tokenizer"])
    source, kind = Source(path=job["shards"]), job["kind"]
    before = memory_mib("VmRSS")
    started, cpu_started = time.perf_counter(), time.process_time()
    near = SIMILARITY if kind in ("seek", "near") else None
    if kind in ("read", "seek"):
        report = inspect_data([source], CARD, near_duplicates=near)
    else:
        held = min(1000, job["rows"] // 1000)
        section = Data(sources=(source,), heldout_rows=held, near_duplicates=near)
        report = prepare_data(section, tokenizer, CARD, Path(job["out"]))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    peak = memory_mib("VmHWM")
    return {
        "rows": job["rows"], "kind": kind, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "peak_mib": round(peak),
        "above_mib": round(peak - before), "dropped": report.dropped, "rows_kept": report.rows_kept,
        "rows_read": report.rows_read, "tokens": report.tokens,
    }  # fmt: skip


def run_point(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One point in a process of its own."""
    asked = folder / "job.json"
    asked.write_text(json.dumps(job))
    ended = subprocess.run(
        [sys.executable, __file__, str(asked)], env=environment(1) | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, timeout=HOURS * 3600,
    )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"{job['rows']:,} rows, {job['kind']}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout)


def check(point: dict[str, Any]) -> None:
    """What was planted was found, and nothing is lost."""
    hundreds = point["rows"] // HUNDRED
    dropped = point["dropped"]
    assert dropped["exact duplicate"] == dropped["an empty answer"] == hundreds, dropped
    assert point["rows_read"] == point["rows"]


def points(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every size and kind, told as it is measured."""
    fragments = fragments_of(random.Random(0))
    train_base_tokenizer([made_row(number, fragments)["output"] for number in range(2_000)], 4_000).save(
        folder / "tokenizer"
    )
    print(f"{'rows':>12} {'work':8} {'seconds':>9} {'of CPU':>9} {'peak MiB':>9} {'above':>7}")
    for num_rows in asked.rows:
        shards = folder / f"rows-{num_rows}"
        write_shards(shards, num_rows, fragments)
        for kind in KINDS:
            most = {"seek": asked.seek_to, "prepare": asked.prepare_to, "near": asked.near_to}
            if num_rows > most.get(kind, num_rows):
                continue
            with tempfile.TemporaryDirectory(dir=folder) as out:
                job = {"rows": num_rows, "kind": kind, "shards": str(shards), "tokenizer": str(folder / "tokenizer")}
                point = run_point({**job, "out": out}, folder)
            check(point)
            print(
                f"{num_rows:12,} {kind:8} {point['seconds']:9.1f} {point['cpu_seconds']:9.1f} {point['peak_mib']:9,} "
                f"{point['above_mib']:7,}",
                flush=True,
            )
            yield point
        for file in shards.iterdir():
            file.unlink()


def main() -> None:
    """Measure and write; with the name of a job's file: be the process of one point."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        print(json.dumps(work(json.loads(Path(sys.argv[1]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seek-to", type=int, default=100_000, help="most rows whose near duplicates are sought")
    parser.add_argument("--prepare-to", type=int, default=1_000_000, help="most rows that are rendered too")
    parser.add_argument("--near-to", type=int, default=100_000, help="most rows rendered once those are gone")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{date.today()}-cpu-data.json")
    asked = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python bench/data.py", *(w for w in sys.argv[1:] if w != str(asked.out))]),
        "date": str(date.today()), "commit": commit(), "machine": machine(), "points": [],
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for point in points(asked, Path(folder)):
            report["points"].append(point)
            asked.out.write_text(json.dumps(report, indent=1) + "\n")  # a run cut short keeps what it has
    print(asked.out)


if __name__ == "__main__":
    main()
