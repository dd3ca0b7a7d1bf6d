"""Continuous batching: many answers at once from one model, joining and leaving at every step.

Owns the thread in which the model runs, the bounded queue before it, and what is said at each step. Does not know who
lies where in memory (`batch`), HTTP, chat formats or asyncio: pieces of answers are handed to a function. What a row
says does not depend on which others share its batch.

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

import torch

from graftlm.talk.generate import Chatbot
from graftlm.talk.sampling import Draw, draw_ids
from graftlm.talk.serving.batch import Batch, Counts, Row, Sink, Ticket
from graftlm.talk.serving.faults import tell_fault
from graftlm.talk.serving.memory import cache_budget_tokens
from graftlm.talk.serving.slots import Slots, rounded_places
from graftlm.talk.serving.speech import Ask, Finish, Piece, Said, Scored, Speech

MAX_ROWS = 64
MAX_WAITING = 128

HandOut = Callable[[list[tuple[Sink, Piece | None]]], None]


class Busy(Exception):
    """The queue is full; `retry_seconds` says when it may be worth asking again."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"the queue is full, retry in {retry_seconds} s")
        self.retry_seconds = retry_seconds


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
        self._batch = Batch(self._slots, max_rows, self.budget_tokens, self.counts)
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._events: list[tuple[Sink, Piece | None]] = []
        self._seconds_per_answer = 1.0
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
        return len(self._batch.rows)

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
                row = Row(ask, index, ticket, sink, Draw(ask.sampling), speech, list(ask.prompt_ids))
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
                while not (self._waiting or self._batch.rows or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
                self._admit()
            self._step()
            self._send()
        for row in (*self._batch.rows, *self._waiting):
            self._events.append((row.sink, None))
        self._send()

    def _send(self) -> None:
        events, self._events = self._events, []
        if events:
            self._hand_out(events)

    def _admit(self) -> None:
        """Let those who wait join while rows and memory last; drop whoever left."""
        for row in [row for row in self._waiting if row.ticket.is_cancelled]:
            self._waiting.remove(row)
            self.counts.cancelled += 1
        for row in [row for row in self._batch.rows if row.ticket.is_cancelled]:
            self._batch.leave(row)
            self.counts.cancelled += 1
        while self._waiting and self._batch.has_room_for(self._waiting[0]):
            self._batch.join(self._waiting.popleft())

    # ------------------------------------------------------------------------------------------------------ a step

    def _step(self) -> None:
        with self._changed:
            self._waiting.extendleft(self._batch.put_out())
        try:
            self._batch.reserve()
        except Exception as error:  # memory the system promised and did not give
            self._fail(list(self._batch.rows), error)
            self._slots.clear()
            return
        speaking = self._batch.rows[: self._batch.num_speaking]
        reading = self._batch.readers()
        self.counts.steps += 1
        # Readers first: their slots lie behind, and whoever leaves while speaking would move them.
        for rows, first in ((reading, len(speaking)), (speaking, 0)):
            if rows:
                try:
                    self._go_on(rows, first)
                except Exception as error:  # whatever a model may raise: the others' answers go on
                    self._fail(rows, error)

    def _go_on(self, rows: list[Row], first: int) -> None:
        """Let rows of neighbouring slots read what they have not read; those with nothing left say a token."""
        parts, is_whole = self._batch.unread(rows, first)
        logits_BV = self._slots.forward(first, parts)
        if not is_whole:
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

    def _refuse(self, rows: list[Row]) -> None:
        """The model gave no numbers for these rows. What they left in memory must not reach others: 0 x NaN is NaN."""
        for row in rows:
            self._slots.wipe(self._batch.rows.index(row))
        self._fail(rows, ArithmeticError())

    def _fail(self, rows: list[Row], error: Exception) -> None:
        tell_fault("An answer", error)
        for row in rows:
            if row in self._batch.rows:
                self.counts.failed += 1
                self._events.append((row.sink, None))
                self._batch.leave(row)

    def _say(self, rows: list[Row], logits_BV: torch.Tensor) -> None:
        scored = [place for place, row in enumerate(rows) if row.ask.num_top is not None]
        # Before penalties and temperature: what the model itself thinks.
        logprobs_NV = logits_BV[scored].float().log_softmax(-1) if scored else None
        ids = draw_ids(logits_BV, [row.draw for row in rows], [row.said for row in rows])
        for place, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
            said = None
            if row.ask.num_top is not None and logprobs_NV is not None:
                said = self._scored(token_id, logprobs_NV[scored.index(place)], row.ask.num_top)
            self._take(row, token_id, said)

    def _take(self, row: Row, token_id: int, said: Said | None) -> None:
        if token_id in self.chatbot.stop_ids:
            self._finish(row, "stop", *row.speech.rest())
            return
        row.said.append(token_id)
        row.ids.append(token_id)
        self.counts.answer_tokens += 1
        text, tokens, is_stopped = row.speech.take(token_id, said)
        if is_stopped:
            self._finish(row, "stop", text, tokens)
        elif len(row.said) >= row.ask.sampling.max_tokens or len(row.ids) >= self.chatbot.context_tokens:
            rest, more = row.speech.rest()
            self._finish(row, "length", text + rest, tokens + more)
        elif text or tokens:
            self._events.append((row.sink, Piece(row.index, text, len(row.said), None, tokens)))

    def _finish(self, row: Row, finish: Finish, text: str, tokens: tuple[Said, ...]) -> None:
        self._events.append((row.sink, Piece(row.index, text, len(row.said), finish, tokens)))
        self._batch.leave(row)
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
