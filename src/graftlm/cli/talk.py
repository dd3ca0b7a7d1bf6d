"""Verbs of a finished model: chat, generate, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, run folder or hub id.")],
    once: Annotated[str | None, typer.Option(help="Answer this one message and leave.")] = None,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest piece every time.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Talk with a model.

    Example: graftlm chat runs/demo/6-model --once 你好
    """
    from graftlm.talk.generate import Sampling, load_chatbot
    from graftlm.talk.terminal import chat_loop, chat_once

    chatbot = load_chatbot(model)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)
    if once is None:
        chat_loop(chatbot, sampling)
        return
    answer = chat_once(chatbot, once, sampling)
    if as_json:
        show(answer, True)
    else:
        print(answer["answer"])


def generate(
    model: str,
    input_file: Annotated[Path, typer.Option("--input", help="JSONL of prompts or messages.")],
    output_file: Annotated[Path, typer.Option("--output", help="JSONL of answers; continued when it exists.")],
    temperature: float = 0.0,
    max_tokens: int = 512,
    as_json: AsJson = False,
) -> None:
    """Answer a file of prompts, batched and resumable.

    Example: graftlm generate runs/demo/6-model --input prompts.jsonl --output answers.jsonl
    """
    from graftlm.talk.generate import Sampling
    from graftlm.talk.terminal import generate_file

    sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)
    show(generate_file(model, input_file, output_file, sampling), as_json)


def eval_verb(
    model: str,
    files: Annotated[list[str], typer.Option("--data", help="Held-out dialogues; may be repeated.")],
    as_json: AsJson = False,
) -> None:
    """Held-out loss per answer token and in bits per byte, with 95 % intervals.

    Example: graftlm eval runs/demo/6-model --data heldout.jsonl
    """
    from graftlm.release.evaluate import evaluate_files

    show(evaluate_files(model, files), as_json)
