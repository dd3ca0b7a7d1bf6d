"""`graftlm serve`: from names of models and a few flags to a running server.

Owns how models are named and loaded for serving. Does not know routes or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from graftlm.errors import UserError
from graftlm.run import say
from graftlm.talk.generate import load_chatbot
from graftlm.talk.serving.app import Served, make_app
from graftlm.talk.serving.backend import OwnBackend
from graftlm.talk.serving.guard import is_loopback
from graftlm.talk.serving.prompting import Voice
from graftlm.talk.serving.server import bind, host_names, read_key, run_server
from graftlm.talk.serving.vllm import served_by_vllm

BackendName = Literal["own", "vllm"]
MAX_MODELS = 2


def serve(
    models: Sequence[str],
    host: str,
    port: int,
    key_file: Path | None,
    backend: BackendName,
    names: Sequence[str] = (),
) -> None:
    """Serve one or two models until stopped; `names` are the Host names a proxy asks by.

    Raises UserError before any model is loaded where it can be told.
    """
    if len(models) > MAX_MODELS:
        raise UserError(f"{len(models)} models were named.", f"Name one, or {MAX_MODELS} to compare them side by side.")
    hosts = host_names(host, names)
    key = read_key(key_file, host, names)
    bound = bind(host, port)
    served = []
    for model, name in zip(models, model_names(models), strict=True):
        say(f"Loading {model} ...")
        served.append(_own(model, name) if backend == "own" else served_by_vllm(model, name))
    any_address = not is_loopback(host)
    run_server(make_app(served, key=key, hosts=hosts, any_address=any_address), bound)


def model_names(models: Sequence[str]) -> list[str]:
    """The name each model is asked for by: a folder's last part, a hub id whole; numbered where two are the same."""
    names: list[str] = []
    for model in models:
        name = Path(model).resolve().name if Path(model).exists() else model
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _own(model: str, name: str) -> Served:
    chatbot = load_chatbot(model)
    voice = Voice(chatbot.tokenizer, chatbot.template, chatbot.context_tokens)
    return Served(name, voice, OwnBackend(chatbot))
