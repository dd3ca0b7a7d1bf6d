"""A real server on a free port, in this process, over tiny models; one that talks by a table, one at random."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from graftlm.model.causal import new_causal
from graftlm.talk.generate import Chatbot, ask
from graftlm.talk.sampling import GREEDY
from graftlm.talk.serving.app import Served, make_app
from graftlm.talk.serving.backend import OwnBackend
from graftlm.talk.serving.prompting import Voice
from graftlm.talk.serving.server import bind, make_server
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def parrot(tokenizer: Tokenizer) -> Callable[..., Chatbot]:
    """A model that says given ids, all different, whatever it is asked; then it ends, or begins again for ever.

    Each id's hidden state is its own direction, and the head turns it into the next id: a table as a Llama.
    """

    def make(ids: Sequence[int], is_endless: bool = False, max_positions: int = 4096) -> Chatbot:
        assert len(set(ids)) == len(ids)
        rows = tokenizer.num_pieces
        model: Any = new_causal(
            num_rows=rows, hidden_size=384, num_layers=1, num_heads=48, num_kv_heads=1, intermediate_size=8,
            max_positions=max_positions,
        )  # fmt: skip
        assert rows <= 384
        layer = model.model.layers[0]
        with torch.no_grad():
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj, model.lm_head):
                matrix.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(rows, 384))
            model.lm_head.weight[ids[0]] = 0.5  # first, behind whatever ends the prompt
            for now, then in zip(ids, [*ids[1:], ids[0] if is_endless else tokenizer.eos_id], strict=True):
                model.lm_head.weight[then, now] = 1.0
        return Chatbot(model, tokenizer, CARD)

    return make


@pytest.fixture(scope="session")
def endless(parrot: Callable[..., Chatbot], tokenizer: Tokenizer) -> Chatbot:
    """Says the same six words until its 60,000 tokens of context are full."""
    return parrot(tokenizer.encode_continuation("one two"), is_endless=True, max_positions=60_000)


def served(chatbot: Chatbot, name: str = "tiny", **limits: Any) -> Served:
    """A chatbot as the server takes it."""
    voice = Voice(chatbot.tokenizer, chatbot.template, chatbot.context_tokens)
    return Served(name, voice, OwnBackend(chatbot, **limits))


@dataclass
class Running:
    """A server under test."""

    port: int
    models: list[Served]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Any:
        backend: Any = self.models[0].backend
        return backend.engine

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)

    def post(self, body: Any, route: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + route, json=body, timeout=30, **options)

    def connect(self) -> socket.socket:
        connected = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connected.settimeout(10)
        return connected


def running(models: list[Served], send_buffer_bytes: int | None = None, **options: Any) -> Iterator[Running]:
    """Serve until the generator is closed."""
    bound = bind("127.0.0.1", 0)
    if send_buffer_bytes:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    ready = threading.Event()
    server = make_server(make_app(models, **options), ready.set, drain_seconds=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield Running(bound.getsockname()[1], models)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(chatbot: Chatbot, parrot: Callable[..., Chatbot], tokenizer: Tokenizer) -> Iterator[Running]:
    """Two models: `tiny` speaks at random but always the same, `parrot` greets."""
    greeter = parrot(tokenizer.encode_continuation("你好 there"))
    yield from running([served(chatbot), served(greeter, "parrot")])


@pytest.fixture
def serve_models() -> Iterator[Callable[..., Running]]:
    """Start a server of one's own, stopped after the test: `serve_models(models, **app_options)`."""
    started: list[Iterator[Running]] = []

    def begin(models: list[Served], **options: Any) -> Running:
        started.append(running(models, **options))
        return next(started[-1])

    yield begin
    for generator in started:
        assert next(generator, None) is None


@pytest.fixture
def start(serve_models: Callable[..., Running]) -> Callable[..., Running]:
    """One chatbot on a server of one's own: `start(chatbot, engine_limits, **app_options)`."""

    def begin(chatbot: Chatbot, engine_limits: dict[str, Any] | None = None, **options: Any) -> Running:
        return serve_models([served(chatbot, **(engine_limits or {}))], **options)

    return begin


@pytest.fixture(scope="session")
def expected(chatbot: Chatbot) -> Callable[..., Any]:
    """The answer of the plain chatbot, which the server must give too."""

    def answer(question: str, sampling: Any = GREEDY) -> Any:
        return chatbot.answer(ask(question), sampling)

    return answer
