"""The command line: one small function per verb.

Owns flags, tables and exit codes. Does not do any work itself: each verb calls one function of a room. Heavy
libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from graftlm.errors import Interrupted, UserError

app = typer.Typer(
    name="graftlm",
    help="Graft a language onto a Llama-family base model, and teach it to talk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Graft, check and measure tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
OutNeeded = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Text, JSONL or Parquet file; may be repeated.")]


def show(value: Any, as_json: bool) -> None:
    """Print a result: JSON, or `key  value` lines."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, cell in value.items():
        text = json.dumps(cell, ensure_ascii=False, indent=1) if isinstance(cell, dict | list) else str(cell)
        table.add_row(f"[bold]{key}[/]", text.replace("[", r"\["))
    Console().print(table)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; recipes/ holds examples.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Overrides.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Walk the whole road of a recipe; run it again to continue or to redo what changed.

    Example: graftlm run recipes/demo.yaml --out runs/demo stages.full.epochs=2
    """
    from graftlm.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from graftlm.pipeline import run_recipe

    result = run_recipe(loaded, out or Path("runs") / loaded.name)
    if as_json:
        show(result, True)
        return
    if result.questions:
        _show_questions(result.questions)
    print(f"model   {result.model}\nreport  {result.report}\nchat    {Path(sys.argv[0])} chat {result.model}")


def _show_questions(questions: dict[str, Any]) -> None:
    """Held-out questions and what the model answered, picked by the rule they carry; then the exact count."""
    for shown in questions["shown"]:
        print()
        for message in shown["messages"][:-1]:
            print(f"  {'Question' if message['role'] == 'user' else 'Answer  '}  {message['content']}")
        verdict = "exact" if shown["is_exact"] else f"expected: {shown['messages'][-1]['content']}"
        print(f"  Answer    {shown['answer']}    [{verdict}]")
    exact, asked = questions["num_exact_learnable"], questions["num_learnable"]
    share = f" ({exact / asked:.0%})" if asked else ""
    print(f"\nExactly answered held-out questions: {exact} of {asked}{share}.")
    print(f"Shown above: {questions['rule']}\n")


@tokenizer_app.command("graft")
def tokenizer_graft(
    base: Annotated[str, typer.Option(help="Tokenizer folder, tokenizer.model or hub id.")],
    out: OutNeeded,
    mode: Annotated[str, typer.Option(help="continued, merge or card.")] = "continued",
    text: Texts = None,
    pieces: Annotated[str | None, typer.Option(help="Inventory to merge (SentencePiece or tokenizer.json).")] = None,
    script: Annotated[list[str] | None, typer.Option(help="Unicode script of the new language.")] = None,
    num_pieces: Annotated[int, typer.Option(help="Pieces to add, at most.")] = 8000,
    as_json: AsJson = False,
) -> None:
    """Graft new pieces onto a base tokenizer and prove that old text encodes as before.

    Example: graftlm tokenizer graft --base base/ --text zh.txt --script Han --num-pieces 8000 --out grafted/
    """
    from graftlm.recipe import Tokenizer
    from graftlm.recipe_file import section_from_flags
    from graftlm.text.tokenizer import graft_tokenizer

    flags = {"mode": mode, "text": text or (), "pieces": pieces, "script": script or ("Han",), "num_pieces": num_pieces}
    show(graft_tokenizer(base, section_from_flags(Tokenizer, flags), out), as_json)


@tokenizer_app.command("check")
def tokenizer_check(old: str, new: str, text: Texts = None, as_json: AsJson = False) -> None:
    """Prove, or refute, that NEW encodes old text as OLD does, and measure the drift.

    Example: graftlm tokenizer check base/ grafted/ --text zh.jsonl --text en.jsonl
    """
    from graftlm.text.tokenizer import check_tokenizers

    show(check_tokenizers(old, new, text or []), as_json)


@tokenizer_app.command("report")
def tokenizer_report_verb(
    tokenizers: list[str],
    text: Texts = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (SVG or PNG).")] = None,
    as_json: AsJson = False,
) -> None:
    """Characters and bytes per token of each tokenizer on each text.

    Example: graftlm tokenizer report base/ grafted/ --text zh.jsonl --plot compression.svg
    """
    from graftlm.text.tokenizer import tokenizer_report

    show(tokenizer_report(tokenizers, text or [], plot), as_json)


@app.command()
def expand(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    tokenizer: Annotated[str, typer.Option(help="Grafted tokenizer folder.")],
    out: OutNeeded,
    init: Annotated[str, typer.Option(help="How new rows start.")] = "subpiece-mean",
    as_json: AsJson = False,
) -> None:
    """Grow a model's embedding and head to a grafted tokenizer; old logits are proved unchanged.

    Example: graftlm expand --model base/ --tokenizer grafted/ --init subpiece-mean --out grown/
    """
    from graftlm.model.grow import expand_model

    show(expand_model(model, tokenizer, init, out), as_json)


@app.command()
def data(
    files: list[str],
    template: Annotated[str, typer.Option(help="card, alpaca or tokenizer.")] = "card",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder, to count tokens.")] = None,
    num_shown: Annotated[int, typer.Option("--show", help="Rows to show rendered, the learned part coloured.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read dialogues, count what is kept or dropped and why, and show rows as training will see them.

    Example: graftlm data rows.jsonl --tokenizer grafted/ --show 5
    """
    from graftlm.text.corpus import inspect_data
    from graftlm.text.dialogue import find_template
    from graftlm.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = inspect_data(files, find_template(template, loaded), loaded, num_shown)
    show(found, as_json)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    to: Annotated[str, typer.Option(help="hf or adapter.")] = "hf",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model in another form; it is re-loaded and its logits compared.

    Example: graftlm export runs/demo --to adapter --out demo-adapter
    """
    from graftlm.pipeline import export_run

    show(export_run(run_folder, to, out), as_json)


@app.command()
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


@app.command()
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


@app.command("eval")
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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices and what each can do, free disk and memory.

    Example: graftlm doctor
    """
    import os
    import shutil

    import torch

    from graftlm.device import num_cores
    from graftlm.run import versions

    devices: dict[str, Any] = {"cpu": {"cores": num_cores(), "precisions": ["fp32", "bf16", "fp16"]}}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        has_bf16 = facts.major >= 8
        devices[f"cuda:{index}"] = {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "precisions": ["fp32", *(["bf16"] if has_bf16 else []), "fp16"],
        }
    memory_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = {"disk_gib": round(shutil.disk_usage(".").free / 2**30, 1), "memory_gib": round(memory_bytes / 2**30, 1)}
    show({"versions": versions(), "devices": devices, "free": free}, as_json)


def main() -> None:
    """Run the command line; every mistake of the user ends in two lines and an exit code."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as error:
        print(f"{error}\nRun the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # typer's own usage errors tell themselves; anything else is our fault
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
