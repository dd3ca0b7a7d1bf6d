"""Continuous batching: many answers at once from one model, joining and leaving at every step.

Owns the thread in which the model runs, the bounded queue before it, who is in the batch, and the memory they may
take. Does not know HTTP, chat formats or asyncio: pieces of answers are handed to a function. What a row says does
not depend on which others share its batch.

A step: those who speak say one token each; those who joined read a part of their prompt, so that a long one holds
nobody up for long. Speaking rows lie before reading ones in the slots. When memory ends, the row that joined last
goes back to the queue's head with what it has said, and reads that again later.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graftlm.talk.generate import Chatbot
from graftlm.talk.sampling import Draw, draw_ids
from graftlm.talk.serving.faults import tell_fault
from graftlm.talk.serving.memory import cache_budget_tokens
from graftlm.talk.serving.slots import Slots, rounded_places
from graftlm.talk.serving.speech import Ask, Finish, Piece, Said, Scored, Speech

MAX_ROWS = 64
MAX_WAITING = 128
# Tokens of prompts read between two steps of those who speak, padding included.
READ_TOKENS = 512
# Fewer tokens in common are sooner computed than copied.
LEAST_SHARED = 16

Sink = Callable[[Piece | None], None]
HandOut = Callable[[list[tuple[Sink, Piece | None]]], None]


class Busy(Exception):
    """The queue is full; `retry_seconds` says when it may be worth asking again."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"the queue is full, retry in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(slots=True)
class Ticket:
    """The answers of one request; cancelled, they end within a step."""

    is_cancelled: bool = False


@dataclass(slots=True)
class Counts:
    """What the engine has done so far."""

    prompt_tokens: int = 0
    prompt_tokens_shared: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    preempted: int = 0


@dataclass(slots=True, eq=False)
class _Row:
    """One answer under way: its tokens, and how it draws and shows them."""

    ask: Ask
    index: int
    ticket: Ticket
    sink: Sink
    draw: Draw
    speech: Speech
    ids: list[int]
    said: list[int] = field(default_factory=list)
    started: float = 0.0
    is_reading: bool = True
    order: int = 0


class Engine:
    """One model answering many at once. `start` it, `submit` to it from any thread, `close` it."""

    def __init__(
        self, chatbot: Chatbot, *, max_rows: int = MAX_ROWS, max_waiting: int = MAX_WAITING,
        budget_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.chatbot = chatbot
        self.counts = Counts()
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._slots = Slots(chatbot.model)
        # One row must always fit, or nothing could ever be answered.
        least = rounded_places(chatbot.context_tokens)
        self.budget_tokens = max(least, budget_tokens or cache_budget_tokens(self._slots, max_rows * least))
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # in the order of their slots
        self._changed = threading.Condition()
        self._is_closing = False
        self._events: list[tuple[Sink, Piece | None]] = []
        self._seconds_per_answer = 1.0
        self._num_joined = 0
        self._thread = threading.Thread(target=self._run, name="graftlm-engine", daemon=True)
        self._hand_out: HandOut = _hand_out_here

    def start(self, hand_out: HandOut | None = None) -> None:
        """Begin to answer; `hand_out` is called in the engine's thread once a step with all pieces of that step."""
        self._hand_out = hand_out or _hand_out_here
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Answers in the batch."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Answers in the queue."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Memory the keys and values take now."""
        return self._slots.capacity_tokens * self._slots.token_bytes

    def submit(self, asks: Sequence[Ask], sink: Sink) -> Ticket:
        """Queue the asks of one request; `sink` gets their pieces, or None when answering failed. Raises Busy."""
        ticket = Ticket()
        with self._changed:
            if self._is_closing or len(self._waiting) + len(asks) > self._max_waiting:
                self.counts.refused += 1
                turns = 1 + len(self._waiting) // self._max_rows
                raise Busy(min(60, math.ceil(turns * self._seconds_per_answer)))
            for index, ask in enumerate(asks):
                speech = Speech(self.chatbot.tokenizer, ask.stop)
                row = _Row(ask, index, ticket, sink, Draw(ask.sampling), speech, list(ask.prompt_ids))
                row.started = time.monotonic()
                self._waiting.append(row)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Whoever asked has left: stop within a step, or never begin."""
        ticket.is_cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step under way; answers not finished are told to have failed."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        self.chatbot.model.eval()
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
                self._admit()
            self._step()
            self._send()
        for row in (*self._rows, *self._waiting):
            self._events.append((row.sink, None))
        self._send()

    def _send(self) -> None:
        events, self._events = self._events, []
        if events:
            self._hand_out(events)

    # ------------------------------------------------------------------------------------------ who is in the batch

    def _admit(self) -> None:
        """Let those who wait join while rows and memory last; drop whoever left."""
        for row in [row for row in self._waiting if row.ticket.is_cancelled]:
            self._waiting.remove(row)
            self.counts.cancelled += 1
        for row in [row for row in self._rows if row.ticket.is_cancelled]:
            self._leave(row)
            self.counts.cancelled += 1
        while self._waiting and len(self._rows) < self._max_rows:
            if self._tokens_of([*self._rows, self._waiting[0]]) > self.budget_tokens and self._rows:
                break
            row = self._waiting.popleft()
            row.is_reading = True
            self._num_joined += 1
            row.order = self._num_joined
            self._slots.join()
            self._rows.append(row)

    def _tokens_of(self, rows: Sequence[_Row]) -> int:
        """Tokens of memory these rows take together: each as much as the longest, one more token included."""
        return len(rows) * rounded_places(max(len(row.ids) for row in rows) + 1)

    def _leave(self, row: _Row) -> None:
        """Take a row out; others move so that speaking rows stay before reading ones, without a gap."""
        hole, num_speaking = self._rows.index(row), self._num_speaking
        moves = [num_speaking - 1, len(self._rows) - 1] if hole < num_speaking else [len(self._rows) - 1]
        for source in moves:
            if source != hole:
                self._slots.move(source, hole)
                self._rows[hole] = self._rows[source]
            hole = source
        self._slots.drop_last()
        self._rows.pop()

    @property
    def _num_speaking(self) -> int:
        return sum(not row.is_reading for row in self._rows)

    def _make_room(self) -> None:
        while len(self._rows) > 1 and self._tokens_of(self._rows) > self.budget_tokens:
            row = max(self._rows, key=lambda row: row.order)
            self._leave(row)
            self.counts.preempted += 1
            with self._changed:
                self._waiting.appendleft(row)
        if self._rows:
            longest = max(len(row.ids) for row in self._rows)
            self._slots.reserve(len(self._rows), longest, self.budget_tokens)

    # ------------------------------------------------------------------------------------------------------ a step

    def _step(self) -> None:
        try:
            self._make_room()
        except Exception as error:  # memory the system promised and did not give
            self._fail(list(self._rows), error)
            self._slots.clear()
            return
        speaking = self._rows[: self._num_speaking]
        reading = self._readers(self._rows[len(speaking) :])
        self.counts.steps += 1
        # Readers first: their slots lie behind, and whoever leaves while speaking would move them.
        for rows, first in ((reading, len(speaking)), (speaking, 0)):
            if rows:
                try:
                    self._go_on(rows, first)
                except Exception as error:  # whatever a model may raise: the others' answers go on
                    self._fail(rows, error)

    def _readers(self, rows: list[_Row]) -> list[_Row]:
        """Who reads in this step: one with a long prompt, a part of it, or several with short ones, all of them."""
        chosen: list[_Row] = []
        most = max((len(row.ids) for row in self._rows), default=0)  # places that are there
        longest = last_start = 0
        for slot, row in enumerate(rows, start=self._num_speaking):
            if self._slots.length(slot) == 0 and not self._begin(slot, row, chosen):
                break
            start = self._slots.length(slot)
            longest, last_start = max(longest, len(row.ids) - start), max(last_start, start)
            if chosen and (longest * (len(chosen) + 1) > READ_TOKENS or last_start + longest > most):
                break
            chosen.append(row)
            if longest > READ_TOKENS:
                break
        return chosen

    def _begin(self, slot: int, row: _Row, chosen: list[_Row]) -> bool:
        """Take over what others have read of the same words: a template's frame, a prompt of several choices.

        False: more of it is about to be read in this very step; better wait for that.
        """
        most = len(row.ids) - 1  # the last token must be read, for what follows it
        soon = max((_num_shared(row.ids, other.ids, most) for other in chosen), default=0)
        now, source = 0, slot
        for place, other in enumerate(self._rows):
            shared = _num_shared(row.ids, other.ids, min(most, self._slots.length(place)))
            if shared > now:
                now, source = shared, place
        if soon >= now + LEAST_SHARED:
            return False
        if now >= LEAST_SHARED:
            self._slots.begin_like(slot, source, now)
            self.counts.prompt_tokens_shared += now
        return True

    def _go_on(self, rows: list[_Row], first: int) -> None:
        """Let rows of neighbouring slots read what they have not read; those with nothing left say a token."""
        starts = [self._slots.length(slot) for slot in range(first, first + len(rows))]
        parts = [row.ids[start : start + READ_TOKENS] for row, start in zip(rows, starts, strict=True)]
        logits_BV = self._slots.forward(first, parts)
        if starts[-1] + len(parts[-1]) < len(rows[-1].ids):
            return  # a long prompt, alone: more of it in the next step
        logits_BV.index_fill_(1, self.chatbot.forbidden_ids, -torch.inf)
        is_sound_B = logits_BV.amax(-1).isfinite()
        if not is_sound_B.all():
            sound = is_sound_B.tolist()
            self._refuse([row for row, is_sound in zip(rows, sound, strict=True) if not is_sound])
            rows = [row for row, is_sound in zip(rows, sound, strict=True) if is_sound]
            logits_BV = logits_BV[is_sound_B]
        for row in rows:
            if row.is_reading and not row.said:
                self.counts.prompt_tokens += len(row.ids)
            row.is_reading = False
        self._say(rows, logits_BV)

    def _refuse(self, rows: list[_Row]) -> None:
        """The model gave no numbers for these rows. What they left in memory must not reach others: 0 x NaN is NaN."""
        for row in rows:
            self._slots.wipe(self._rows.index(row))
        self._fail(rows, ArithmeticError())

    def _fail(self, rows: list[_Row], error: Exception) -> None:
        tell_fault("An answer", error)
        for row in rows:
            if row in self._rows:
                self.counts.failed += 1
                self._events.append((row.sink, None))
                self._leave(row)

    def _say(self, rows: list[_Row], logits_BV: torch.Tensor) -> None:
        scored = [place for place, row in enumerate(rows) if row.ask.num_top is not None]
        # Before penalties and temperature: what the model itself thinks.
        logprobs_NV = logits_BV[scored].float().log_softmax(-1) if scored else None
        ids = draw_ids(logits_BV, [row.draw for row in rows], [row.said for row in rows])
        for place, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
            said = None
            if row.ask.num_top is not None and logprobs_NV is not None:
                said = self._scored(token_id, logprobs_NV[scored.index(place)], row.ask.num_top)
            self._take(row, token_id, said)

    def _take(self, row: _Row, token_id: int, said: Said | None) -> None:
        if token_id in self.chatbot.stop_ids:
            self._finish(row, "stop", *row.speech.rest())
            return
        row.said.append(token_id)
        row.ids.append(token_id)
        self.counts.answer_tokens += 1
        text, tokens, is_stopped = row.speech.take(token_id, said)
        if is_stopped:
            self._finish(row, "stop", text, tokens)
        elif len(row.said) >= row.ask.sampling.max_new_tokens or len(row.ids) >= self.chatbot.context_tokens:
            rest, more = row.speech.rest()
            self._finish(row, "length", text + rest, tokens + more)
        elif text or tokens:
            self._events.append((row.sink, Piece(row.index, text, len(row.said), None, tokens)))

    def _finish(self, row: _Row, finish: Finish, text: str, tokens: tuple[Said, ...]) -> None:
        self._events.append((row.sink, Piece(row.index, text, len(row.said), finish, tokens)))
        self._leave(row)
        self.counts.finished += 1
        seconds = time.monotonic() - row.started
        self._seconds_per_answer += 0.1 * (seconds - self._seconds_per_answer)

    def _scored(self, token_id: int, logprobs_V: torch.Tensor, num_top: int) -> Said:
        spell = self.chatbot.tokenizer.token_bytes
        top: tuple[Scored, ...] = ()
        if num_top:
            values, ids = logprobs_V.topk(num_top)
            top = tuple(Scored(spell(i), v) for v, i in zip(values.tolist(), ids.tolist(), strict=True))
        return Said(Scored(spell(token_id), logprobs_V[token_id].item()), top)


def _hand_out_here(events: list[tuple[Sink, Piece | None]]) -> None:
    for sink, piece in events:
        sink(piece)


def _num_shared(ids: list[int], others: list[int], most: int) -> int:
    """How many of the first `most` tokens are the same, found by halving."""
    low, high = 0, min(most, len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
