"""One command as several processes: started through torch's own launcher, each of them a rank of the run.

Owns what `--gpus` starts here, and `--nodes` on each of several machines; what a started process does by its rank; and
how the end of them all becomes one exit code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graftlm.errors import Interrupted, RankLost, UserError

if TYPE_CHECKING:
    from graftlm.pipeline import RunResult
    from graftlm.recipe import Recipe
    from graftlm.training.place import Place
    from graftlm.training.ranks import Ranks

SHUTDOWN_SECONDS = "120"  # in which ranks asked to stop may finish their step and save
LOG_LEVEL, UNHEARD = "TORCH_CPP_LOG_LEVEL", "FATAL"
"""While machines meet, torch dumps its stack for each try to reach one that is not there yet."""
PORT = 29500  # where machines meet, as torchrun has it


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a run, on each of which the same command is given: how many, which this is (from 0), and where
    the first of them is reached."""

    count: int = 1
    number: int = 0
    first: str = ""
    port: int = PORT


def machines_of(nodes: int | None, node_rank: int | None, master: str | None, gpus: int | None) -> Machines:
    """The machines that flags tell; one where none is given. Raises UserError for half of it, or nonsense."""
    if nodes is None or nodes == 1:
        if node_rank or master is not None:
            raise UserError("--node-rank and --master belong to --nodes.", "Give --nodes, or leave them out.")
        return Machines()
    needed = {"--gpus": gpus, "--node-rank": node_rank, "--master": master}
    if node_rank is None or not master or gpus is None:
        missing = " and ".join(flag for flag, value in needed.items() if value is None or value == "")
        raise UserError(
            f"--nodes {nodes} needs {missing} too.",
            "Give the same command on every machine: --gpus, how many of each; --master, where the first is reached "
            "(HOST or HOST:PORT); --node-rank, 0 on that one, then 1, 2, ...",
        )
    if node_rank >= nodes:
        raise UserError(f"--node-rank {node_rank}: of {nodes} machines the last is {nodes - 1}.", "They count from 0.")
    host, _, port = master.rpartition(":") if master.count(":") == 1 else (master, "", str(PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UserError(f"--master {master} is no HOST or HOST:PORT.", f"Say first-machine:{PORT}, say.")
    return Machines(nodes, node_rank, host, int(port))


def run_as_rank(place: Place, recipe: Recipe, folder: Path) -> RunResult | None:
    """What one process does: rank 0 walks the road, the others train along and say nothing (None).

    Raises UserError, NumericalStop, DiskError, Interrupted, RankLost on rank 0; the others leave with its exit code,
    and the first of every other machine tells why.
    """
    if place.count > 1:
        _refuse_more_ranks_than_rows(place.count, recipe)
    with contextlib.ExitStack() as silence:
        if place.rank > 0:
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return _run_as_rank(place, recipe, folder)


def _run_as_rank(place: Place, recipe: Recipe, folder: Path) -> RunResult | None:
    from graftlm.device import pick_device, use_all_cores
    from graftlm.pipeline import run_recipe
    from graftlm.training.following import follow
    from graftlm.training.joining import joined

    told = _without_places(recipe.model_dump(mode="json"))
    device = pick_device(recipe.device)
    ranks: Any = None
    try:
        own = recipe.ranks
        with joined(place, told, device, own.timeout_seconds, own.join_seconds, own.shard) as ranks:
            if ranks.is_first:
                return run_recipe(recipe, folder, ranks=ranks)
            use_all_cores()
            follow(ranks, device)
    except (UserError, Interrupted) as error:
        # Of every machine one: whoever looks at that machine sees why.
        if place.local_rank == 0 or (ranks is not None and ranks.speaks):
            raise _with_stacks(error, ranks, folder) from None
        raise typer.Exit(error.exit_code if isinstance(error, UserError) else RankLost.exit_code) from None
    return None


def _with_stacks(error: UserError | Interrupted, ranks: Ranks | None, folder: Path) -> UserError | Interrupted:
    """The error, and where it is written what every rank was doing, if one was found to hang."""
    from graftlm.training.stacks import keep_stacks

    kept = keep_stacks(folder, ranks.stacks) if ranks is not None and ranks.stacks else None
    if kept is None or not isinstance(error, UserError):
        return error
    return type(error)(f"{error.problem} What every thread of each was doing then: {kept}", error.fix)


def launch(
    num_ranks: int, place: Place, recipe: Recipe, arguments: Sequence[str], machines: Machines = Machines()
) -> None:
    """Start `graftlm run` with `arguments` in `num_ranks` processes of this machine and wait for their end.

    Raises UserError before anything is started, and where another machine does not come; typer.Exit with the code of
    the rank that failed first; RankLost where one was killed.
    """
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    from graftlm.device import num_cores, pick_device
    from graftlm.training.joining import refuse_missing_deepspeed, refuse_uneven_machines
    from graftlm.training.place import Place

    if place.count > 1:
        raise UserError(
            f"This is rank {place.rank} of {place.count} already: --gpus would start {num_ranks} more for each.",
            "Leave --gpus out under torchrun; its --nproc-per-node says how many.",
        )
    if pick_device(recipe.device).type == "cuda" and num_ranks > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"--gpus {num_ranks}: this machine has {there}.", f"Ask for at most {there}.")
    _refuse_more_ranks_than_rows(num_ranks * machines.count, recipe)
    refuse_missing_deepspeed(recipe.ranks.shard)
    if recipe.ranks.shard == "hybrid":
        refuse_uneven_machines(Place(0, num_ranks * machines.count, 0, num_ranks))
    if machines.count > 1:
        _refuse_unknown_host(machines)
    logging.disable(logging.CRITICAL)  # the launcher's story of an end; ours is below
    if os.environ.get(LOG_LEVEL) == UNHEARD:
        os.environ[LOG_LEVEL] = "ERROR"  # of the ranks that are started now
    # torchrun would give every rank one thread; a machine's cores are shared out instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    with tempfile.TemporaryDirectory(prefix="graftlm-ranks-") as logs:
        asked = [f"--nproc-per-node={num_ranks}", "--max-restarts=0", f"--log-dir={logs}"]
        try:
            torchrun(parse_args([*_meeting(machines, recipe), *asked, "-m", "graftlm", "run", *arguments]))
        except ChildFailedError as error:
            _end(error, num_ranks)
        except SignalException as error:
            raise typer.Exit(RankLost.exit_code) from error
        except DistError as error:
            raise _not_met(machines, recipe, error) from None


def _meeting(machines: Machines, recipe: Recipe) -> list[str]:
    """What torchrun is told of where the machines meet."""
    if machines.count == 1:
        return ["--standalone"]
    return [
        f"--nnodes={machines.count}",
        f"--node-rank={machines.number}",
        f"--master-addr={machines.first}",
        f"--master-port={machines.port}",
        f"--rdzv-conf=timeout={recipe.ranks.join_seconds}",
    ]


def _refuse_unknown_host(machines: Machines) -> None:
    """Raises UserError at once, where the launcher would ask for the whole time machines may take to come."""
    try:
        socket.getaddrinfo(machines.first, machines.port)
    except OSError as error:
        raise UserError(
            f"--master {machines.first}: this machine knows no host of that name ({error.strerror}).",
            "Give the first machine's address, or a name that every machine knows.",
        ) from None


def _not_met(machines: Machines, recipe: Recipe, error: Exception) -> UserError:
    """Why the machines did not come together."""
    where, waited = f"{machines.first}:{machines.port}", f"within {recipe.ranks.join_seconds} s"
    told = str(error).splitlines()[0]
    if machines.number == 0:
        return UserError(
            f"Not all {machines.count} machines reached this one, the first, at {where} {waited} ({told}).",
            "Give the same command on every machine, with its own --node-rank, and let that port through.",
        )
    return UserError(
        f"Machine {machines.number} of {machines.count} (from 0) did not reach the first at {where} {waited} ({told}).",
        "Is the run started there, with --node-rank 0? Is that its address, and is the port let through?",
    )


def _end(error: Any, num_ranks: int) -> None:
    """What the first failures mean for all. A rank that left by itself has told why; one that was killed could not."""
    codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
    left = [code for code in codes.values() if code > 0]
    if left:
        # Of a rank that failed and one that lost it: the one that failed.
        raise typer.Exit(next((code for code in left if code != RankLost.exit_code), left[0]))
    rank, code = next(iter(codes.items()))
    raise RankLost(
        f"Rank {rank} of {num_ranks} was ended by {signal.Signals(-code).name}; the others have stopped.",
        "Run the same command again: it goes on from the last checkpoint. SIGKILL is often the system's, for want of "
        "memory: lower stages.NAME.micro_batch_tokens, or --gpus.",
    )


def _refuse_more_ranks_than_rows(num_ranks: int, recipe: Recipe) -> None:
    """Raises UserError where a step of some stage has fewer rows than there are ranks to share them."""
    scratch = recipe.base.scratch
    stages = {f"stages.{stage.name}": stage for stage in recipe.stages}
    if scratch is not None:
        stages["base.scratch.training"] = scratch.training
    few = {place: stage.batch_rows for place, stage in stages.items() if stage.batch_rows < num_ranks}
    if few:
        place, rows = min(few.items(), key=lambda item: item[1])
        raise UserError(
            f"{num_ranks} ranks would share {rows} row{'s' * (rows > 1)} a step ({place}.batch_rows).",
            f"Take no more ranks than that, or set {place}.batch_rows={num_ranks} or more (another training).",
        )


def _without_places(value: Any) -> Any:
    """A recipe's values with paths cut to their last name: where a machine keeps its files is its own matter."""
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
