"""`graftlm run` through torchrun on two hosts, as network namespaces: one cut off or dead, and the run gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import free_port
from tiny_recipe import write_tiny_recipe
from two_hosts import ADDRESSES, WIRE, Hosts, two_hosts

from graftlm.run import read_json, read_metrics

OVERRIDES = ("report.exact_questions=null", "report.num_samples=0", "stages.full.epochs=12", "ranks.timeout_seconds=5")
END_SECONDS = 180


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def begun(hosts: Hosts, recipe: Path, run: Path, logs: Path) -> list[subprocess.Popen[bytes]]:
    """An agent of torchrun's on each host, all that the guide says to type."""
    logs.mkdir()
    port = free_port()
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = [f"--master-addr={ADDRESSES[0]}", f"--master-port={port}"]
    asked = ["-m", "graftlm", "run", str(recipe), *OVERRIDES, "--out", str(run)]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *start, f"--node-rank={node}", *where, *asked],
            stdout=subprocess.DEVNULL, stderr=(logs / f"{node}.err").open("w"),
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": WIRE},
        )
        for node, host in enumerate(hosts.names)
    ]  # fmt: skip


def ended(agents: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes; an agent that does not end in time is killed and fails the test."""
    until = time.monotonic() + seconds
    try:
        return [agent.wait(max(0.1, until - time.monotonic())) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


def wait_for_steps(metrics: Path, log: Path, num_more: int) -> None:
    """Until so many steps more are taken."""
    until, first = time.monotonic() + END_SECONDS, len(read_metrics(metrics)) if metrics.is_file() else 0
    while time.monotonic() < until:
        if metrics.is_file() and len(read_metrics(metrics)) >= first + num_more:
            return
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_torchrun_on_two_hosts_survives_the_loss_of_either_kind(hosts: Hosts, tmp_path: Path) -> None:
    """R4: both end in bounded time, whoever is left names the other; the same command ends with the same weights."""
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "run"
    metrics = run / "4-full" / "metrics.jsonl"
    for fault in ("cut off", "dead"):
        logs = tmp_path / fault
        agents = begun(hosts, recipe, run, logs)
        wait_for_steps(metrics, logs / "0.err", 4)
        hosts.cut_off(1)
        if fault == "dead":
            hosts.kill_all(1)
        codes = ended(agents, END_SECONDS)
        told = (logs / "0.err").read_text()
        assert all(codes), told
        assert "Rank 1 of 2 did not answer for 5 s: it hangs, or its machine is cut off." in told
        assert not (run / "4-full" / "done.json").exists()
        hosts.lay_wire()
    for out in (run, tmp_path / "whole"):
        logs = tmp_path / f"{out.name}-logs"
        assert ended(begun(hosts, recipe, out, logs), END_SECONDS) == [0, 0], (logs / "0.err").read_text()
    assert "continuing after step" in (tmp_path / "run-logs" / "0.err").read_text()
    assert read_json(run / "4-full" / "done.json")["num_ranks"] == 2
    again, whole = (folder / "6-model" / "model.safetensors" for folder in (run, tmp_path / "whole"))
    assert again.read_bytes() == whole.read_bytes()
