"""Several processes that train together over gloo, forked from one that has loaded the libraries; never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child import _server

OUTER_SECONDS = 90  # no test of ours may hang


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank: int, count: int, port: int, local_count: int = 0) -> dict[str, str]:
    """What torchrun sets, on machines of `local_count` ranks each (0: on one)."""
    beside = local_count or count
    return {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank % beside), "LOCAL_WORLD_SIZE": str(beside),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def started(
    count: int, work: Callable[..., Any], *given: Any, folder: Path, only: set[int] | None = None, local_count: int = 0
) -> dict[int, Any]:
    """Start `work(*given)` as each of `count` ranks (of them `only` these); `folder`/RANK.err takes what it tells."""
    port, processes = free_port(), {}
    for rank in sorted(only or range(count)):
        processes[rank] = _server.Process(target=_work, args=(rank, count, port, local_count, folder, work, given))
        processes[rank].start()
    return processes


def ended(processes: dict[int, Any], seconds: float = OUTER_SECONDS) -> dict[int, int]:
    """Exit codes by rank; a process still there after `seconds` is killed and fails the test."""
    until = time.monotonic() + seconds
    late = []
    for rank, process in processes.items():
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            late.append(rank)
            process.kill()
            process.join()
    assert not late, f"ranks {late} had not ended after {seconds:g} s"
    return {rank: process.exitcode for rank, process in processes.items()}


def on_ranks(
    count: int,
    work: Callable[..., Any],
    *given: Any,
    folder: Path,
    shard: Any = "none",
    local_count: int = 0,
    seconds: float = OUTER_SECONDS,
) -> list[Any]:
    """What `work(ranks, *given)` returned (plain JSON) on each rank, all of which ended well in so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = ended(started(count, _with_ranks, shard, work, *given, folder=folder, local_count=local_count), seconds)
    said = {rank: (folder / f"{rank}.err").read_text() for rank in codes}
    assert set(codes.values()) == {0}, f"{codes} {said}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _with_ranks(shard: Any, work: Callable[..., Any], *given: Any) -> Any:
    import torch

    from graftlm.training.joining import joined
    from graftlm.training.place import place_here

    with joined(place_here(), {}, torch.device("cpu"), 30.0, 30.0, shard) as ranks:
        return work(ranks, *given)


def _work(
    rank: int, count: int, port: int, local_count: int, folder: Path, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(environment(rank, count, port, local_count), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    with (folder / f"{rank}.err").open("w", encoding="utf-8") as errors, contextlib.redirect_stderr(errors):
        try:
            found = work(*given)
        except SystemExit:
            raise
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.exit(1)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
