"""Work in a process of its own that may be killed: forked from one that has loaded the libraries already.

The kill stands at an exact place: before the n-th change the process makes on disk, or before the n-th file that a
thread opens there. It may also come from outside, at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["graftlm.pipeline", "graftlm.cli.app"])


def in_child(
    work: Callable[..., Any],
    *given: Any,
    kill_at: int | None = None,
    kill_after: float | None = None,
    in_threads: str = "",
    log: Path | None = None,
) -> tuple[int, int]:
    """Run `work(*given)` in a child; returns its exit code (-9: killed) and how many changes it made on disk.

    `kill_at` kills it, as kill -9 does, before that change, and `kill_after` after so many seconds; with `in_threads`
    only what threads of names that begin so do there is counted, files opened to be read or flushed too. `log` takes
    what it writes to stderr.
    """
    changes = _server.RawValue("i", 0)  # without a lock, which a killed child would keep for ever
    child = _server.Process(target=_work, args=(work, given, kill_at, changes, in_threads, log))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode is not None
    return child.exitcode, changes.value


def in_background(work: Callable[..., Any], *given: Any) -> Any:
    """Run `work(*given)` in a child; returns the process at once."""
    child = _server.Process(target=work, args=given)
    child.start()
    return child


def _work(
    work: Callable[..., Any], given: Any, kill_at: int | None, changes: Any, in_threads: str, log: Path | None
) -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if log is not None:
        sys.stderr = log.open("a", encoding="utf-8")

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if not threading.current_thread().name.startswith(in_threads):
            return
        if event in CHANGES or (event == "open" and (in_threads or arguments[1] in ("w", "a", "wb", "a+"))):
            changes.value += 1
            if changes.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work(*given)


def graftlm(*arguments: object) -> None:
    """The command line, as a process of its own would run it."""
    from graftlm.cli.app import main

    sys.argv = ["graftlm", *map(str, arguments)]
    main()
