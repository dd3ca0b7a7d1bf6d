"""Ranks on two hosts, as network namespaces of this machine: one run; a host cut off or dead ends it by name, in time.

The same command then goes on to the weights of the run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import ended, free_port, on_ranks, started
from rank_stage import AT, CPU, PATIENCE, run_of, whole
from tiny_training import weights_sha256
from two_hosts import ADDRESSES, WIRE, Hosts, move_to, two_hosts

from graftlm.errors import UserError
from graftlm.training.checkpoint import load_checkpoint, newest_checkpoint
from graftlm.training.joining import joined
from graftlm.training.place import place_here
from graftlm.training.ranks import ALONE
from graftlm.training.trained import TRAINED


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def on_host(hosts: Hosts, port: int, folder: Path, fault: str = "") -> str:
    """Train as the rank of this host; what happens at step `AT` happens to host 1. Errors as the command line's."""
    here = place_here().rank
    move_to(hosts.names[here])
    where = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": WIRE}
    os.environ.update(where, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, PATIENCE, 20.0) as ranks:
            run = run_of(ranks, folder)
            record = run._record

            def fail(step_record: Any) -> None:
                record(step_record)
                if fault and step_record.step == AT and here == 1:
                    hosts.cut_off(1)
                    if fault == "dead":
                        os.kill(os.getpid(), signal.SIGKILL)

            run._record = fail  # type: ignore[method-assign]
            run.run()
            return weights_sha256(run.model)
    except UserError as error:
        print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


def trained(hosts: Hosts, folder: Path, logs: Path, fault: str = "") -> dict[int, int]:
    """Exit codes by host."""
    logs.mkdir()
    return ended(started(2, on_host, hosts, free_port(), folder, fault, folder=logs), 60)


def test_two_hosts_train_what_two_ranks_of_one_do(hosts: Hosts, tmp_path: Path) -> None:
    """And one rank alone, but for the order of sums."""
    assert trained(hosts, tmp_path / "run", tmp_path / "logs") == {0: 0, 1: 0}
    told = {(tmp_path / "logs" / f"{rank}.json").read_text().strip('"') for rank in (0, 1)}
    assert told == set(on_ranks(2, whole, tmp_path / "one-host", folder=tmp_path / "one"))
    whole(ALONE, tmp_path / "alone")
    alone, both = (load_checkpoint(tmp_path / name / TRAINED).tensors["weights"] for name in ("alone", "run"))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fault", ["cut off", pytest.param("dead", marks=pytest.mark.soak)])
def test_a_host_cut_off_or_dead_ends_the_run_by_name_and_it_goes_on(hosts: Hosts, tmp_path: Path, fault: str) -> None:
    """R4: its machine says nothing more, not even that the connection is closed."""
    codes = trained(hosts, tmp_path / "run", tmp_path / "logs", fault)
    hosts.lay_wire()
    said = {rank: (tmp_path / "logs" / f"{rank}.err").read_text() for rank in (0, 1)}
    assert codes == {0: 130, 1: 130 if fault == "cut off" else -signal.SIGKILL}, said
    named = f"Rank 1 of 2 did not answer for {PATIENCE:g} s: it hangs, or its machine is cut off."
    assert named in said[0]
    if fault == "cut off":
        assert "Rank 0 of 2 did not answer" in said[1]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert load_checkpoint(newest).values["step"] == AT - 1
    assert trained(hosts, tmp_path / "run", tmp_path / "again") == {0: 0, 1: 0}
    assert trained(hosts, tmp_path / "whole", tmp_path / "uninterrupted") == {0: 0, 1: 0}
    again, uninterrupted = (tmp_path / name / TRAINED / "weights.safetensors" for name in ("run", "whole"))
    assert again.read_bytes() == uninterrupted.read_bytes()
