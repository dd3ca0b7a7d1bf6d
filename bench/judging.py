"""From what the arms of `bench/cpu.py` recorded to its table: gates first, then figures, then ratios.

Pure functions of plain records. A record is one run of one arm: class (precision), what trains, seconds of every step,
losses, memory. The arms take turns, ours between any two others; a ratio holds a peer against our runs on either side
of it, since a machine's speed drifts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

OURS = "graftlm"
LOSS_SHARE = 0.005
MOST_MOVED_NATS = 1e-3
FIGURES = (
    "row_tokens_per_second", "samples_per_second", "step_seconds", "step_cpu_seconds", "peak_memory_gib",
    "memory_above_start_gib",
)  # fmt: skip


def figures(record: dict[str, Any], num_tokens: Sequence[int], batch_rows: int, warm_up: int) -> dict[str, Any]:
    """Medians over the steps after warm-up, and their spread: (slowest - fastest) over the median."""
    seconds = record["step_seconds"][warm_up:]
    rates = [tokens / second for tokens, second in zip(num_tokens[warm_up:], seconds, strict=True)]
    gib = 2**30
    return {
        "row_tokens_per_second": statistics.median(rates),
        "samples_per_second": statistics.median(batch_rows / second for second in seconds),
        "step_seconds": statistics.median(seconds),
        "step_cpu_seconds": statistics.median(record["step_cpu_seconds"][warm_up:]),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "peak_memory_gib": record["peak_memory_bytes"] / gib,
        "memory_above_start_gib": (record["peak_memory_bytes"] - record["start_memory_bytes"]) / gib,
    }


def gates(record: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """What forbids to count an arm, in words; `reference` is our record of the same class and training."""
    failed = []
    if record.get("num_targets") != reference["num_targets"]:
        failed.append(f"{record.get('num_targets')} labels in the first step, not {reference['num_targets']}")
    first, expected = record["losses"][0], reference["losses"][0]
    if not abs(first - expected) <= LOSS_SHARE * abs(expected):
        failed.append(f"first loss {first:.4f}, not {expected:.4f}")
    if not record.get("others_moved", 0.0) <= MOST_MOVED_NATS:
        failed.append(f"a changed row moves another row's loss by {record['others_moved']:.2g} nats")
    return failed


def loss_deviation(record: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest relative difference of the two losses over all steps."""
    pairs = zip(record["losses"], reference["losses"], strict=True)
    return max(abs(found - expected) / abs(expected) for found, expected in pairs)


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one arm as one: medians of the figures, the widest spread, every run's rate kept."""
    return {
        **{name: statistics.median(run[name] for run in runs) for name in FIGURES},
        "spread": max(run["spread"] for run in runs),
        "rates_of_runs": [run["row_tokens_per_second"] for run in runs],
    }


def speed_ratios(order: Sequence[tuple[str, dict[str, Any]]], figure: str = "step_seconds") -> dict[str, float]:
    """How often longer each peer takes than we, from runs in the order taken: (arm, figures). Ours on either side."""
    found: dict[str, list[float]] = {}
    for place, (arm, figures_of_run) in enumerate(order):
        if arm == OURS:
            continue
        near = [order[i][1][figure] for i in _ours_around(order, place)]
        found.setdefault(arm, []).append(figures_of_run[figure] / statistics.mean(near))
    return {arm: statistics.median(ratios) for arm, ratios in found.items()}


def _ours_around(order: Sequence[tuple[str, dict[str, Any]]], place: int) -> list[int]:
    before = [i for i in range(place) if order[i][0] == OURS][-1:]
    after = [i for i in range(place + 1, len(order)) if order[i][0] == OURS][:1]
    return before + after


def judge(group: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs of one class and training, in the order taken, each with `figures`: arms, ratios, the best peer.

    The best peer is the fastest setting that passes every gate.
    """
    reference = next((run for run in group if run["arm"] == OURS), None)
    arms: dict[str, dict[str, Any]] = {}
    for run in group:
        if "error" in run:
            arms.setdefault(run["arm"], {"failed": [run["error"]], "settings": run["settings"]})
    done = [run for run in group if "error" not in run]
    if reference is None or "error" in reference:
        return {"arms": arms, "speed_ratios": {}, "cpu_ratios": {}, "best_peer": None}
    order = [(run["arm"], run["figures"]) for run in done]
    ratios = speed_ratios(order)
    for arm in dict.fromkeys(run["arm"] for run in done):
        runs = [run for run in done if run["arm"] == arm]
        checked = next((run for run in runs if "others_moved" in run), runs[0])
        arms[arm] = {
            **merged([run["figures"] for run in runs]), "failed": gates(checked, reference),
            "loss_deviation": loss_deviation(runs[0], reference), "others_moved_nats": checked.get("others_moved"),
            "first_loss": runs[0]["losses"][0], "num_learning_parameters": runs[0].get("num_learning_parameters"),
            "dtypes": runs[0].get("dtypes"), "settings": runs[0]["settings"], "versions": runs[0]["versions"],
        }  # fmt: skip
    passed = [arm for arm in ratios if not arms[arm]["failed"]]
    best = min(passed, key=lambda arm: ratios[arm], default=None)
    # What other work on the machine bends less than times on the clock.
    cpu_ratios = speed_ratios(order, "step_cpu_seconds")
    return {"arms": arms, "speed_ratios": ratios, "cpu_ratios": cpu_ratios, "best_peer": best}


def headline(groups: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The ratios asked for, from `judge`'s findings by "TRAINS PRECISION"; None where nothing was measured.

    Memory is held against the best peer's (its fastest setting) in full training, bf16 where measured, else fp32.
    """

    def against_best(key: str) -> float | None:
        group = groups.get(key)
        return group["speed_ratios"][group["best_peer"]] if group and group["best_peer"] else None

    told: dict[str, float | None] = {
        f"ratio_best_peer_{trains.replace('-', '_')}_{precision}": against_best(f"{trains} {precision}")
        for trains in ("full", "lora", "lora-rows")
        for precision in ("bf16", "fp32")
    }
    for name, figure in (("memory_ratio", "peak_memory_gib"), ("memory_ratio_above_start", "memory_above_start_gib")):
        told[name] = None
        for group in (groups.get("full bf16"), groups.get("full fp32")):
            if group and group["best_peer"] and told[name] is None:
                told[name] = group["arms"][OURS][figure] / group["arms"][group["best_peer"]][figure]
    defaults = [groups[key]["speed_ratios"].get("trl default") for key in ("full bf16", "full fp32") if key in groups]
    told["ratio_trl_default"] = next((ratio for ratio in defaults if ratio is not None), None)
    return told


def table(groups: dict[str, dict[str, Any]]) -> str:
    """One block a class and training; peers fastest first, those that fail a gate marked and told why."""
    lines = []
    for key, group in groups.items():
        lines += [f"{key}", f"  {'':34}{'tok/s':>8}{'rows/s':>8}{'±':>6}{'GiB':>7}{'above':>7}{'ours is':>9}"]
        arms = group["arms"]
        for arm in sorted(arms, key=lambda name: -arms[name].get("row_tokens_per_second", 0)):
            found = arms[arm]
            failed = "; ".join(found["failed"])
            if "row_tokens_per_second" not in found:
                lines.append(f"  {arm:34}{failed}")
                continue
            ratio = group["speed_ratios"].get(arm)
            lines.append(
                f"  {arm:34}{found['row_tokens_per_second']:8.1f}{found['samples_per_second']:8.2f}"
                f"{found['spread'] / 2:6.0%}{found['peak_memory_gib']:7.2f}{found['memory_above_start_gib']:7.2f}"
                + ("" if ratio is None else f"{ratio:8.2f}x")
                + (f"  NOT COUNTED: {failed}" if failed else "  best peer" if arm == group["best_peer"] else "")
            )
    return "\n".join(lines)
