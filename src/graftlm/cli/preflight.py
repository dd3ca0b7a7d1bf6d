"""The verb that looks at a recipe's stages before they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graftlm.cli.options import AsJson, RunOut

STOPPED = 3


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
            _tell(name, look, [finding for finding in result.findings if finding["stage"] == name])
    if any(finding["severity"] == "fatal" for finding in result.findings):
        raise typer.Exit(STOPPED)


def _tell(name: str, look: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    losses = ", ".join(f"{loss:.2f} on {kind} pieces" for kind, loss in look["first_loss"].items())
    ceilings = ", ".join(f"{role} 2^{bits:.0f}" for role, bits in look["ceiling_bits"].items())
    rows = "; ".join(f"{matrix} {old:.3g} old, {new:.3g} new" for matrix, (old, new) in look["row_rms"].items())
    told = [
        ("first loss", f"{losses} (knowing nothing: {look['uniform_loss']:.2f})"),
        ("headroom of the forward pass in fp16", f"{look['headroom_bits']:.1f} bits ({look['headroom_where']})"),
        ("largest loss scale of fp16", ceilings),
        ("rms of rows", rows),
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
