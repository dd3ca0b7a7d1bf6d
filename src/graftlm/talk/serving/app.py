"""The routes: OpenAI's, health, metrics and the page.

Owns which route does what and how every mistake becomes OpenAI's error shape. Does not know sockets or limits
(`guard`, `server`), nor how answers are computed (`backend`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from graftlm.talk.serving.backend import AnswerFailed, Backend, Pieces
from graftlm.talk.serving.complaints import UNREADABLE, complaint
from graftlm.talk.serving.engine import Busy
from graftlm.talk.serving.guard import Guard, error_body
from graftlm.talk.serving.metrics import Metrics
from graftlm.talk.serving.page import read_page
from graftlm.talk.serving.prompting import Refused, Voice
from graftlm.talk.serving.replies import Answers, Shape, usage_of
from graftlm.talk.serving.requests import ChatRequest, CompletionRequest
from graftlm.talk.serving.speech import Ask, Piece

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Served:
    """One model behind the routes."""

    name: str
    voice: Voice
    backend: Backend
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(
    models: Sequence[Served], *, key: str | None = None, hosts: tuple[str, ...] = (), any_address: bool = False,
    **limits: Any,
) -> Guard:  # fmt: skip
    """The ASGI app: every route, guarded. `limits` are those of Guard."""
    metrics = Metrics()
    served = {model.name: model for model in models}
    # One thread renders and encodes, so that no long prompt holds up the others' answers.
    encoder = ThreadPoolExecutor(1, thread_name_prefix="graftlm-encode")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            for model in models:
                await model.backend.start()
            yield
        finally:
            for model in models:
                await model.backend.stop()
            encoder.shutdown(wait=False)

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_routes(app, served, metrics, encoder)
    return Guard(app, key=key, hosts=hosts, any_address=any_address, metrics=metrics, **limits)


def _add_routes(app: FastAPI, served: Mapping[str, Served], metrics: Metrics, encoder: ThreadPoolExecutor) -> None:
    async def reply(
        http: Request, body: ChatRequest | CompletionRequest, asks_of: Callable[[Voice], list[Ask]]
    ) -> Response:
        model = _chosen(served, body.model)
        asks = await asyncio.get_running_loop().run_in_executor(encoder, asks_of, model.voice)
        pieces = await model.backend.answer(asks)
        answer = _Reply(http, Shape.of(body, model.name), asks, body.num_choices, pieces, metrics)
        return _Events(answer) if body.stream else await answer.whole()

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatRequest) -> Response:
        return await reply(http, body, lambda voice: voice.asks_of_chat(body))

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionRequest) -> Response:
        return await reply(http, body, lambda voice: voice.asks_of_texts(body))

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model) for model in served.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _described(_chosen(served, name))

    @app.get("/health")
    async def health() -> Response:
        is_well = all(model.backend.is_alive for model in served.values())
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        text = metrics.text({name: model.backend.figures() for name, model in served.items()})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    page = read_page()

    @app.get("/")
    async def send_page() -> Response:
        return Response(page.content, headers=page.headers)


def _chosen(served: Mapping[str, Served], name: str | None) -> Served:
    known = ", ".join(served)
    if name is None:
        if len(served) == 1:
            return next(iter(served.values()))
        raise Refused(f"model is missing; served here: {known}.", "model")
    if name not in served:
        raise Refused(f"The model `{name}` is not served here; served: {known}.", "model", "model_not_found", 404)
    return served[name]


def _described(model: Served) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "graftlm",
        "max_model_len": model.voice.context_tokens, "takes_system": model.voice.takes_system,
    }  # fmt: skip


class _Reply:
    """The answer to one request, while it is computed; whoever asked may leave at any time."""

    def __init__(
        self, http: Request, shape: Shape, asks: Sequence[Ask], choices: int, pieces: Pieces,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._http, self._metrics = http, metrics
        self.shape, self._asks, self._choices, self._pieces = shape, asks, choices, pieces
        self._answers = Answers.none_yet(len(asks))
        self._started = time.monotonic()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces, noted down; the model stops when this is closed."""
        is_first = True
        try:
            async for piece in self._pieces:
                if is_first:
                    self._metrics.observe_first_token(time.monotonic() - self._started)
                    is_first = False
                self._answers.add(piece)
                yield piece
        finally:
            await self._pieces.aclose()
            usage = self.usage()
            self._http.scope["graftlm_tokens"] = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens"

    async def close(self) -> None:
        """Stop the model, whether or not anything was read of its answer."""
        await self._pieces.aclose()

    def usage(self) -> dict[str, int]:
        """Token counts so far."""
        return usage_of(self._asks, self._choices, self._answers)

    async def whole(self) -> Response:
        """The answer at once, or nothing when whoever asked has left. Raises AnswerFailed."""
        collecting = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(_has_left(self._http.receive))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody will read it
            collecting.result()
            return JSONResponse(self.shape.whole(self._answers, self.usage()))
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)
            await self.close()

    async def _collect(self) -> None:
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        for chunk in self.shape.opening(len(self._asks)):
            yield _event(chunk)
        try:
            async with contextlib.aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    yield b"".join(map(_event, self.shape.chunks(piece)))
        except AnswerFailed:
            yield _event(error_body("The model failed while answering.", "server_error"))
            return
        for chunk in self.shape.closing(self.usage()):
            yield _event(chunk)
        yield _DONE


class _Events(Response):
    """Server-sent events. The stream ends, and with it the model's work, as soon as the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply
        self.status_code, self.background = 200, None
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send events until the answer ends or the client leaves."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_has_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._reply.close()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._reply.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _has_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


# ---------------------------------------------------------------------------------------------------------- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        kind = "invalid_request_error"
        return JSONResponse(error_body(error.message, kind, error.param, error.code), error.status)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        text = f"Too many requests are waiting; try again in {error.retry_seconds} s."
        body = error_body(text, "rate_limit_error", None, "rate_limit_exceeded")
        return JSONResponse(body, 429, {"Retry-After": str(error.retry_seconds)})

    @app.exception_handler(AnswerFailed)
    async def failed(_: Request, __: AnswerFailed) -> Response:
        return JSONResponse(error_body("The model failed while answering.", "server_error"), 500)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        """Only the answer: the framework raises the error again, for the guard to log where it came from."""
        return JSONResponse(error_body("A fault of the server, not yours. Its log tells where.", "server_error"), 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        text, param = complaint(error.errors())
        return JSONResponse(error_body(text, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def wrong(http: Request, error: HTTPException) -> Response:
        told = {404: "There is no such route.", 405: f"{http.method} is not done here.", 400: UNREADABLE}
        text = told.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(text, "invalid_request_error"), error.status_code, error.headers)
