"""The 7B protocol on one GPU: a step of each of the card's two stages, against the products the same GPU is seen to do.

    python bench/h200.py [--size 7b] [--device cuda] [--trains lora-rows full] [--steps 6] [--minutes 9]
                         [--trl PYTHON] [--out bench/results/DATE-h200-7b.json]    (--size toy --device cpu: rehearsal)

Weights are random, so nothing is downloaded; lengths are drawn as BELLE's lie (median 130 tokens, none over 1,024;
every row begins with the same 29, half of it is answer). A step is 128 rows, as the card's. First the ceiling: bf16
products of the model's own shapes, timed in this run. Then each training in a process of its own, and with `--trl`,
the Python of an environment that holds TRL, its arm of `bench/peers` between two of ours. Row-tokens are real tokens
of the rows; operations are those executed (`health/hours.py`). The card's hours are extrapolated from timed steps.
What would not end inside `--minutes` is not begun, and the report names it. Not run on a GPU yet: no figure of one is
claimed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import OURS, Arm, in_turns
from cpu import commit, run_script
from judging import figures
from venvs import PEERS
from workload import ROOT, TARGETS

from graftlm.device import machine_name, peak_memory_bytes, pick_device
from graftlm.health.activations import Learns
from graftlm.health.hours import flops_per_token
from graftlm.health.row_facts import RowFacts
from graftlm.model.causal import new_causal
from graftlm.model.shapes import Shape
from graftlm.text.rows import TokenRows
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer.base import train_base_tokenizer

sys.path.insert(0, str(PEERS))
from measure import Result, run  # pyright: ignore[reportMissingImports]
from ours_arm import stage_of, train_stage  # pyright: ignore[reportMissingImports]

SIZES: dict[str, dict[str, Any]] = {
    "7b": {"num_rows": 49_954, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11_008},
    "toy": {"num_rows": 2_000, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 176},
}
STEP_ROWS = {"7b": 128, "toy": 16}
NUM_SHARED, MEDIAN, SPREAD, LONGEST = 29, 130, 0.75, 1024
CARD_TOKENS, CARD_EPOCHS = 88.7e6, {"full": 1, "lora-rows": 2}  # tokens an epoch of 500,000 rows; the card's stages
WARM_UP = 2
# The best of TRL's settings in `bench/cpu.py` that needs no packing of its own; eight such batches make a step.
TUNED = Arm("trl padding_free", "trl", {"gradient_checkpointing": False, "padding_free": True, "max_length": None,
                                        "per_device_train_batch_size": 16})  # fmt: skip


def belle_like(count: int, num_pieces: int) -> TokenRows:
    """Rows of random pieces with lengths log-normal about the median, the second half of each the answer."""
    random = np.random.default_rng(0)
    drawn = MEDIAN * np.exp(SPREAD * random.standard_normal(count))
    lengths = np.clip(drawn.astype(np.int64), NUM_SHARED + 8, LONGEST)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    ids = random.integers(3, num_pieces, int(offsets[-1])).astype(np.uint16)
    ids = np.where(place < NUM_SHARED, place + 3, ids).astype(np.uint16)
    return TokenRows(ids, place >= np.repeat(np.maximum(lengths // 2, NUM_SHARED), lengths), offsets, lengths)


def rate_of_products(device: torch.device, size: str, seconds: float = 1.0) -> dict[str, float]:
    """TFLOP/s of bf16 products of the model's shapes: hidden to MLP, hidden to hidden, hidden to the head's rows."""
    shape, tokens = SIZES[size], 8192 if device.type == "cuda" else 512
    rates = {}
    for name in ("intermediate_size", "hidden_size", "num_rows"):
        inner, outer = shape["hidden_size"], shape[name]
        left, right = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (tokens, outer))
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(10):
                torch.mm(left, right.T)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += 10
        rates[name] = 2 * tokens * inner * outer * count / (time.perf_counter() - began) / 1e12
    return rates


def our_run(job: dict[str, Any], result: Result) -> None:
    """The process of one of our runs: the model is drawn where it trains."""
    device = torch.device(job["device"])
    rows = belle_like(job["num_rows"], job["shape"]["num_rows"])
    with torch.device(device):
        model = new_causal(**job["shape"], seed=0)
    stage_run = train_stage(model, stage_of(job), rows, job["first_new_id"], result, device=device)
    steps = [stage_run.steps.row_ids(step) for step in range(job["num_steps"])]
    result.facts["tokens_of_steps"] = [int(rows.lengths[step].sum()) for step in steps]
    result.facts["device_memory_bytes"] = peak_memory_bytes(device)


def row_facts(rows: TokenRows) -> RowFacts:
    """What the sums of `health/hours.py` need of the rows."""
    labels = np.add.reduceat(np.asarray(rows.is_target, np.int64), np.asarray(rows.offsets[:-1]))
    sample = tuple(zip(rows.lengths.tolist(), labels.tolist(), strict=True))
    return RowFacts(len(rows), sample, int(rows.lengths.max()), NUM_SHARED, "drawn")


def told(record: dict[str, Any], trains: str, size: str, facts: RowFacts, ceiling: float) -> dict[str, Any]:
    """Rates of one run, its share of the ceiling, and the card's stage extrapolated."""
    rate = record["figures"]["row_tokens_per_second"]
    shape = SIZES[size]
    known = Shape(
        shape["num_layers"], shape["hidden_size"], shape["intermediate_size"], shape["num_heads"], shape["num_heads"],
        shape["hidden_size"] // shape["num_heads"], shape["num_rows"],
    )  # fmt: skip
    kind = "full" if trains == "full" else "lora"
    learns = Learns(kind, "all", 0 if kind == "full" else 64, () if kind == "full" else TARGETS)
    flops = flops_per_token(known, learns, facts, shares_prefix=True)
    executed = flops.executed if record["arm"] == OURS else flops.plain
    return {
        **record["figures"], "executed_gflop_a_row_token": executed / 1e9,
        "tflops_executed": rate * executed / 1e12, "share_of_ceiling": rate * executed / 1e12 / ceiling,
        "extrapolated_hours_of_the_cards_stage": CARD_EPOCHS[trains] * CARD_TOKENS / rate / 3600,
        "device_memory_gib": record.get("device_memory_bytes", 0) / 2**30,
    }  # fmt: skip


def main() -> None:
    """Measure and write; with the name of a job's file: be the process of one run."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        run(our_run)
        return
    asked = _asked()
    device, began = pick_device(asked.device), time.monotonic()
    rows = belle_like((WARM_UP + asked.steps) * STEP_ROWS[asked.size], SIZES[asked.size]["num_rows"])
    facts, rates = row_facts(rows), rate_of_products(device, asked.size)
    report: dict[str, Any] = {
        "date": str(date.today()), "commit": commit(), "command": " ".join(["python bench/h200.py", *sys.argv[1:]]),
        "machine": machine_name(device), "torch": torch.__version__, "size": asked.size,
        "rows_a_step": STEP_ROWS[asked.size], "mean_tokens": facts.mean_tokens, "mean_labels": facts.mean_labels,
        "products_tflops": rates, "runs": {}, "not_begun": [],
    }  # fmt: skip
    arms = [Arm(OURS, OURS), *([TUNED] if asked.trl else [])]
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        if asked.trl:
            _write_for_peers(rows, asked.size, Path(scratch))
        for trains in asked.trains:
            for arm in in_turns(arms) if asked.trl else arms:
                if time.monotonic() - began + longest > 60 * asked.minutes:
                    report["not_begun"].append(f"{trains}: {arm.name}")
                    continue
                started = time.monotonic()
                record = _run(arm, trains, asked, device, rows, Path(scratch))
                longest = max(longest, time.monotonic() - started)
                if "error" not in record:
                    record["figures"] = figures(record, record["tokens_of_steps"], STEP_ROWS[asked.size], WARM_UP)
                    record |= {"told": told(record, trains, asked.size, facts, max(rates.values()))}
                report["runs"].setdefault(trains, []).append(record)
                print(f"{trains}: {arm.name}: {json.dumps(record.get('told') or record['error'])}", flush=True)
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(asked.out)


def _run(
    arm: Arm, trains: str, asked: argparse.Namespace, device: torch.device, rows: TokenRows, folder: Path
) -> dict[str, Any]:
    job = {
        "arm": arm.name, "settings": arm.settings, "shape": SIZES[asked.size], "device": str(device), "trains": trains,
        "precision": "bf16" if device.type == "cuda" else "fp32", "batch_rows": STEP_ROWS[asked.size],
        "num_rows": len(rows), "num_steps": WARM_UP + asked.steps, "first_new_id": None,
        "threads": 1 if device.type == "cpu" else 8, "targets": list(TARGETS), "peak_lr": 2e-5, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "check": False, "packs": 1, "model": str(folder), "rows": str(folder / "rows.json"),
        "is_drawn": True,
    }  # fmt: skip
    if arm.peer == OURS:
        return run_script(Path(sys.executable), Path(__file__), job, folder)
    record = run_script(asked.trl, PEERS / "trl_arm.py", job, folder, {})
    steps = rows.lengths.reshape(-1, STEP_ROWS[asked.size])[: job["num_steps"]]
    return record if "error" in record else record | {"tokens_of_steps": steps.sum(axis=1).tolist()}


def _write_for_peers(rows: TokenRows, size: str, folder: Path) -> None:
    """The rows, a config without weights, and a tokenizer no row is made with: what a peer's arm reads."""
    given = [rows.row(number) for number in range(len(rows))]
    told_rows = [{"ids": ids.tolist(), "is_target": is_target.astype(int).tolist()} for ids, is_target in given]
    (folder / "rows.json").write_text(json.dumps(told_rows))
    train_base_tokenizer(list(read_texts(ROOT / "examples" / "data" / "chinese.txt")), 3_000).save(folder)
    with torch.device("meta"):
        new_causal(**SIZES[size], seed=0).config.save_pretrained(folder)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trains", nargs="+", choices=sorted(CARD_EPOCHS), default=["lora-rows", "full"])
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun that would end later")
    parser.add_argument("--trl", type=Path, help="the Python of an environment that holds TRL")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    name = f"{date.today()}-{'h200' if asked.device == 'cuda' else 'cpu'}-{asked.size}.json"
    asked.out = asked.out or ROOT / "bench" / "results" / name
    return asked


if __name__ == "__main__":
    main()
