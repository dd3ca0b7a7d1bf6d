"""The verb serve."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Backend(Enum):
    """Who computes the answers."""

    own = "own"
    vllm = "vllm"


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [MODEL]", help="Model or run folder, or hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine need a key.")] = "127.0.0.1",
    api_key_file: Annotated[Path | None, typer.Option(help="File holding the key every request must carry.")] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Answer to this Host name too, a proxy's say; needs a key; may be repeated."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="vllm: where it is installed.")] = Backend.own,
) -> None:
    """Serve a model: OpenAI's API and a page to chat in. Two models are compared side by side.

    Example: graftlm serve runs/demo --port 8000
    """
    from graftlm.talk.serving.serve import serve as serve_models

    serve_models(models, host, port, api_key_file, backend.value, host_name or ())
