"""A plan's stages on a cluster, and where this program's design would break there.

Owns how a stage's plan becomes loads (data parallel and sharded), and the findings that name a limit. The formulas lie
in `cluster.py`. Everything told is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graftlm.health.cluster import Cluster, ClusterHours, Load, cluster_hours, slowest_rank, tree_seconds
from graftlm.health.devices import Device, rate_of
from graftlm.health.finding import Finding
from graftlm.health.hours import ADAM_BYTES, flops_per_token
from graftlm.health.memory import GIB, WIDE, StageSize
from graftlm.health.plan import StagePlan
from graftlm.health.sharding import WHOLE, Share, layer_bytes
from graftlm.run import duration

PREPARED_TOKENS_A_SECOND = 500_000
"""Tokens that one core reads, cleans, renders and writes a second: measured (bench/data.py)."""
HASHED_BYTES_A_SECOND = 1e9  # of token rows, whose sha256 is checked as a stage begins: assumed
ROW_BYTES = 16  # of a row beside its tokens: where it begins, and the bytes it spells
ORDER_BYTES = 8  # of a row: two epochs' permutations, 4 bytes each
FEW_ROWS = 1.25  # a slowest rank from which on it is worth telling
MUCH = 0.1  # a share of the time that is worth telling
HELD_GIB = 64  # of rows in every process, from which on it is worth telling
LONG_SECONDS = 600  # of sending rows, from which on it is worth telling
HANDED_BYTES = 1e9  # a second from process to process, on the CPUs, as rows and model are handed out: assumed


# Bytes a second and direction between two GPUs of a machine. Sources: NVIDIA's data sheets (NVLink 4, 3 and 2: half of
# what is told for both directions); PCIe 4.0 and 3.0 x16 for the others.
LINKS = {"h200": 450e9, "h100": 450e9, "a100": 300e9, "v100": 150e9, "t4": 16e9, "2080ti": 16e9}
OTHER_LINK = 32e9
NETWORK_BYTES = 50e9  # 400 Gbit a second
COPY_BYTES = 10e9  # a second from a GPU to its machine's memory, as a checkpoint is copied
DISK_BYTES = 1e9
FAILURES = 419 / (54 * 16_384)
"""Unexpected interruptions of a GPU in a day. Source: Llama 3's training, arXiv 2407.21783, section 3.3.4."""
RESTART_SECONDS = 300  # to notice a loss, start all processes again and load libraries


def link_of(device: Device) -> float:
    """Bytes a second between two GPUs of a machine."""
    return LINKS.get(device.name.partition("-")[0], OTHER_LINK)


@dataclass(frozen=True, slots=True)
class StageOnCluster:
    """One stage: hours by what they go to with every device holding everything, and sharded (None: does not fit, or the
    other way is the recipe's).

    `slowest` is the tokens of the rank with most of a step's rows over those of an average one."""

    name: str
    place: str
    rows_per_rank: float
    slowest: float
    row_bytes: float
    num_rows: int
    epoch_tokens: float
    restart_seconds: float
    data_parallel: ClusterHours | None
    sharded: ClusterHours | None

    @property
    def best(self) -> ClusterHours | None:
        """The faster of both ways."""
        found = [hours for hours in (self.data_parallel, self.sharded) if hours is not None]
        return min(found, key=lambda hours: hours.total) if found else None


def on_cluster(plan: StagePlan, device: Device, cluster: Cluster) -> StageOnCluster:
    """A stage's plan on a cluster of such devices."""
    wish, num = plan.wish, cluster.num_devices
    slowest = slowest_rank([tokens for tokens, _ in wish.rows.sample], wish.batch_rows, num) if num > 1 else 1.0
    id_bytes = 2 if wish.shape.num_rows <= 65_536 else 4
    epoch_tokens = wish.rows.mean_tokens * wish.rows.num_rows
    row_bytes = (id_bytes + 1) * epoch_tokens + ROW_BYTES * wish.rows.num_rows
    model_bytes = WIDE * wish.shape.num_parameters
    restart = (
        RESTART_SECONDS + tree_seconds(row_bytes + model_bytes, num, HANDED_BYTES) + row_bytes / HASHED_BYTES_A_SECOND
    )

    def hours(share: Share) -> ClusterHours | None:
        load = _load(plan, device, num, slowest, restart, share)
        return None if load is None else cluster_hours(load, cluster)

    return StageOnCluster(
        wish.name, wish.place, wish.batch_rows / num, slowest, row_bytes, wish.rows.num_rows, epoch_tokens, restart,
        data_parallel=hours(WHOLE) if plan.share.is_whole else None,
        sharded=hours(Share("layers", num) if plan.share.is_whole else plan.share) if num > 1 else None,
    )  # fmt: skip


def _load(
    plan: StagePlan, device: Device, num_devices: int, slowest: float, restart_seconds: float, share: Share
) -> Load | None:
    """What a step asks of the slowest of `num_devices`; None where it does not fit or nothing is known of its speed."""
    wish, rate = plan.wish, rate_of(device, plan.precision)
    way = plan if share == plan.share else plan.sharded
    if way is None or way.micro_batch_tokens is None or not rate:
        return None
    budget, is_checkpointing = way.micro_batch_tokens, way.gradient_checkpointing
    rows, shared = wish.rows, wish.rows.num_shared if wish.shares_prefix else 0
    own_rows = wish.batch_rows / num_devices
    own_tokens = slowest * own_rows * (rows.mean_tokens - shared)
    num_micro_batches = max(1, math.ceil(own_tokens / max(budget - shared, 1)))
    flops = flops_per_token(
        wish.shape, wish.learns, rows, is_checkpointing=is_checkpointing,
        rows_per_batch=max(1.0, own_rows / num_micro_batches), shares_prefix=wish.shares_prefix,
    )  # fmt: skip
    learning = plan.size.learning_parameters
    updating = ADAM_BYTES * learning / device.bandwidth / share.num_parts
    summed, scattered, weights = _sent(plan.size, share)
    return Load(
        share=share,
        num_steps=plan.hours.num_steps,
        step_seconds=slowest * own_rows * rows.mean_tokens * flops.executed / rate + updating,
        summed_bytes=summed,
        scattered_bytes=scattered,
        weight_bytes=weights,
        checkpoint_bytes=plan.size.checkpoint_bytes,
        largest_bytes=plan.size.matrix_bytes if plan.size.learning_rows else 0,
        num_micro_batches=num_micro_batches,
        restart_seconds=restart_seconds,
    )


def _sent(size: StageSize, share: Share) -> tuple[int, int, int]:
    """Bytes of gradients that are summed for all, of those that each rank gets a part of, of weights gathered."""
    learning = WIDE * size.learning_parameters
    match share.way:
        case "whole":
            return learning, 0, 0
        case "layers":  # embedding and head lie whole on every rank
            of_rows = WIDE * size.shape.row_matrices * size.learning_rows * size.shape.hidden_size
            return of_rows, learning - of_rows, layer_bytes(size)
        case "zero2":
            return 0, learning, learning
        case "zero3":  # DeepSpeed is given float32, whatever is multiplied
            return 0, learning, WIDE * size.shape.num_parameters


def limits_of(stages: Sequence[StageOnCluster], cluster: Cluster) -> list[Finding]:
    """What of this program's design breaks, or hurts, at that size."""
    found: list[Finding] = []
    for stage in stages:
        found += [*_few_rows(stage), *_shares(stage)]
    largest = max(stages, key=lambda stage: stage.row_bytes)
    return [*found, *_rows_in_memory(largest, cluster), *_preparing(largest)]


def _few_rows(stage: StageOnCluster) -> Iterator[Finding]:
    if stage.slowest >= FEW_ROWS:
        yield Finding(
            "few-rows-a-rank", "warning", f"{stage.place}.batch_rows", None,
            f"{stage.name}: a step has {stage.rows_per_rank:.3g} rows for a rank, and rows differ in length: the rank "
            f"with most has {stage.slowest:.2f} times the tokens of an average one, and all wait for it.",
            "Fewer devices, or more rows a step, which is another training.",
        )  # fmt: skip


def _shares(stage: StageOnCluster) -> Iterator[Finding]:
    """What takes much of a stage's time besides computing."""
    summed = "as gradients are summed after the last backward pass and not during it"
    gathered = "were none of it hidden behind computing, of which FSDP2 and DeepSpeed hide a part"
    ways = (("data parallel", stage.data_parallel, summed), ("sharded", stage.sharded, gathered))
    for kind, hours, told in ways:
        if hours is None:
            continue
        name, total = f"{stage.name}, {kind}", hours.total
        if math.isinf(total):
            yield Finding(
                "no-progress", "fatal", name, None,
                f"{name}: devices fail faster than a step and its checkpoint are done.", "Fewer devices.",
            )  # fmt: skip
            continue
        if hours.communication > MUCH * total:
            yield Finding(
                "communication", "warning", name, None,
                f"{name}: {hours.communication / total:.0%} of the time is communication, {told}.",
                "A faster network, fewer devices, or more rows a step.",
            )  # fmt: skip
        if hours.checkpoints > MUCH / 2 * total:
            yield Finding(
                "checkpoints", "warning", name, None,
                f"{name}: {hours.checkpoints / total:.0%} of the time goes to checkpoints: all wait while weights "
                "and moments are copied.",
                "Fewer checkpoints, where failures are rare (checkpoint_every).",
            )  # fmt: skip
        if hours.failures > MUCH / 2 * total:
            yield Finding(
                "failures", "warning", name, None,
                f"{name}: {hours.failures / total:.0%} of the time is lost to failures: one rank lost ends the run for "
                "all, and it begins again at the last checkpoint.",
                f"checkpoint_every={max(hours.interval_steps, 1)} loses least; spare machines shorten a restart.",
            )  # fmt: skip


def _rows_in_memory(stage: StageOnCluster, cluster: Cluster) -> Iterator[Finding]:
    """Rank 0 reads the token rows from disk; the others are sent all of them, and keep them in memory."""
    if cluster.num_devices == 1:
        return
    held = stage.row_bytes + ORDER_BYTES * stage.num_rows
    seconds = tree_seconds(stage.row_bytes, cluster.num_devices, HANDED_BYTES)
    if held > HELD_GIB * GIB:
        yield Finding(
            "rows-in-every-process", "fatal" if held * cluster.gpus > 2**42 else "warning", "data", None,
            f"Every rank holds all token rows and the order of an epoch: {held / GIB:,.0f} GiB, "
            f"{held * cluster.gpus / GIB:,.0f} GiB in each machine of {cluster.gpus}.",
            "Train on a sample (data.sources.N.sample); shards of rows by rank are not built.",
        )  # fmt: skip
    if seconds > LONG_SECONDS:
        yield Finding(
            "rows-over-the-wire", "warning", "data", None,
            f"As a stage begins, and after every restart, rank 0 hands {stage.row_bytes / GIB:,.0f} GiB of rows to all "
            f"others through the CPUs (gloo): {duration(seconds)} at {HANDED_BYTES / 1e9:.0f} GB/s a hop.",
            "Fewer rows; reading them from a shared disk is not built.",
        )  # fmt: skip


def _preparing(stage: StageOnCluster) -> Iterator[Finding]:
    """The data step runs on one core of one machine."""
    days = stage.epoch_tokens / PREPARED_TOKENS_A_SECOND / 86_400
    if days > 0.5:
        yield Finding(
            "data-step-on-one-core", "warning", "data", None,
            f"The data step reads, cleans and renders on one core of rank 0's machine: {days:,.1f} days at "
            f"{PREPARED_TOKENS_A_SECOND:,.0f} tokens a second (measured on one core, bench/data.py), more with near "
            "duplicates; the other machines wait.",
            "Prepare the data once on one machine (graftlm preflight RECIPE takes the steps before the first stage), "
            "then start the ranks: the finished step is kept.",
        )  # fmt: skip
