"""What a run's folder holds, read for telling: nothing is measured here, and what is missing stays None.

Owns where each step of the road leaves its figures. Does not know how they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.health.autopsy import Autopsy, autopsy
from graftlm.health.logs import own_and_abandoned
from graftlm.run import DONE, RECIPE, read_json, read_metrics


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage: its section of the recipe, its done mark, and its lines by event.

    `weights_seed` drew the weights it began with; None where they came from the step before.
    """

    name: str
    asked: dict[str, Any]
    done: dict[str, Any]
    steps: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    notes: list[str]
    interventions: list[dict[str, Any]] = field(default_factory=list)
    weights_seed: int | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. `done` holds the done mark of every finished step by its folder's name, in order."""

    recipe: dict[str, Any]
    versions: dict[str, str]
    done: dict[str, dict[str, Any]]
    stages: list[StageRecord]
    graft: dict[str, Any] | None
    grow: dict[str, Any] | None
    data: dict[str, Any] | None
    heldout: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    compression: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    questions: dict[str, Any] | None = None
    health: Autopsy | None = None

    @property
    def languages(self) -> list[str]:
        """The languages that were judged: `new` first, then `old`."""
        return [key for key in self.heldout[0] if key != "state"] if self.heldout else []

    @property
    def scripts(self) -> str:
        """What the new language is called in a sentence: its Unicode scripts."""
        return ", ".join(self.recipe["tokenizer"].get("script", ())) or "new"


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. Raises UserError for a file that is damaged."""
    written = read_json(folder / RECIPE)
    recipe = written["recipe"]
    folders = sorted((path for path in folder.glob("[0-9]*-*") if path.is_dir()), key=_place)
    asked = {f"{4 + number}-{stage['name']}": stage for number, stage in enumerate(recipe["stages"])}
    scratch = recipe["base"].get("scratch")
    if scratch:
        asked["0-scratch"] = scratch["training"]
    seeds = {"0-scratch": recipe.get("seed")}
    stages = [_stage(path, asked[path.name], seeds.get(path.name)) for path in folders if path.name in asked]
    return RunRecord(
        recipe=recipe,
        versions=written.get("versions", {}),
        done={path.name: read_json(path / DONE) for path in folders if (path / DONE).is_file()},
        stages=stages,
        graft=_read(folder / "1-tokenizer" / "graft.json"),
        grow=_read(folder / "2-base" / "grow.json"),
        data=_read(folder / "3-data" / "data.json"),
        heldout=_find(folders, "heldout.json") or [],
        samples=_find(folders, "samples.json") or [],
        compression=_find(folders, "compression.json") or {},
        questions=_find(folders, "questions.json"),
        health=autopsy(folder) if any(stage.steps for stage in stages) else None,
    )


def _place(path: Path) -> tuple[int, str]:
    number = path.name.split("-")[0]
    return (int(number) if number.isdigit() else 0, path.name)


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _find(folders: list[Path], name: str) -> Any:
    return next((read_json(path / name) for path in reversed(folders) if (path / name).is_file()), None)


def _stage(folder: Path, asked: dict[str, Any], weights_seed: int | None) -> StageRecord:
    path = folder / "metrics.jsonl"
    # What training went back from is not its course.
    lines, _ = own_and_abandoned(read_metrics(path) if path.is_file() else [])
    by_event: dict[str, list[dict[str, Any]]] = {"step": [], "heldout": [], "note": [], "intervention": []}
    for line in lines:
        by_event.setdefault(line.get("event", ""), []).append(line)
    notes = [str(line.get("text", "")) for line in by_event["note"]]
    done = _read(folder / DONE) or {}
    return StageRecord(
        folder.name, asked, done, by_event["step"], by_event["heldout"], notes, by_event["intervention"], weights_seed
    )
