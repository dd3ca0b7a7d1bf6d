"""How the processes of a run find each other, and what is refused before any of them trains.

Owns the store, the process group, what each rank answers beside its work (rank 0's sign of life, stacks), and the
checks that all run the same thing. Does not start processes (`cli/launch.py`) and does not know what they do together
(`ranks.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from graftlm import __version__
from graftlm.errors import RankLost, UserError
from graftlm.recipe import Shard
from graftlm.run import say
from graftlm.step import changed_keys
from graftlm.training.place import Place
from graftlm.training.ranks import ALONE, BEAT, Ranks, within
from graftlm.training.stacks import answer_if_asked

BEAT_SECONDS = 1.0
FAREWELL_SECONDS = 10.0
BESIDE = "ranks on its machine"
ZERO_STAGES = {"zero2": 2, "zero3": 3}


@contextlib.contextmanager
def joined(
    place: Place,
    recipe: Mapping[str, Any],
    device: torch.device,
    patience_seconds: float,
    join_seconds: float,
    shard: Shard = "none",
) -> Iterator[Ranks]:
    """The ranks of this run, once all are there and agree on what to run; at the end each tells the others why it goes.

    `recipe` in plain values must be the same on every rank; `shard` says over whom a model's layers are shared out.
    Raises UserError, RankLost.
    """
    if place.count == 1:
        if shard != "none":
            say(f"ranks.shard={shard}: this process is alone and holds all the weights")
        yield ALONE
        return
    if shard == "hybrid":
        refuse_uneven_machines(place)
    refuse_missing_deepspeed(shard)
    if device.type == "cuda":
        _take_gpu(place)
    store = _store(place, join_seconds)
    own = {"graftlm": __version__, "torch": torch.__version__, "recipe": recipe}
    if shard == "hybrid":
        own[BESIDE] = place.local_count
    _meet(store, place, own, join_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=patience_seconds)
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=patience)
    except RuntimeError as error:
        raise UserError(
            f"Rank {place.rank} of {place.count} reached the meeting point but not the other ranks: "
            f"{str(error).splitlines()[0][:200]}",
            "Let the machines reach each other on any port; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME name the network.",
        ) from None
    mesh = _mesh(place, device, patience, shard)
    ranks = Ranks(place.rank, place.count, store, patience_seconds, place.local_count, mesh, ZERO_STAGES.get(shard, 0))
    is_over = threading.Event()
    beside = _store(place, join_seconds, is_second=True)
    threading.Thread(target=_attend, args=(beside, place.rank, is_over), daemon=True, name="attending").start()
    try:
        yield ranks
    except BaseException as error:
        ranks.leave_word(error)
        if not isinstance(error, RankLost):
            dist.destroy_process_group()  # whoever waits for this rank in a sum is told at once
            ranks.take_leave(FAREWELL_SECONDS)
        raise
    finally:
        is_over.set()
    ranks.take_leave(FAREWELL_SECONDS)
    dist.destroy_process_group()


def refuse_missing_deepspeed(shard: Shard) -> None:
    """Raises UserError where `shard` asks for DeepSpeed and it is not installed."""
    if shard in ZERO_STAGES and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"ranks.shard={shard} needs DeepSpeed, which is not installed.",
            "Install it (pip install 'graftlm[deepspeed]'), or set ranks.shard=full, which needs nothing more.",
        )


def refuse_uneven_machines(place: Place) -> None:
    """Raises UserError where sharding within machines and copying between them has nothing to stand on."""
    if place.count % place.local_count:
        raise UserError(
            f"{place.count} ranks are no whole number of machines with {place.local_count} each (ranks.shard=hybrid).",
            "Start as many ranks on every machine, or set ranks.shard=full.",
        )
    if place.local_count in (1, place.count):
        found = "one machine" if place.local_count == place.count else "one rank on each machine"
        raise UserError(
            f"ranks.shard=hybrid shards within machines and copies between them, and this is {found}.",
            "Set ranks.shard=full.",
        )


def _mesh(place: Place, device: torch.device, patience: timedelta, shard: Shard) -> DeviceMesh | None:
    """Over whom layers are shared out: along the last dimension; along a first one lie copies (machines)."""
    if shard == "none" or shard in ZERO_STAGES:
        return None
    if shard == "full":
        world: Any = dist.group.WORLD
        return DeviceMesh.from_group(world, device.type)
    numbers = torch.arange(place.count).view(-1, place.local_count)
    # Not made by the mesh: its own groups would wait longer than this run's patience.
    groups: Any = [
        dist.new_subgroups_by_enumeration(along.tolist(), timeout=patience)[0] for along in (numbers.T, numbers)
    ]
    return DeviceMesh.from_group(groups, device.type, mesh=numbers, mesh_dim_names=("copies", "parts"))


def _take_gpu(place: Place) -> None:
    there = torch.cuda.device_count()
    if place.local_rank >= there:
        raise UserError(
            f"Rank {place.rank} is number {place.local_rank} on this machine, which has {there} GPUs (from 0).",
            f"Start at most {there} ranks here, or set device=cpu.",
        )
    torch.cuda.set_device(place.local_rank)


def _store(place: Place, join_seconds: float, is_second: bool = False) -> Any:
    """The store at MASTER_ADDR: held by torchrun's agent, or by rank 0 itself."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    is_holder = place.rank == 0 and not _is_agents() and not is_second
    try:
        store = dist.TCPStore(
            address, int(port), place.count, is_holder, timedelta(seconds=join_seconds), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Rank {place.rank} of {place.count} did not reach rank 0 at {address}:{port} within {join_seconds:g} s.",
            f"Is it started, and may this port be reached? ({str(error).splitlines()[0][:120]})",
        ) from None
    # A restarted group must not read what the one before it left.
    return dist.PrefixStore(f"graftlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_agents() -> bool:
    """Whether torchrun's agent holds the store: it outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(store: Any, place: Place, own: Mapping[str, Any], join_seconds: float) -> None:
    """Wait until every rank has said what it runs; refuse ranks that run something else. Raises UserError."""
    told = within(join_seconds + 2 * FAREWELL_SECONDS, lambda: _told_by_all(store, place, own, join_seconds)) or {}
    missing = [str(rank) for rank in range(place.count) if rank not in told]
    if missing:
        raise UserError(
            f"Rank {', '.join(missing)} of {place.count} did not come within {join_seconds:g} s.",
            "Is it started on every machine, with one --nnodes and address? ranks.join_seconds sets how long to wait.",
        )
    _refuse_different([told[rank] for rank in range(place.count)])


def _told_by_all(store: Any, place: Place, own: Mapping[str, Any], join_seconds: float) -> dict[int, dict[str, Any]]:
    """What each rank that came in time runs."""
    until = time.monotonic() + join_seconds
    store.set(f"runs/{place.rank}", json.dumps(own))
    told: dict[int, dict[str, Any]] = {}
    for rank in range(place.count):
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"runs/{rank}"], timedelta(seconds=max(0.01, until - time.monotonic())))
            told[rank] = json.loads(store.get(f"runs/{rank}"))
    store.set(f"met/{place.rank}", "")
    if place.rank == 0 and not _is_agents():  # whose process holds the store: the others must have read it
        with contextlib.suppress(RuntimeError):
            store.wait([f"met/{rank}" for rank in told], timedelta(seconds=FAREWELL_SECONDS))
    return told


def _refuse_different(told: Sequence[Mapping[str, Any]]) -> None:
    first = told[0]
    for rank, own in enumerate(told):
        for name in ("graftlm", "torch"):
            if own[name] != first[name]:
                raise UserError(
                    f"Rank {rank} runs {name} {own[name]}, rank 0 {first[name]}.",
                    f"Install one {name} on all machines.",
                )
        if own.get(BESIDE) != first.get(BESIDE):
            raise UserError(
                f"Rank {rank} is one of {own.get(BESIDE)} on its machine, rank 0 one of {first.get(BESIDE)}: "
                "ranks.shard=hybrid shards within machines.",
                "Start as many ranks on every machine, or set ranks.shard=full.",
            )
        changed = sorted(changed_keys(first["recipe"], own["recipe"]))
        if changed:
            raise UserError(
                f"Rank {rank} has another recipe than rank 0; what differs: {', '.join(changed[:5])}.",
                "Give every machine the same recipe file and the same overrides.",
            )


def _attend(store: Any, rank: int, is_over: threading.Event) -> None:
    """Rank 0's sign of life, for those who wait while it walks the road; and stacks, where one was found to hang."""
    with contextlib.suppress(RuntimeError):
        while not is_over.wait(BEAT_SECONDS):
            if rank == 0:
                store.set(BEAT, str(time.time()))
            answer_if_asked(store, rank)
