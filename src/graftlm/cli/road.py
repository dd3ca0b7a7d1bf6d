"""Verbs of the road: run, sweep, expand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftlm.cli.options import AsJson, OutNeeded, RunOut, check_new_folder
from graftlm.cli.show import plain, show
from graftlm.errors import UserError

CALLED_AS = "GRAFTLM_CALLED_AS"

INITS = "normal, mean, subpiece-mean, subpiece-mean-norm or similarity"


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; recipes/ holds examples.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...", help="Knobs of the recipe to change; docs/guide.md lists them."
        ),
    ] = None,
    out: RunOut = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Train on this many GPUs of this machine, or processes where there is no GPU."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Train on so many machines, with --gpus on each; the command goes to all.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of the machines this is: 0 is the first.")] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Where the first machine is reached (port 29500).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Walk the whole road of a recipe. Run it again to continue or to redo what changed.

    Example: graftlm run recipes/demo.yaml --out runs/demo stages.full.epochs=2
    """
    from graftlm.cli.launch import LOG_LEVEL, UNHEARD, launch, machines_of, run_as_rank
    from graftlm.recipe_file import load_recipe
    from graftlm.training.place import place_here

    place = place_here()
    if place.count > 1:
        os.environ.setdefault(LOG_LEVEL, "ERROR")  # a rank's end is told in words, not as a dump of torch
    machines = machines_of(nodes, node_rank, master, gpus)
    if machines.count > 1:
        os.environ.setdefault(LOG_LEVEL, UNHEARD)
    loaded = load_recipe(recipe, overrides or (), needs_files=place.rank == 0 and machines.number == 0)
    folder = out or Path("runs") / loaded.name
    if gpus is not None and (gpus * machines.count > 1 or place.count > 1):
        os.environ[CALLED_AS] = _program()
        launch(gpus, place, loaded, [str(recipe), *(overrides or ()), *_flags(out, as_json)], machines)
        return
    result = run_as_rank(place, loaded, folder)
    if result is None:
        return  # rank 0 tells
    if as_json:
        show(result, True)
        return
    if result.questions:
        _show_questions(result.questions)
    if result.health:
        print(f"health  {plain(result.health)}")
    print(f"model   {result.model}\nreport  {result.report}\nchat    {_program()} chat {result.model}")


def _flags(out: Path | None, as_json: bool) -> list[str]:
    return [*(["--out", str(out)] if out else []), *(["--json"] if as_json else [])]


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="A sweep's file; recipes/experiments/ holds examples.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Knobs to change in every run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of all its runs; runs/NAME if not given.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check", help="Only check the recipe of every cell, and list them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run one recipe for every point of a grid, then compare the models on one page with a fitted trend.

    Run it again to continue. Example: graftlm sweep recipes/experiments/data-scale.yaml --out runs/data-scale
    """
    from graftlm.run import say
    from graftlm.sweep import cells_of, load_sweep, missing_files, run_sweep

    loaded = load_sweep(grid, overrides or ())
    folder = out or Path("runs") / loaded.name
    if check_only:
        missing = missing_files(loaded, folder)
        show({
            "cells": {cell.name: list(cell.overrides) for cell in cells_of(loaded, folder)}, "missing_files": missing,
        }, as_json)  # fmt: skip
        if missing:
            say(f"The recipes are sound. To run them, put in place first: {', '.join(missing)}")
        return
    result = run_sweep(loaded, folder)
    if as_json:
        show(result, True)
        return
    for cell in result.cells:
        print(f"{cell['name']}  {cell['status']}  {cell['model'] or cell['problem']}")
    print(f"page    {result.page}")


def _program() -> str:
    """How this program was called, for a line to type: of a rank, how its launcher was."""
    here = "python -m graftlm" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
    return os.environ.get(CALLED_AS, here)


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


def expand(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    tokenizer: Annotated[str, typer.Option(help="Grafted tokenizer folder.")],
    out: OutNeeded,
    init: Annotated[str, typer.Option(help=f"How new rows start: {INITS}.")] = "subpiece-mean",
    head_init: Annotated[str | None, typer.Option(help="The same for the output head, where it differs.")] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Auxiliary vectors by piece (safetensors), for similarity.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text of the new language: tells the first loss on it, by kind of token.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows drawn by chance.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Grow a model to a grafted tokenizer. Old logits are proved unchanged.

    Example: graftlm expand --model base/ --tokenizer grafted/ --out grown/
    """
    from graftlm.model.grow import NUM_NEW_TEXTS, expand_model
    from graftlm.text.texts import first_texts

    check_new_folder(out)
    texts = first_texts(text or (), NUM_NEW_TEXTS)
    if text and not texts:
        raise UserError(f"{', '.join(map(str, text))}: no text but blanks.", "Give --text files of the new language.")
    report = expand_model(model, tokenizer, init, out, head_init=head_init, vectors=vectors, seed=seed, new_texts=texts)
    show(report, as_json)
