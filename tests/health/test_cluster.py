"""A stage on a cluster: the formulas against worked cases, a simulation of failures, and limits that are named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from graftlm.health.cluster import (
    Cluster,
    Load,
    all_reduce_seconds,
    best_interval_hours,
    cluster_hours,
    communication_seconds,
    expected_hours,
    gather_seconds,
    saving_seconds,
    slowest_rank,
    tree_seconds,
)
from graftlm.health.sharding import WHOLE, Share

CLUSTER = Cluster(
    gpus=8, nodes=4, link_bytes=400e9, network_bytes=50e9, copy_bytes=10e9, disk_bytes=1e9, failures=0.001
)
LOAD = Load(
    share=WHOLE, num_steps=1000, step_seconds=2.0, summed_bytes=8e9, scattered_bytes=0, weight_bytes=0,
    checkpoint_bytes=30e9, largest_bytes=1e9, num_micro_batches=3, restart_seconds=600,
)  # fmt: skip
CUT = replace(LOAD, share=Share("layers", 32), summed_bytes=1e9, scattered_bytes=8e9, weight_bytes=4e9)


def simulated_hours(
    work_hours: float, interval_hours: float, checkpoint_hours: float, restart_hours: float, mean_hours: float,
    *, seed: int = 0, num_runs: int = 200,
) -> np.ndarray:  # fmt: skip
    """Hours of `num_runs` runs (num_runs,) in which failures are drawn, exponential times apart.

    A failure loses what was done since the last checkpoint, and a checkpoint being written; what restarts may fail too.
    """
    random, found = np.random.default_rng(seed), np.zeros(num_runs)
    for run in range(num_runs):
        hours = done = 0.0
        next_failure = random.exponential(mean_hours)
        while done < work_hours:
            stretch = min(interval_hours, work_hours - done)
            needed = stretch + checkpoint_hours
            while hours + needed > next_failure:
                hours, needed = next_failure, restart_hours + stretch + checkpoint_hours
                next_failure += random.exponential(mean_hours)
            hours += needed
            done += stretch
        found[run] = hours
    return found


def test_a_ring_sends_what_the_formula_says() -> None:
    assert all_reduce_seconds(8e9, 4, 1e9) == pytest.approx(2 * 3 / 4 * 8)
    assert gather_seconds(8e9, 4, 1e9) == pytest.approx(3 / 4 * 8)
    assert communication_seconds(LOAD, CLUSTER) == pytest.approx(2 * 31 / 32 * 8 / 50)
    # three micro-batches: weights twice, gradients once, each 31/32 of it at the network's speed, and what lies whole
    assert communication_seconds(CUT, CLUSTER) == pytest.approx(31 / 32 * (3 * 16 + 2 * 1) / 50)
    for share, num_bytes in ((Share("zero2", 32), 3 * 8 + 4), (Share("zero3", 32), 3 * 16)):
        of_zero = replace(CUT, share=share, summed_bytes=0)
        assert communication_seconds(of_zero, CLUSTER) == pytest.approx(31 / 32 * num_bytes / 50)
    assert [tree_seconds(8e9, n, 1e9) for n in (1, 2, 5, 1024)] == [0, 8, 24, 80]
    # within each of four machines at their links' speed, then eight parts of 1 GB each through one machine's network
    hybrid = communication_seconds(replace(CUT, share=Share("layers", 8)), CLUSTER)
    assert hybrid == pytest.approx(2 * 31 / 32 * 1 / 50 + 7 / 8 * 3 * 16 / 400 + 3 * 2 * 3 / 4 * 8 / 50)
    one_machine, alone = replace(CLUSTER, nodes=1), replace(CLUSTER, nodes=1, gpus=1)
    assert communication_seconds(LOAD, one_machine) == pytest.approx(2 * 7 / 8 * 8 / 400)
    assert communication_seconds(CUT, alone) == 0


def test_a_checkpoint_in_parts_is_copied_by_all_ranks_and_written_by_all_machines() -> None:
    assert saving_seconds(LOAD, CLUSTER) == (3, 30)
    # a rank's 32nd part of 30 GB is less than the largest tensor, which one rank saves whole
    assert saving_seconds(CUT, CLUSTER) == (pytest.approx(0.1), pytest.approx(7.5))
    assert saving_seconds(replace(CUT, largest_bytes=0), CLUSTER)[0] == pytest.approx(30 / 32 / 10)
    assert saving_seconds(replace(CUT, share=Share("zero3", 32)), CLUSTER) == (3, 30)
    assert saving_seconds(CUT, replace(CLUSTER, checkpoint_seconds=6)) == (6, pytest.approx(7.5))


def test_failures_come_as_often_as_there_are_devices() -> None:
    assert CLUSTER.mean_hours_between_failures == pytest.approx(24 / (32 * 0.001))
    assert math.isinf(replace(CLUSTER, failures=0.0).mean_hours_between_failures)


@pytest.mark.parametrize(("interval", "writing", "restart", "mean"), [(1.0, 0.05, 0.2, 10.0), (0.5, 0.1, 0.5, 1.5)])
def test_a_simulation_of_failures_agrees_with_the_formula(
    interval: float, writing: float, restart: float, mean: float
) -> None:
    """Within four standard errors of 2,000 runs drawn with one seed."""
    found = simulated_hours(20.0, interval, writing, restart, mean, num_runs=2000)
    expected = expected_hours(20.0, interval, writing, restart, mean)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))
    assert expected > 20 + 20 / interval * writing
    assert np.array_equal(found[:5], simulated_hours(20.0, interval, writing, restart, mean, num_runs=5))


@pytest.mark.parametrize(("writing", "mean"), [(0.01, 100.0), (0.05, 10.0), (0.3, 2.0)])
def test_the_best_interval_is_where_the_formula_is_least(writing: float, mean: float) -> None:
    best = best_interval_hours(writing, mean)
    intervals = np.geomspace(best / 5, best * 5, 401)
    hours = [expected_hours(1e6, interval, writing, 0.2, mean) for interval in intervals]
    assert expected_hours(1e6, best, writing, 0.2, mean) <= min(hours) * (1 + 1e-4)
    assert best == pytest.approx(math.sqrt(2 * writing * mean), rel=0.5)  # Young's, of which Daly's is a refinement


def test_hours_are_the_sum_of_their_parts() -> None:
    plain = cluster_hours(LOAD, CLUSTER)
    assert plain.compute == pytest.approx(1000 * 2 / 3600)
    assert plain.communication == pytest.approx(1000 * 2 * 31 / 32 * 8 / 50 / 3600)
    assert plain.total == pytest.approx(plain.compute + plain.communication + plain.checkpoints + plain.failures)
    calm = cluster_hours(LOAD, replace(CLUSTER, failures=0.0))
    assert (calm.failures, calm.interval_steps) == (0, 0)
    assert calm.checkpoints == pytest.approx(3 / 3600)
    often = cluster_hours(LOAD, replace(CLUSTER, checkpoint_every=10, checkpoint_seconds=6))
    assert often.checkpoints == pytest.approx(100 * 6 / 3600)
    assert often.interval_steps == 10
    slow = cluster_hours(LOAD, replace(CLUSTER, disk_bytes=1e8))  # 300 s until a checkpoint is there
    assert slow.failures > plain.failures
    more = [cluster_hours(LOAD, replace(CLUSTER, nodes=nodes, failures=0.05)) for nodes in (4, 32)]
    assert more[1].failures > more[0].failures > 0
    lost = cluster_hours(replace(LOAD, restart_seconds=1e7), replace(CLUSTER, nodes=128, failures=10.0))
    assert math.isinf(lost.total)


def test_the_slowest_rank_has_the_longest_row_where_each_has_one() -> None:
    assert slowest_rank([100], 64, 8) == 1.0
    assert slowest_rank([10, 90], 512, 512) == pytest.approx(90 / 50, rel=0.05)
    assert 1.0 <= slowest_rank([10, 90], 512, 8) < 1.02
