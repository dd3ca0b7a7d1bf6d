"""Whether every rank is still there, and what its threads are doing: asked when one of them no longer answers.

Owns these questions and the answers in the store, and the files stacks become. Each rank answers from a thread beside
its work, so that one which hangs can still be asked. Does not know when a rank counts as hanging (`ranks.py`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASKED = "stacks/asked"
ROLL = "roll"
FOLDER = "stacks"
ANSWER_SECONDS = 2.0  # fewer than those who ask wait for the store
SILENT = "It gave no answer: the process is gone, stopped, or inside a call that does not let others run.\n"


def call_roll(store: Any) -> None:
    """Ask every rank whether it is there."""
    store.set(ROLL, "")


def is_alive(store: Any, rank: int) -> bool:
    """Whether a rank has answered that it is."""
    return store.check([f"{ROLL}/{rank}"])


def own_stacks() -> str:
    """Every thread of this process, innermost call first."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def answer_if_asked(store: Any, rank: int) -> None:
    """Say that this rank is there, and put its stacks into the store, where another one asked for it."""
    if store.check([ROLL]):
        store.set(f"{ROLL}/{rank}", "")
    key = _key(rank)
    if store.check([ASKED]) and not store.check([key]):
        store.set(key, own_stacks())


def stacks_told(store: Any, count: int, awaited: Sequence[int] = ()) -> dict[int, str]:
    """By rank, what each said; what is said of a rank that gave no answer. Those `awaited` have some seconds for it."""
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until and not all(store.check([_key(rank)]) for rank in awaited):
        time.sleep(0.1)
    return {rank: store.get(_key(rank)).decode() if store.check([_key(rank)]) else SILENT for rank in range(count)}


def keep_stacks(run: Path, stacks: Mapping[int, str]) -> Path | None:
    """Write a file for each rank below the run's folder; where this machine has none, in one for scratch files.

    Returns their folder, None where nothing can be written.
    """
    with contextlib.suppress(OSError):
        folder = run / FOLDER if run.is_dir() else Path(tempfile.mkdtemp(prefix=f"graftlm-{FOLDER}-"))
        folder.mkdir(exist_ok=True)
        for rank, text in stacks.items():
            (folder / f"rank-{rank}.txt").write_text(text, encoding="utf-8")
        return folder
    return None


def _key(rank: int) -> str:
    return f"stacks/{rank}"
