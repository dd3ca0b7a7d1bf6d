"""Verbs of a finished model that talks: chat, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, run folder or hub id.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest piece every time.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest pieces that together reach this share.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest; 0 is all.")]
Penalty = Annotated[float, typer.Option(help="Above 1, what the answer already holds becomes less likely.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(help="Of the draws: the same seed gives the same answer.")]


def chat(
    model: Model,
    once: Annotated[str | None, typer.Option(help="Answer this one message and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before everything.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Talk with a model. /help in the talk lists its commands.

    Example: graftlm chat runs/demo/6-model --once 你好
    """
    from graftlm.errors import UserError
    from graftlm.talk.sampling import Sampling

    if as_json and once is None:
        raise UserError("--json belongs to --once TEXT: a talk of many turns is no one object.", "Add --once TEXT.")
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_tokens, seed)

    from graftlm.run import say
    from graftlm.talk.generate import load_chatbot
    from graftlm.talk.terminal import chat_loop, chat_once

    if once is None:
        say(f"Loading {model} ...")
    chatbot = load_chatbot(model)
    if once is None:
        chat_loop(chatbot, sampling, system=system or "")
        return
    answer = chat_once(chatbot, once, sampling, system or "")
    if as_json:
        show(answer, True)
    else:
        print(answer["answer"])


def generate(
    model: Model,
    input_file: Annotated[Path, typer.Option("--input", help="JSONL of prompts or messages.")],
    output_file: Annotated[Path, typer.Option("--output", help="JSONL of answers; continued when it exists.")],
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer a file of prompts, batched and resumable.

    Example: graftlm generate runs/demo --input asked.jsonl --output said.jsonl
    """
    from graftlm.talk.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_tokens, seed)

    from graftlm.talk.answer_file import generate_file

    show(generate_file(model, input_file, output_file, sampling), as_json)
