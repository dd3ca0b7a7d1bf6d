"""Verbs of the doctor: autopsy."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import AsJson, Out
from graftlm.cli.show import plain, show
from graftlm.errors import UserError

if TYPE_CHECKING:
    from graftlm.health.autopsy import Autopsy

WIDTH = 110


def autopsy(
    run_or_log: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_LOG", help="A run's folder, live or ended; a stage of it; metrics.jsonl; or a foreign log."
        ),
    ],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Say what went wrong with a run, why, and which lines of its recipe to change.

    Of a run's folder, health.json and autopsy.html are written into it; of a stage or a log only into --out. Logs of
    HF Trainer and DeepSpeed (trainer_state.json, CSV, a pasted console) are read as far as they reach.

    Example: graftlm autopsy runs/demo
    """
    from graftlm.health.autopsy import autopsy as look_at
    from graftlm.release.autopsy_page import write_autopsy

    if out and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder.", "Give --out a folder.")
    found = look_at(run_or_log)
    folder = out or (run_or_log if found.is_run else None)
    page = write_autopsy(found, folder) if folder else None
    if as_json:
        show(found.to_json() | {"page": str(page) if page else None}, True)
        return
    print("\n".join(_told(found)))
    if page:
        print(f"\npage    {plain(str(page))}")


def _told(found: Autopsy) -> Iterator[str]:
    from graftlm.release.autopsy_page import state_in_words, title_of, when

    yield f"{found.verdict}: {found.told}"
    yield from (f"  {plain(course.name)}: {course.verdict}; {state_in_words(course)}" for course in found.courses)
    for number, told in enumerate(found.diagnoses, start=1):
        finding = told.finding
        yield f"\n{number}. {title_of(finding)} ({finding.cause}, {finding.severity})"
        values = {
            "where": f"{told.stage}, {finding.where}", "step": when(told).removeprefix("step "),
            "evidence": finding.evidence, "cure": finding.cure,
        }  # fmt: skip
        for name, value in values.items():
            yield from _wrapped(name, plain(value))
        yield from (f"   {'' if place else 'change':<8}  {plain(line)}" for place, line in enumerate(told.lines))
    if found.changes:
        yield f"\nTry     graftlm run RECIPE --out ANOTHER_FOLDER {plain(' '.join(found.changes))}"


def _wrapped(name: str, text: str) -> list[str]:
    """A value behind its name, in lines that can be read; paths and figures stay whole."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"   {name:<8}  ", subsequent_indent=" " * 13, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
