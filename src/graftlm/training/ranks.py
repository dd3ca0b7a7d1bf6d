"""Ranks: the processes that train one stage together, and everything they say to one another.

Owns sums, agreements and messages between ranks, and what is told when one of them no longer answers. A rank alone says
nothing and pays nothing: every method is then the identity. Does not know how ranks are started or find each other
(`joining.py`), nor what a step is. Messages are JSON and bytes of tensors; no pickle crosses the wire.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from graftlm.errors import DiskError, Interrupted, NumericalStop, RankLost, UserError
from graftlm.training.stacks import ASKED, call_roll, is_alive, stacks_told

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20  # gradients summed at once: large enough to fill the wire, small beside the gradients
PIECE_BYTES = 256 * 2**20  # of a tensor sent at once
BEAT = "beat"
SILENCE = 6  # times the patience: a library may hold rank 0's interpreter for minutes while it learns pieces
POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0  # in which the others may say why they left
_KINDS: dict[int, type[UserError]] = {kind.exit_code: kind for kind in (UserError, NumericalStop, DiskError, RankLost)}


class Ranks:
    """`count` processes, this one with number `rank` (from 0); rank 0 alone writes files and speaks to the user.

    `store` is what they share before and beside the process group; `patience_seconds` how long one waits for another;
    `local_count` how many of them are on this machine. `mesh` is over whom a model's layers are shared out; None where
    every rank holds all. `zero_stage`: DeepSpeed's, 0 without it. `speaks`: whether an error is this
    rank's to tell the user. `stacks`: by rank, what all were doing when one of them was found to hang.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        store: Any = None,
        patience_seconds: float = 600.0,
        local_count: int = 1,
        mesh: DeviceMesh | None = None,
        zero_stage: int = 0,
    ) -> None:
        self.rank, self.count, self.patience_seconds = rank, count, patience_seconds
        self.local_count, self.mesh, self.zero_stage = local_count, mesh, zero_stage
        self.speaks = rank == 0
        self.stacks: dict[int, str] = {}
        self._store = store
        self._num_orders = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def num_parts(self) -> int:
        """Into how many parts a layer's weights are cut: 1 where every rank holds all."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def in_words(self) -> str:
        """How many they are and whether layers are shared out, for the log; nothing of one alone."""
        parts = f", layers in {self.num_parts} parts" if self.num_parts > 1 else ""
        return "" if self.is_alone else f", {self.count} ranks{parts}"

    @property
    def pass_together(self) -> bool:
        """Whether passes are work in common, so that all must take equally many in a step."""
        return self.mesh is not None or self.zero_stage > 0

    @property
    def hold_all(self) -> bool:
        """Whether every rank holds all weights, also between passes."""
        return self.mesh is None and self.zero_stage < 3

    def total(self, *numbers: float) -> list[float]:
        """Each number added up over all ranks, in float64, the same bits on every rank. Raises RankLost."""
        if self.is_alone:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        with self._answered():
            dist.all_reduce(found)
        return found.tolist()

    def add_up(self, numbers: np.ndarray) -> None:
        """Add an array up over all ranks, in place. Raises RankLost."""
        if not self.is_alone and numbers.size:
            with self._answered():
                dist.all_reduce(torch.from_numpy(numbers))

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank. Raises RankLost."""
        return self.total(float(is_so))[0] > 0

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Add each parameter's gradient up over all ranks, in place: the same bits on every rank. Raises RankLost.

        A rank whose rows gave a parameter no gradient counts as zero; where no rank has one, there is none still.
        """
        if self.is_alone:
            return
        has_any = self.total(*(float(p.grad is not None) for p in parameters))
        for parameter, count in zip(parameters, has_any, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with self._answered():
                dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    def sum_in_place(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks, in place. Raises RankLost."""
        if not self.is_alone:
            with self._answered():
                dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain JSON), by rank, on every rank. Raises RankLost."""
        if self.is_alone:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.total(*(len(own) if rank == self.rank else 0 for rank in range(self.count)))]
        begin = sum(lengths[: self.rank])
        told = torch.zeros(sum(lengths), dtype=torch.uint8)
        told[begin : begin + len(own)] = own
        with self._answered():
            dist.all_reduce(told)  # each byte comes from one rank: the sum puts them side by side
        return [json.loads(part.numpy().tobytes()) for part in told.split(lengths)]

    def from_first(self, work: Callable[[], T]) -> T:
        """Rank 0 does `work`; its result (plain JSON) or the error it raised is every rank's. Raises RankLost too."""
        if self.is_alone:
            return work()
        if not self.is_first:
            told = json.loads(self._message(b""))
            if "problem" in told:
                raise error_of(told)
            return told["value"]
        try:
            value = work()
        except UserError as error:
            self._message(json.dumps(told_of(error)).encode())
            raise
        self._message(json.dumps({"value": value}).encode())
        return value

    def _message(self, own: bytes) -> bytes:
        """Rank 0's bytes."""
        length = int(self.total(len(own) if self.is_first else 0)[0])
        held = torch.zeros(length, dtype=torch.uint8)
        if self.is_first:
            held[:] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self.fill_from_first(held)
        return held.numpy().tobytes()

    def tensors_from_first(
        self, tensors: Mapping[str, Tensor] | None, keep: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
    ) -> dict[str, Tensor]:
        """Rank 0's tensors by name, on the CPU; the others give None. `keep` says what of each this rank holds on to.

        Raises RankLost.
        """
        if self.is_alone:
            return dict(tensors or {})
        given = tensors or {}
        heads = self.from_first(
            lambda: [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()]
        )
        found = {}
        for name, dtype, shape in heads:
            tensor = given[name].detach().cpu().contiguous() if self.is_first else None
            whole = torch.empty(shape, dtype=getattr(torch, dtype)) if tensor is None else tensor
            self.fill_from_first(whole)
            found[name] = keep(name, whole)
        return found

    def fill_from_first(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with rank 0's bytes. Raises RankLost."""
        if self.is_alone or not tensor.numel():
            return
        flat = tensor.detach().view(-1).view(torch.uint8)
        with self._answered():
            for piece in flat.split(PIECE_BYTES):
                dist.broadcast(piece, 0)

    def draw_apart(self, seed: int, step: int, rank: int | None = None) -> None:
        """Let each of several ranks draw (dropout) from a stream of its own, begun anew at every step: any number of
        ranks can then go on from any checkpoint. One rank alone draws on as it did. `rank`: draw as that one does."""
        if not self.is_alone:
            own = self.rank if rank is None else rank
            torch.manual_seed(int(np.random.SeedSequence([seed, step, own]).generate_state(1)[0]))

    def refuse_different(self, tensors: Sequence[Tensor], what: str, num_parts: int = 1) -> None:
        """Stop where ranks no longer hold the same bits, which would end in another model in silence.

        With `num_parts` the tensors are parts, and every so many ranks hold the same one. Raises RuntimeError: it is no
        user's mistake. Raises RankLost.
        """
        if self.count == num_parts:
            return
        own = [_sum_of_bits(t) for t in tensors]
        told = self.gather(own)
        differing = [rank for rank, theirs in enumerate(told) if theirs != told[rank % num_parts]]
        if differing:
            raise RuntimeError(
                f"{what} of rank {differing[0]} are not those of rank {differing[0] % num_parts}: do all compute alike?"
            )

    def call(self, order: Any) -> None:
        """Rank 0 tells the others what to do next (plain JSON); None: nothing more."""
        if not self.is_alone:
            self._store.set(f"order/{self._num_orders}", json.dumps(order))
            self._num_orders += 1

    def hear(self) -> Any:
        """Rank 0's next order, waited for as long as it shows signs of life. Raises RankLost."""
        key, beat, since = f"order/{self._num_orders}", None, time.monotonic()
        limit = SILENCE * self.patience_seconds
        while True:
            found = within(limit, lambda: (self._read(key), self._read(BEAT)))
            if found is None or (found[1] == beat and time.monotonic() - since > limit):
                raise self._lost([0], time.monotonic() - since > limit)
            order, heard = found
            if order is not None:
                self._num_orders += 1
                return json.loads(order)
            if heard != beat:
                beat, since = heard, time.monotonic()
            time.sleep(POLL_SECONDS)

    def leave_word(self, error: BaseException) -> None:
        """Tell the others why this rank ends, for whoever finds it gone."""
        if self._store is not None:
            text = json.dumps(told_of(error))
            within(GRACE_SECONDS, lambda: self._store.set(f"left/{self.rank}", text))

    def take_leave(self, seconds: float) -> None:
        """The last words of a run that ends in order: rank 0, in whose process the store may lie, goes last."""
        if not self.is_first:
            within(seconds, lambda: self._store.set(f"gone/{self.rank}", ""))
            return
        others = [f"gone/{rank}" for rank in range(1, self.count)]
        within(seconds, lambda: (self.call(None), self._store.wait(others, timedelta(seconds=seconds))))

    def _read(self, key: str) -> bytes | None:
        """What is in the store under a key, if anything."""
        return self._store.get(key) if self._store.check([key]) else None

    @contextlib.contextmanager
    def passes_answered(self) -> Iterator[None]:
        """Turn what breaks off passes whose weights come from several ranks into the reason why; other errors stay."""
        try:
            yield
        except RuntimeError as error:
            if not self.pass_together or not _is_of_wire(error):
                raise
            raise self._why_broken(error) from None

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn a collective that broke off into the reason why."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._why_broken(error) from None

    def _why_broken(self, error: RuntimeError) -> UserError:
        """Who left and said why, or who said nothing. Waits a little: the others may be about to say so."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the others at once; this ends by itself
        has_waited = "imed out" in str(error) or "imeout" in str(error)
        if has_waited:
            within(GRACE_SECONDS, lambda: self._store.set(ASKED, str(self.rank)))
        until = time.monotonic() + GRACE_SECONDS
        within(GRACE_SECONDS, lambda: (self._store.set(f"here/{self.rank}", "lost"), call_roll(self._store)))
        silent = [rank for rank in range(self.count) if rank != self.rank]
        while silent and time.monotonic() < until:
            said = within(GRACE_SECONDS, lambda: [self._last_words(rank) for rank in silent])
            for rank, (word, is_here) in zip(list(silent), said or [], strict=False):
                left = json.loads(word) if word else None
                if left is not None and left["code"] != RankLost.exit_code:
                    return error_of(left, f"Rank {rank}: ")
                if left is not None or is_here:
                    silent.remove(rank)
            time.sleep(POLL_SECONDS)
        # One that waits for a rank which is still there has not seen yet that the wire broke: it is no cause of it.
        silent = [rank for rank in silent if has_waited or not self._is_alive(rank)]
        self.speaks = self.rank == min(set(range(self.count)) - set(silent))
        # Where all wait, none for what another does, the first to give up breaks the wires of the others.
        if has_waited or within(GRACE_SECONDS, lambda: self._store.check([ASKED])):
            has_waited = True
            here = [rank for rank in range(self.count) if rank not in silent]
            self.stacks = within(GRACE_SECONDS, lambda: stacks_told(self._store, self.count, here)) or {}
        return self._lost(silent, has_waited)

    def _last_words(self, rank: int) -> tuple[bytes | None, bool]:
        """Why a rank left, if it said so, and whether it is there and misses another as this one does."""
        return self._read(f"left/{rank}"), self._store.check([f"here/{rank}"])

    def _is_alive(self, rank: int) -> bool:
        """Whether a rank answered beside its work, whatever that waits for."""
        return bool(within(GRACE_SECONDS, lambda: is_alive(self._store, rank)))

    def _lost(self, silent: Sequence[int], has_waited: bool) -> RankLost:
        who = f"Rank {', '.join(map(str, silent))} of {self.count}" if silent else f"A rank of {self.count}"
        again = "Run the same command again: it goes on from the last checkpoint."
        if has_waited:
            what = f"did not answer for {self.patience_seconds:g} s: it hangs, or its machine is cut off"
            return RankLost(f"{who} {what}.", f"{again} ranks.timeout_seconds: how long to wait.")
        what = "is gone: it was killed (a machine out of memory does that), or its connection was cut"
        return RankLost(f"{who} {what}.", f"{again} Had memory run out, lower micro_batch_tokens too.")


ALONE = Ranks()


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """A store's answer; None where it is gone or says nothing for so long.

    A store whose holder stands still keeps its clients waiting for ever, whatever time they were given: so the question
    is asked beside.
    """
    answers: list[T] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def told_of(error: BaseException) -> dict[str, Any]:
    """An error as plain values, for another rank."""
    if isinstance(error, UserError):
        return {"code": error.exit_code, "problem": error.problem, "fix": error.fix}
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return {"code": RankLost.exit_code, "problem": str(error) or "It was interrupted.", "fix": ""}
    fix = "Its own lines on standard error say more; please report them with the output of: graftlm doctor"
    return {"code": 1, "problem": f"{type(error).__name__}: {error}", "fix": fix}


def error_of(told: Mapping[str, Any], before: str = "") -> UserError:
    """The error another rank told of, of the same kind."""
    error = _KINDS.get(told["code"], RankLost)(f"{before}{told['problem']}", told["fix"])
    error.exit_code = told["code"]
    return error


def _is_of_wire(error: RuntimeError) -> bool:
    """Whether a collective inside a pass broke off: torch gives such errors a kind of their own only in part."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error) or "NCCL" in str(error)


def _sum_of_bits(tensor: Tensor) -> int:
    bits = tensor.detach().reshape(-1).view({2: torch.int16}.get(tensor.itemsize, torch.int32))
    return int(bits.sum(dtype=torch.int64))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one dtype and of about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (held + size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket
