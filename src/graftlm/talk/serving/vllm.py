"""vLLM behind the same routes: its server as a child process, asked with our own token ids.

Owns the child and the translation between its stream and our pieces. Does not know our routes. vLLM never sees a
message: its chat route would make control tokens of what people write, ours cannot. It is asked for ids of the one
renderer, is told which ids end an answer and which may not be said, and reports token ids back.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.model.causal import empty_causal, head_weight
from graftlm.run import say
from graftlm.talk.generate import find_speaker, forbidden_ids_of, stop_ids_of
from graftlm.talk.sampling import LEAST_TOP_P
from graftlm.talk.serving.app import Served
from graftlm.talk.serving.backend import AnswerFailed, Pieces
from graftlm.talk.serving.engine import MAX_ROWS, MAX_WAITING, Busy
from graftlm.talk.serving.prompting import Voice
from graftlm.talk.serving.speech import Ask, Finish, Piece, Said, Scored
from graftlm.text.tokenizer import Tokenizer

START_SECONDS = 1800
STOP_SECONDS = 30
_MODEL = "model"
# vLLM cuts a bias off at 100; no logit of a trained model stands so far above the others.
_NEVER = -100


def served_by_vllm(model: str, name: str) -> Served:
    """Start vLLM on a model and wait until it answers. Raises UserError when it is not installed or does not start."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--backend vllm needs vLLM, which is not installed here.",
            f"Install it: {sys.executable} -m pip install vllm, or leave --backend out.",
        )
    folder, tokenizer, template = find_speaker(model)
    shape = empty_causal(folder)
    context_tokens: int = shape.config.max_position_embeddings
    fixed = {
        "model": _MODEL, "stream": True, "skip_special_tokens": True, "return_tokens_as_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stop_token_ids": sorted(stop_ids_of(tokenizer, template)),
        "logit_bias": {str(i): _NEVER for i in forbidden_ids_of(tokenizer, template, len(head_weight(shape)))},
    }  # fmt: skip
    child = _Child(folder, context_tokens)
    return Served(name, Voice(tokenizer, template, context_tokens), VllmBackend(child, tokenizer, fixed))


class _Child:
    """vLLM's server on a loopback port of its own, behind a key made for this one run."""

    def __init__(self, folder: Path, context_tokens: int) -> None:
        self.key = secrets.token_urlsafe(32)
        self.port = _free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", _MODEL, "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", str(context_tokens),
        ]  # fmt: skip
        # Its INFO lines may quote prompts.
        environment = {**os.environ, "VLLM_API_KEY": self.key, "VLLM_LOGGING_LEVEL": "WARNING"}
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        say("Starting vLLM; a large model takes minutes ...")
        deadline = time.monotonic() + START_SECONDS
        while self.is_alive and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.2)
        end = "ended" if not self.is_alive else f"was not ready after {START_SECONDS} s"
        raise UserError(f"vLLM {end}.", "Its lines above tell why. Without --backend our own engine serves the model.")

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process, in the end by force."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class VllmBackend:
    """Answers by vLLM's server."""

    def __init__(self, child: _Child, tokenizer: Tokenizer, fixed: dict[str, Any]) -> None:
        self.child, self.tokenizer, self.fixed = child, tokenizer, fixed
        self.num_running = 0

    async def start(self) -> None:
        """Nothing: the child runs already."""

    async def stop(self) -> None:
        """End the child."""
        await asyncio.to_thread(self.child.stop)

    async def answer(self, asks: Sequence[Ask]) -> Pieces:
        """One stream an ask. Raises Busy."""
        if self.num_running + len(asks) > MAX_ROWS + MAX_WAITING:
            raise Busy(1)
        pieces = Pieces(len(asks))
        self.num_running += len(asks)
        tasks = [asyncio.ensure_future(self._follow(index, ask, pieces)) for index, ask in enumerate(asks)]
        for task in tasks:
            task.add_done_callback(self._one_less)  # also of one that is cancelled before it begins

        async def leave() -> None:
            # vLLM stops an answer whose connection closes.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        pieces.leave = leave
        return pieces

    async def _follow(self, index: int, ask: Ask, pieces: Pieces) -> None:
        try:
            async with contextlib.aclosing(self.stream(index, ask)) as stream:
                async for piece in stream:
                    pieces.put(piece)
        except (AnswerFailed, OSError, ValueError, KeyError):
            pieces.put(None)

    def _one_less(self, _: asyncio.Task[None]) -> None:
        self.num_running -= 1

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self.child.is_alive

    def figures(self) -> dict[str, float]:
        """Answers under way; vLLM's own metrics are its own."""
        return {"answers_running": self.num_running}

    async def stream(self, index: int, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The pieces of one ask. Raises AnswerFailed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.child.port, limit=2**20)
        try:
            body = json.dumps(self._body(ask)).encode()
            # HTTP/1.0: the answer then comes without chunk marks and ends with the connection.
            head = (
                f"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.child.key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            status = (await reader.readline()).split()
            if len(status) < 2 or status[1] != b"200":
                raise AnswerFailed
            num_tokens = 0
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "choices" not in event:
                    raise AnswerFailed
                usage = event.get("usage") or {}
                num_tokens = usage.get("completion_tokens", num_tokens + len(event["choices"]))
                for choice in event["choices"]:
                    piece = self._piece(index, choice, num_tokens)
                    yield piece
                    if piece.finish:
                        return
            raise AnswerFailed
        finally:
            writer.close()

    def _body(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        asked: dict[str, Any] = {
            **self.fixed, "prompt": ask.prompt_ids, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p or LEAST_TOP_P,  # vLLM refuses 0
            "repetition_penalty": sampling.repetition_penalty, "seed": sampling.seed % 2**63,
        }  # fmt: skip
        if sampling.top_k:
            asked["top_k"] = sampling.top_k
        if ask.stop:
            asked["stop"] = list(ask.stop)
        if ask.num_top is not None:
            asked["logprobs"] = ask.num_top
        return asked

    def _piece(self, index: int, choice: dict[str, Any], num_tokens: int) -> Piece:
        finish: Finish | None = None
        if choice.get("finish_reason"):
            finish = "length" if choice["finish_reason"] == "length" else "stop"
        told = choice.get("logprobs") or {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        tops = told.get("top_logprobs") or [None] * len(told["tokens"])
        tokens = tuple(
            Said(self._scored(name, logprob), tuple(self._scored(*pair) for pair in (top or {}).items()))
            for name, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
        )
        return Piece(index, choice["text"], num_tokens, finish, tokens)

    def _scored(self, name: str, logprob: float) -> Scored:
        return Scored(self.tokenizer.token_bytes(int(name.removeprefix("token_id:"))), logprob)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
