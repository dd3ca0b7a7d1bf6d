"""Who computes the answers behind the routes: our own engine here, or another server (`vllm`).

Owns what the routes need of either, and the bridge from the engine's thread to asyncio. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from graftlm.talk.generate import Chatbot
from graftlm.talk.serving.engine import Engine, Sink
from graftlm.talk.serving.speech import Ask, Piece


class AnswerFailed(Exception):
    """The model failed while answering; the server goes on."""


class Pieces(AsyncIterator[Piece]):
    """Pieces of all asks of a request, as they come, until each answer has ended.

    Whoever computes them puts them in, None for a failure; `aclose` calls `leave` where an answer has not ended.
    """

    def __init__(self, num_asks: int) -> None:
        self._left = num_asks
        self._queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        self.put = self._queue.put_nowait
        self.leave: Callable[[], Awaitable[None]] | None = None

    async def __anext__(self) -> Piece:
        if not self._left:
            raise StopAsyncIteration
        piece = await self._queue.get()
        if piece is None:
            raise AnswerFailed
        self._left -= piece.finish is not None
        return piece

    async def aclose(self) -> None:
        """Stop the model, begun or not, for answers nobody waits for any more."""
        if self._left and self.leave:
            self._left = 0
            await self.leave()


class Backend(Protocol):
    """One model's answers."""

    async def start(self) -> None:
        """Get ready to answer. Raises UserError when that cannot be."""
        ...

    async def stop(self) -> None:
        """Let go of everything; answers under way have ended or end now."""
        ...

    async def answer(self, asks: Sequence[Ask]) -> Pieces:
        """Begin to answer. Raises Busy; iterating raises AnswerFailed."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it can answer."""
        ...

    def figures(self) -> dict[str, float]:
        """What /metrics tells of it, by metric name."""
        ...


class OwnBackend:
    """Our own engine, in this process."""

    def __init__(self, chatbot: Chatbot, **limits: Any) -> None:
        self.engine = Engine(chatbot, **limits)

    async def start(self) -> None:
        """Start the engine's thread; its pieces reach this event loop, one call a step."""
        loop = asyncio.get_running_loop()
        self.engine.start(lambda events: _post(loop, events))

    async def stop(self) -> None:
        """Stop the engine's thread after the step under way."""
        await asyncio.to_thread(self.engine.close)

    async def answer(self, asks: Sequence[Ask]) -> Pieces:
        """Queue the asks. Raises Busy."""
        pieces = Pieces(len(asks))
        ticket = self.engine.submit(asks, pieces.put)

        async def leave() -> None:
            self.engine.cancel(ticket)

        pieces.leave = leave
        return pieces

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self.engine.is_alive

    def figures(self) -> dict[str, float]:
        """What the engine has done, holds and keeps waiting."""
        counts = self.engine.counts
        return {
            "prompt_tokens_total": counts.prompt_tokens,
            "prompt_tokens_shared_total": counts.prompt_tokens_shared,
            "answer_tokens_total": counts.answer_tokens,
            "steps_total": counts.steps,
            "answers_finished_total": counts.finished,
            "answers_cancelled_total": counts.cancelled,
            "answers_failed_total": counts.failed,
            "requests_refused_total": counts.refused,
            "answers_preempted_total": counts.preempted,
            "answers_running": self.engine.num_running,
            "answers_waiting": self.engine.num_waiting,
            "cache_bytes": self.engine.cache_bytes,
        }


def _post(loop: asyncio.AbstractEventLoop, events: list[tuple[Sink, Piece | None]]) -> None:
    loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Sink, Piece | None]]) -> None:
    for sink, piece in events:
        sink(piece)
