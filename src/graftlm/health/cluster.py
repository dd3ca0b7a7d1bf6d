"""A stage on a cluster: its hours, with what computing, communication, checkpoints and failures take.

Owns the formulas, and nothing else: plain numbers go in, and every figure that comes out is a prediction. What a step
computes is told by `hours.py`, what a device holds by `memory.py`. No cluster has run this program.

Symbols: N devices, M machines, S bytes of gradients or weights, t hours.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftlm.health.sharding import Share

HOUR = 3600
DAY_HOURS = 24


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is assumed of the machines. `link_bytes` a second between the GPUs of a machine, `network_bytes` a second
    that a machine sends to others, `copy_bytes` a second from a GPU to its machine's memory, `disk_bytes` a second that
    a machine writes; `failures` are of one GPU in one day, whatever fails in it or around it. `checkpoint_seconds`
    (that a step waits for one) and `checkpoint_every` (steps), where they are known."""

    gpus: int
    nodes: int
    link_bytes: float
    network_bytes: float
    copy_bytes: float
    disk_bytes: float
    failures: float
    checkpoint_seconds: float | None = None
    checkpoint_every: int | None = None

    @property
    def num_devices(self) -> int:
        """GPUs of all machines."""
        return self.gpus * self.nodes

    @property
    def slowest_bytes(self) -> float:
        """Bytes a second along the slowest hop of a ring over all devices.

        A ring passes from each machine to the next once, so that one device's stream has that machine's network.
        """
        return self.network_bytes if self.nodes > 1 else self.link_bytes

    @property
    def mean_hours_between_failures(self) -> float:
        """Hours until any GPU fails, on average; infinite where none does."""
        rate = self.num_devices * self.failures / DAY_HOURS
        return 1 / rate if rate else math.inf


def slowest_rank(
    lengths: Sequence[int], batch_rows: int, num_ranks: int, *, seed: int = 0, num_steps: int = 20
) -> float:
    """Tokens of the rank that has most in a step over those of an average one, for rows of such lengths.

    Rows are shared out as `training/batches.py` does: the longest first, each to whom has least.
    """
    random, found = np.random.default_rng(seed), []
    for _ in range(num_steps):
        drawn = np.sort(random.choice(np.asarray(lengths), batch_rows))[::-1]
        held = [0] * num_ranks
        for length in drawn.tolist():
            heapq.heapreplace(held, held[0] + length)
        found.append(max(held) * num_ranks / int(drawn.sum()))
    return float(np.mean(found))


def all_reduce_seconds(num_bytes: float, num_devices: int, bytes_a_second: float) -> float:
    """A sum over devices along a ring: each sends 2 (N - 1) / N of it.

    Source: Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    return 2 * gather_seconds(num_bytes, num_devices, bytes_a_second)


def gather_seconds(num_bytes: float, num_devices: int, bytes_a_second: float) -> float:
    """An all-gather to, or a reduce-scatter of, `num_bytes` along a ring: each sends (N - 1) / N of it."""
    return (num_devices - 1) / num_devices * num_bytes / bytes_a_second


def tree_seconds(num_bytes: float, num_devices: int, bytes_a_second: float) -> float:
    """A broadcast down a binary tree, each round of which sends all of it on: log2 N rounds.

    Source: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005.
    """
    return math.ceil(math.log2(num_devices)) * num_bytes / bytes_a_second


def best_interval_hours(checkpoint_hours: float, mean_hours: float) -> float:
    """Hours of work between checkpoints that lose least to writing them and to failures.

    Source: Young, "A first order approximation to the optimum checkpoint interval", 1974, sqrt(2 C M); the terms after
    it are Daly's, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006.
    """
    if math.isinf(mean_hours):
        return math.inf
    if checkpoint_hours >= 2 * mean_hours:
        return mean_hours
    ratio = checkpoint_hours / (2 * mean_hours)
    return math.sqrt(2 * checkpoint_hours * mean_hours) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_hours


def expected_hours(
    work_hours: float, interval_hours: float, checkpoint_hours: float, restart_hours: float, mean_hours: float
) -> float:
    """Hours from begin to end, with failures that come at random at any time, restarts among them.

    Source: Daly 2006, as above: M e^(R / M) (e^((t + C) / M) - 1) for each interval t. Infinite where that has no
    number.
    """
    interval = min(interval_hours, work_hours)
    num_intervals = work_hours / interval
    if math.isinf(mean_hours):
        return work_hours + num_intervals * checkpoint_hours
    exponents = (restart_hours / mean_hours, (interval + checkpoint_hours) / mean_hours)
    if max(exponents) > 500:
        return math.inf
    return mean_hours * math.exp(exponents[0]) * math.expm1(exponents[1]) * num_intervals


@dataclass(frozen=True, slots=True)
class Load:
    """A stage as a cluster sees it: how it is shared out, bytes that are sent and saved, how long the slowest device
    computes a step, in how many micro-batches, and what a restart takes until that step is taken again.

    `summed_bytes`: of gradients that every rank holds, `scattered_bytes` of those it holds a part of, `weight_bytes` of
    weights as they are gathered; `largest_bytes` of the largest tensor that one rank saves whole.
    """

    share: Share
    num_steps: int
    step_seconds: float
    summed_bytes: float
    scattered_bytes: float
    weight_bytes: float
    checkpoint_bytes: float
    largest_bytes: float
    num_micro_batches: int
    restart_seconds: float


@dataclass(frozen=True, slots=True)
class ClusterHours:
    """Hours of one stage by what they go to; `total` is their sum, infinite where failures leave no progress.

    `interval_steps`: steps between checkpoints, as given or the best there are for these failures; 0: none but the
    last."""

    compute: float
    communication: float
    checkpoints: float
    failures: float
    interval_steps: int

    @property
    def total(self) -> float:
        """Hours from the first step to the end."""
        return self.compute + self.communication + self.checkpoints + self.failures


def communication_seconds(load: Load, cluster: Cluster) -> float:
    """What a step's collectives take, none of it hidden behind computing.

    Gradients that every rank holds are summed once, after the last backward pass; those that are cut after that of
    every micro-batch, into parts. Weights that are cut (resharded after forward) are gathered for the forward and again
    for the backward pass of each; in ZeRO's second stage, what learns is gathered once, when it has moved. Where each
    machine holds all parts (hybrid), that stays within it, and parts are summed between machines.

    Source of the ZeRO stages' volumes: arXiv 1910.02054, section 7.
    """
    n, parts, times = cluster.num_devices, load.share.num_parts, load.num_micro_batches
    if n == 1:
        return 0.0
    num_gathers = {"whole": 0, "zero2": 1}.get(load.share.way, 2 * times)
    cut = times * load.scattered_bytes + num_gathers * load.weight_bytes
    rate = cluster.slowest_bytes if parts == n else cluster.link_bytes
    return (
        all_reduce_seconds(load.summed_bytes, n, cluster.slowest_bytes)
        + gather_seconds(cut, parts, rate)
        + times * all_reduce_seconds(load.scattered_bytes, n // parts, cluster.network_bytes)
    )


def saving_seconds(load: Load, cluster: Cluster) -> tuple[float, float]:
    """How long a step waits while a checkpoint is copied in memory, and how long it is written beside training.

    Layers that are cut are saved in parts, as many bytes a rank as tensors allow, each machine to its own path to the
    disk; elsewhere rank 0 saves all.
    """
    ranks, machines = (cluster.num_devices, cluster.nodes) if load.share.way == "layers" else (1, 1)
    copied, written = (max(load.checkpoint_bytes / count, load.largest_bytes) for count in (ranks, machines))
    waiting = copied / cluster.copy_bytes if cluster.checkpoint_seconds is None else cluster.checkpoint_seconds
    return waiting, written / cluster.disk_bytes


def cluster_hours(load: Load, cluster: Cluster) -> ClusterHours:
    """The hours of a stage. All wait while a checkpoint is copied in memory; it is written beside training, so that a
    failure meanwhile loses that much more, and the next one is not begun before."""
    compute = load.num_steps * load.step_seconds / HOUR
    communication = load.num_steps * communication_seconds(load, cluster) / HOUR
    waiting, writing = (seconds / HOUR for seconds in saving_seconds(load, cluster))
    work, mean = compute + communication, cluster.mean_hours_between_failures
    step = work / load.num_steps
    best = max(best_interval_hours(waiting, mean), writing, step)
    interval = min(cluster.checkpoint_every * step if cluster.checkpoint_every else best, work)
    whole = expected_hours(work, interval, waiting, load.restart_seconds / HOUR + writing, mean)
    checkpoints = work / interval * waiting
    return ClusterHours(
        compute=compute,
        communication=communication,
        checkpoints=checkpoints,
        failures=0.0 if math.isinf(mean) else whole - work - checkpoints,
        interval_steps=round(interval / step) if interval < work else 0,
    )
