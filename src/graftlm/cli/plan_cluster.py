"""The part of a plan that is about a cluster: what a person says of it, and its page.

Owns the flags' meaning and the words. The sums are made in `health/cluster.py` and `health/cluster_plan.py`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from graftlm.errors import UserError
from graftlm.health.cluster import Cluster, ClusterHours
from graftlm.health.cluster_plan import (
    COPY_BYTES,
    DISK_BYTES,
    FAILURES,
    HANDED_BYTES,
    HASHED_BYTES_A_SECOND,
    NETWORK_BYTES,
    RESTART_SECONDS,
    StageOnCluster,
    limits_of,
    link_of,
    on_cluster,
)
from graftlm.health.devices import Device
from graftlm.health.plan import StagePlan
from graftlm.run import duration, json_values

WIDTH = 110
WAYS = ("data_parallel", "sharded")


def cluster_of(
    device: Device, gpus: int, nodes: int, network: float | None, failures: float | None,
    checkpoint_seconds: float | None, checkpoint_every: int | None,
) -> Cluster | None:  # fmt: skip
    """The cluster that flags tell; None for one device. Raises UserError for what is none."""
    given = {
        "--network": network, "--failures": failures, "--checkpoint-seconds": checkpoint_seconds,
        "--checkpoint-every": checkpoint_every,
    }  # fmt: skip
    named = [flag for flag, value in given.items() if value is not None]
    if device.is_cpu or gpus * nodes == 1:
        if named:
            raise UserError(
                f"{', '.join(named)}: that is for several GPUs, and the plan is for one {device.title}.",
                "Give --on, --gpus and --nodes too, or leave it out.",
            )
        return None
    for flag, value in given.items():
        if value is not None and not (0 < value < math.inf or (value == 0 and flag == "--failures")):
            raise UserError(f"{flag} {value:g} is no such number.", "Give one above 0 (--failures may be 0).")
    return Cluster(
        gpus=gpus,
        nodes=nodes,
        link_bytes=link_of(device),
        network_bytes=NETWORK_BYTES if network is None else network * 1e9,
        copy_bytes=COPY_BYTES,
        disk_bytes=DISK_BYTES,
        failures=FAILURES if failures is None else failures,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_every=checkpoint_every,
    )


def cluster_result(plans: Sequence[StagePlan], device: Device, cluster: Cluster) -> dict[str, Any]:
    """What is predicted, as plain values."""
    stages = [on_cluster(plan, device, cluster) for plan in plans]
    totals = [stage.best.total if stage.best else None for stage in stages]
    return json_values({
        "is_prediction": True,
        "share": plans[0].share.way,
        "num_devices": cluster.num_devices,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "hours": None if None in totals else sum(filter(None, totals)),
        "mean_hours_between_failures": cluster.mean_hours_between_failures,
        "stages": [_stage(stage) for stage in stages],
        "limits": [
            {name: getattr(limit, name) for name in ("cause", "severity", "where", "evidence", "cure")}
            for limit in limits_of(stages, cluster)
        ],
        "assumptions": list(_assumptions(cluster, stages)),
    })  # fmt: skip


def _stage(stage: StageOnCluster) -> dict[str, Any]:
    return {
        "name": stage.name,
        "rows_per_rank": stage.rows_per_rank,
        "slowest_rank": stage.slowest,
        "restart_seconds": stage.restart_seconds,
        "data_parallel": _hours(stage.data_parallel),
        "sharded": _hours(stage.sharded),
    }


def _hours(hours: ClusterHours | None) -> dict[str, Any] | None:
    if hours is None:
        return None
    return {
        "hours": hours.total, "compute": hours.compute, "communication": hours.communication,
        "checkpoints": hours.checkpoints, "failures": hours.failures, "checkpoint_every": hours.interval_steps,
    }  # fmt: skip


def _assumptions(cluster: Cluster, stages: Sequence[StageOnCluster]) -> Iterator[str]:
    yield (
        f"{cluster.link_bytes / 1e9:.0f} GB/s between GPUs of a machine, {cluster.network_bytes / 1e9:.0f} GB/s from "
        "machine to machine, all of it reached; collectives along a ring, none hidden behind computing"
    )
    yield "a device computes as fast as one alone; ranks wait for the one with most tokens, drawn from rows like these"
    if cluster.checkpoint_seconds is None:
        yield (
            f"a step waits while a checkpoint is copied at {cluster.copy_bytes / 1e9:.0f} GB/s a rank; it is written "
            f"beside training at {cluster.disk_bytes / 1e9:.0f} GB/s a machine: by rank 0, or in parts by all ranks "
            "with ranks.shard full or hybrid"
        )
    between = cluster.mean_hours_between_failures
    told = "no failure" if math.isinf(between) else f"one every {duration(between * 3600)} on average"
    yield (
        f"{cluster.failures:.2g} failures of a GPU in a day, at random times: {told}; where none is given, as in "
        "Llama 3's training (arXiv 2407.21783)"
    )
    longest = max(stage.restart_seconds for stage in stages)
    yield (
        f"a restart takes {duration(longest)} at most: {RESTART_SECONDS} s to start, rows and model handed out by rank "
        f"0 at {HANDED_BYTES / 1e9:.0f} GB/s a hop, the rows' check at {HASHED_BYTES_A_SECOND / 1e9:.0f} GB/s; the "
        "command must be given again (torchrun --max-restarts does)"
    )
    if cluster.checkpoint_every is None:
        yield "checkpoints come as often as loses least (Young 1974, Daly 2006)"


def cluster_told(found: dict[str, Any]) -> Iterator[str]:
    """The prediction for a person."""
    machines = "1 machine" if found["nodes"] == 1 else f"{found['nodes']:,} machines"
    yield ""
    yield f"Predicted for {found['num_devices']:,} devices ({machines} of {found['gpus']}); nothing of it was run"
    if isinstance(found["hours"], float):
        yield f"  training      {duration(found['hours'] * 3600)}, the faster way of each stage"
    for stage in found["stages"]:
        yield f"{stage['name']}: {stage['rows_per_rank']:.3g} rows of a step for each rank"
        for way in WAYS:
            if way == "sharded" or found["share"] == "whole":
                yield f"  {way.replace('_', ' '):<14}{_told_hours(stage[way])}"
    if found["limits"]:
        yield "Where it breaks, or hurts"
        for limit in found["limits"]:
            yield from _wrapped(f"{limit['severity']}: {limit['evidence']} {limit['cure']}")
    yield "Assumed of the cluster"
    for line in found["assumptions"]:
        yield from _wrapped(line)


def _told_hours(hours: dict[str, Any] | None) -> str:
    if hours is None:
        return "does not fit, or nothing is known of its speed"
    if isinstance(hours["hours"], str):
        return "never ends: devices fail faster than a step is done"
    parts = ", ".join(
        f"{name} {duration(hours[name] * 3600)}" for name in ("compute", "communication", "checkpoints", "failures")
    )
    often = f"a checkpoint every {hours['checkpoint_every']:,} steps" if hours["checkpoint_every"] else "one checkpoint"
    return f"{duration(hours['hours'] * 3600)}: {parts}; {often}"


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
