"""Verbs of the doctor: preflight and autopsy."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import AsJson, Out, RunOut
from graftlm.cli.show import plain, show
from graftlm.errors import NumericalStop, UserError

if TYPE_CHECKING:
    from graftlm.health.autopsy import Autopsy

WIDTH = 110


def preflight(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; recipes/ holds examples.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Knobs of the recipe to change.")
    ] = None,
    out: RunOut = None,
    as_json: AsJson = False,
) -> None:
    """Look at every stage before it trains: one forward and backward pass on real rows.

    What comes before the stages (tokenizer, base, data) is made in the run's folder, where run keeps it. Exit code 3
    when a stage could not train as it is.

    Example: graftlm preflight recipes/demo.yaml --out runs/demo
    """
    from graftlm.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or (), needs_files=True)
    from graftlm.pipeline import preflight_recipe

    result = preflight_recipe(loaded, out or Path("runs") / loaded.name)
    if as_json:
        found = {"findings": result.findings, "headroom_bits": result.headroom_bits, "first_loss": result.first_loss}
        print(json.dumps({**found, "stages": _finite(result.stages)}, ensure_ascii=False))
    else:
        for name, look in result.stages.items():
            _tell_look(name, look, [finding for finding in result.findings if finding["stage"] == name])
    if any(finding["severity"] == "fatal" for finding in result.findings):
        raise typer.Exit(NumericalStop.exit_code)


def _tell_look(name: str, look: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    losses = ", ".join(f"{loss:.2f} on {kind} pieces" for kind, loss in look["first_loss"].items())
    ceilings = ", ".join(f"{role} 2^{bits:.0f}" for role, bits in look["ceiling_bits"].items())
    rows = "; ".join(f"{matrix} {old:.3g} old, {new:.3g} new" for matrix, (old, new) in look["row_rms"].items())
    silent = [name for numbers in look["roles"].values() for name in numbers["silent"]]
    told = [
        ("first loss", f"{losses} (knowing nothing: {look['uniform_loss']:.2f})"),
        ("headroom of the forward pass in fp16", f"{look['headroom_bits']:.1f} bits ({look['headroom_where']})"),
        ("largest loss scale of fp16", ceilings),
        ("rms of rows", rows),
        ("rows looked at", f"{look['num_rows']}, without a label {look['num_without_labels']}"),
        ("trained tensors without a gradient", f"{len(silent)}{f' ({silent[0]})' if silent else ''}"),
        ("adapter multiplied by", "" if look["lora_factor"] is None else f"{look['lora_factor']:g}"),
        ("trained in", ", ".join(sorted({d for n in look["roles"].values() for d in n["dtypes"]}))),
    ]
    graver = [finding for finding in findings if finding["severity"] != "note"]
    print(f"{name}: {'green' if not graver else f'{len(graver)} findings'}")
    for what, value in told:
        if value:
            print(f"  {what:<38}{value}")
    for finding in findings:
        print(f"  {finding['severity']}: {finding['evidence']} ({finding['where']})\n    {finding['cure']}")


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor nan: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value - value != 0 else value


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
    from graftlm.release.autopsy_page import rows_told, state_in_words, title_of, when

    yield f"{found.verdict}: {found.told}"
    yield from (f"  {plain(course.name)}: {course.verdict}; {state_in_words(course)}" for course in found.courses)
    for number, told in enumerate(found.diagnoses, start=1):
        finding = told.finding
        yield f"\n{number}. {title_of(finding)} ({finding.cause}, {finding.severity})"
        values = {
            "where": f"{told.stage}, {finding.where}", "step": when(told).removeprefix("step "),
            "evidence": finding.evidence, "cure": finding.cure,
        }  # fmt: skip
        if told.row_ids:
            values["rows"] = rows_told(told)
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
