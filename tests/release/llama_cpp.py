"""The real llama.cpp (xllamacpp) with one of our GGUF files, asked over its own server's socket."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """One loaded GGUF file. llama.cpp stops when this is no longer held."""

    def __init__(self, path: Path, num_context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = num_context, 1, False, False
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)
        host, port = self._server.listening_address.removeprefix("http://").rsplit(":", 1)
        self._connection = http.client.HTTPConnection(host, int(port))

    def ask(self, route: str, **body: Any) -> Any:
        """POST to a route of llama.cpp's server."""
        self._connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(self._connection.getresponse().read())

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template in the file, filled by llama.cpp."""
        return self.ask("/apply-template", messages=messages)["prompt"]

    def encode(self, text: str, *, is_prompt: bool = False) -> list[int]:
        """Ids of a text standing by itself; of a prompt, with what llama.cpp puts before it and control pieces read."""
        return self.ask("/tokenize", content=text, add_special=is_prompt, parse_special=is_prompt)["tokens"]

    def say(self, prompt: str | list[int], num_tokens: int) -> dict[str, Any]:
        """The likeliest continuation, ids and text."""
        return self.ask(
            "/completion", prompt=prompt, n_predict=num_tokens, temperature=0, top_k=1, return_tokens=True,
            cache_prompt=False,
        )  # fmt: skip

    def chat(self, messages: Sequence[dict[str, str]], num_tokens: int) -> str:
        """A chat answer as any client of the OpenAI protocol gets it."""
        told = self.ask("/v1/chat/completions", messages=messages, max_tokens=num_tokens, temperature=0)
        return told["choices"][0]["message"]["content"]
