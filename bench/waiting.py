"""Threads that wait by spinning against threads that sleep, while another process holds a core and while none does.

    python bench/waiting.py [--out bench/results/DATE-cpu-waiting.json]

A small network, many small matrix products on every core: what the demo's training is made of. Each arm is a process of
its own, since OpenMP reads its policy once; arms alternate, medians of 30 rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

SPINS = ("", "0", "1000", "10000", "100000")
ROUND = """
import statistics, time, torch
x = torch.randn(512, 128, requires_grad=True)
net = torch.nn.Sequential(*[torch.nn.Linear(128, 128) for _ in range(20)])
seconds = []
for _ in range(30):
    began = time.perf_counter()
    for _ in range(3):
        net(x).relu().sum().backward()
    seconds.append(time.perf_counter() - began)
print(statistics.median(seconds))
"""


def median_ms(spins: str, threads: int) -> float:
    """Median milliseconds of a round whose threads spin so often before they sleep; "" leaves OpenMP its default."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **({"GOMP_SPINCOUNT": spins} if spins else {})}
    told = subprocess.run([sys.executable, "-c", ROUND], env=environment, check=True, capture_output=True, text=True)
    return 1000 * float(told.stdout)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", default=f"bench/results/{date.today()}-cpu-waiting.json")
    out = Path(arguments.parse_args().out)
    threads = os.cpu_count() or 1
    found: dict[str, dict[str, float]] = {}
    for situation in ("alone", "one core busy"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if situation != "alone" else None
        try:
            arms = {f"{spins or 'default'} spins": [median_ms(spins, threads) for _ in range(3)] for spins in SPINS}
            one = [median_ms("", 1) for _ in range(3)]
        finally:
            if busy:
                busy.kill()
        found[situation] = {name: statistics.median(ms) for name, ms in {**arms, "one thread": one}.items()}
        print(situation, {name: f"{ms:.1f} ms" for name, ms in found[situation].items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"cores": threads, "milliseconds": found}, indent=1))
    print(out)


if __name__ == "__main__":
    main()
