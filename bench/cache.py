"""Token rows on disk at the card's size: 500,000 tokenised rows put together, written, and mapped again.

    python bench/cache.py [--rows 500000] [--out bench/results/DATE-cpu-cache.json]

Lengths are drawn so that they average near 177 tokens as BELLE's do (median 130). Tokenising is not part of it. One
thread; seconds of the clock, and of this process's CPU. What a resumed run pays is the last part: sha256 of every file,
then a memory map; nothing is tokenised again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch

from graftlm.device import machine_name
from graftlm.text.dialogue import Rendered
from graftlm.text.rows import RowsBuilder, TokenRows
from graftlm.text.rows_file import save_rows

NUM_PIECES = 49_954
SAMPLES = 2_000  # different rows, taken in turn


def sample_rows() -> list[Rendered]:
    """Rows of random ids; their lengths are log-normal with median 130 and mean near 177."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(130), 0.785, SAMPLES), 32, 1024).astype(int)
    rows = []
    for length in lengths.tolist():
        answer = length // 2
        mask = [False] * (length - answer) + [True] * answer
        rows.append(Rendered(random.integers(3, NUM_PIECES, length).tolist(), mask, 3 * answer))
    return rows


@contextmanager
def timed(part: str, found: dict[str, dict[str, float]]) -> Iterator[None]:
    """Note the seconds of a part."""
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    found[part] = {"seconds": round(time.perf_counter() - clock, 2), "cpu": round(time.process_time() - cpu, 2)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=500_000)
    arguments.add_argument("--out", type=Path, default=Path(f"bench/results/{date.today()}-cpu-cache.json"))
    given = arguments.parse_args()
    samples = sample_rows()
    parts: dict[str, dict[str, float]] = {}
    with timed("put together", parts):
        builder = RowsBuilder(NUM_PIECES)
        for number in range(given.rows):
            builder.add(samples[number % SAMPLES], f"train.json:{number + 1}")
        rows = builder.rows()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        place = Path(folder) / "rows"
        with timed("written", parts):
            save_rows(rows, place)
        with timed("mapped again", parts):
            read = TokenRows.load(place)
        assert len(read) == given.rows
        assert np.array_equal(read.row(given.rows - 1)[0], samples[(given.rows - 1) % SAMPLES].ids)
        num_bytes = sum(file.stat().st_size for file in place.iterdir())
    found = {
        "machine": machine_name(torch.device("cpu")), "date": str(date.today()), "rows": given.rows,
        "tokens": rows.num_tokens, "bytes": num_bytes, "parts": parts,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
