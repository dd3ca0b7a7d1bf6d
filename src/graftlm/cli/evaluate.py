"""Verbs that judge finished models: eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show

Files = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="Held-out dialogues, or questions (question and answer; question, choices and index); may be repeated.",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
LmEval = Annotated[
    Path | None, typer.Option("--export-lm-eval", help="Also write the files of questions as lm-eval tasks here.")
]


def eval_verb(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, run folder or hub id.")],
    files: Files,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions of each file of dialogues that are answered, to measure speed.")
    ] = 4,
    max_tokens: MaxTokens = 64,
    export_lm_eval: LmEval = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss and bits per byte, right answers to questions, and speed; with 95 % intervals.

    Example: graftlm eval runs/demo/6-model --data heldout.jsonl
    """
    from graftlm.release.evaluate import evaluate_files, read_data

    if export_lm_eval is not None:
        from graftlm.release.tasks_export import export_tasks

        export_tasks(read_data(files), export_lm_eval)
    show(evaluate_files(model, files, questions, max_tokens), as_json)
