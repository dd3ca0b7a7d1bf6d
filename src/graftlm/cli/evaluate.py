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


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL MODEL...", help="Model folders, run folders or hub ids; the first is the measure."
        ),
    ],
    files: Files,
    out: Annotated[Path | None, typer.Option("--out", help="The page to write; compare.html if not given.")] = None,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions of each file of dialogues that are answered side by side.")
    ] = 8,
    max_tokens: MaxTokens = 128,
    judge: Annotated[
        str | None,
        typer.Option(help="A server of OpenAI's API (http…/v1) asked which answer is better; key: GRAFTLM_JUDGE_KEY."),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The model the judge is asked for.")] = "judge",
    as_json: AsJson = False,
) -> None:
    """Compare models on the same rows: figures, paired differences with 95 % intervals, answers side by side.

    Example: graftlm compare my-base runs/demo --data heldout.jsonl --out compare.html
    """
    from graftlm.errors import UserError
    from graftlm.release.compare_judge import check_judge, make_judge

    page = out or Path("compare.html")
    if page.is_dir() or page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {page} is no page: it must be a file that ends in .html.", "Give --out NAME.html.")
    twice = next((name for place, name in enumerate(models) if name in models[:place]), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice.", "Name each model once.")
    asked = make_judge(judge, judge_model) if judge else None

    from graftlm.release.compare import compare_models, judge_comparison
    from graftlm.release.compare_page import write_comparison
    from graftlm.run import say

    if asked is not None:
        check_judge(asked)
    found = compare_models({name: name for name in models}, files, questions, max_tokens)
    write_comparison(found, page)  # before the judge is asked: whatever becomes of it, what was measured is kept
    if asked is not None:
        try:
            judge_comparison(found, asked)
        except UserError as error:
            raise UserError(error.problem, f"{error.fix} What was measured stands in {page}.") from None
        finally:
            write_comparison(found, page)
    show(found.results, as_json)
    say(f"page    {page}")
