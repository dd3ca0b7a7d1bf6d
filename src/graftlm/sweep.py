"""A sweep: one recipe and a grid of overrides, many runs, one page that compares their models.

Owns the sweep's file, its cells, and that steps with the same order are done once. A cell is an ordinary run in a
folder of its own: interrupted, it goes on; changed, it redoes what depends on the change. Does not know what a run does
(`pipeline`), or how a trend is fitted and told (`release/trend`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import NumericalStop, UserError
from graftlm.inputs import missing_inputs
from graftlm.mistakes import Lines, nearest
from graftlm.pipeline import run_recipe
from graftlm.recipe import Recipe
from graftlm.recipe_file import load_recipe, read_tree
from graftlm.release.compare import compare_models
from graftlm.release.compare_page import write_comparison
from graftlm.release.trend import OVER, facts_of, trend_chapters
from graftlm.run import disk_errors, make_folder, read_json, say, write_json

SWEEP = "sweep.json"
MAX_CELLS = 64
_RUN = "run:"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep: its name, where it stands on each axis, and what it overrides."""

    name: str
    at: dict[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as read. `first` are recipes that are run before the grid; cells may start from their models.

    `curve_over` is what the curve is drawn over: `at` (the first axis's own numbers), `parameters`, `rows` or `tokens`
    as the runs counted them.
    """

    name: str
    recipe: Path
    grid: dict[str, list[Any]]
    common: dict[str, Any]
    first: tuple[Path, ...]
    curve_over: str
    questions: int
    max_answer_tokens: int
    overrides: tuple[str, ...]
    folder: Path


@dataclass(slots=True)
class SweepResult:
    """What became of every cell, the page, and the fitted curves."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    page: str = ""


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and check the recipe of every cell. Raises UserError.

    `overrides` hold for every cell, after the sweep's own `set`.
    """
    tree, lines = read_tree(path)
    _check(tree, lines, path)
    here = path.resolve().parent
    sweep = Sweep(
        name=tree.get("name", path.stem),
        recipe=(here / tree["recipe"]).resolve(),
        grid=tree["grid"],
        common=tree.get("set", {}),
        first=tuple((here / one).resolve() for one in tree.get("first", [])),
        curve_over=tree.get("curve_over", "at"),
        questions=tree.get("questions", 6),
        max_answer_tokens=tree.get("max_answer_tokens", 96),
        overrides=tuple(overrides),
        folder=here,
    )
    for recipe in sweep.first:
        load_recipe(recipe)
    # Where the runs will lie does not matter here: only that each cell's recipe is one.
    recipes = [load_recipe(sweep.recipe, cell.overrides) for cell in cells_of(sweep, here)]
    _refuse_unlike_heldout(sweep, recipes)
    return sweep


def _check(tree: Mapping[str, Any], lines: Lines, path: Path) -> None:
    """Refuse a sweep with a value that is none. Raises UserError with its line."""

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and bool(value)

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    is_good: dict[str, tuple[Callable[[Any], bool], str]] = {
        "name": (
            lambda value: isinstance(value, str) and bool(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", value)),
            "small letters, digits and hyphens, 41 at most",
        ),
        "recipe": (lambda value: isinstance(value, str), "the recipe that is run, relative to this file"),
        "set": (lambda value: isinstance(value, dict), "keys of the recipe and their values"),
        "grid": (
            lambda value: isinstance(value, dict) and bool(value) and all(map(is_list, value.values())),
            "axes: a key of the recipe and a list of its values, or a word and a list of {at, key: value}",
        ),
        "first": (
            lambda value: is_list(value) and all(isinstance(one, str) for one in value),
            "a list of recipes, relative to this file",
        ),
        "curve_over": (lambda value: value in OVER, ", ".join(OVER)),
        "questions": (is_count, "a whole number above 0"),
        "max_answer_tokens": (is_count, "a whole number above 0"),
    }
    for key, value in tree.items():
        if key not in is_good:
            raise _mistake(path, lines, key, f"unknown key {key}{nearest(key, is_good)}")
        check, expected = is_good[key]
        if not check(value):
            raise _mistake(path, lines, key, f"{key} must be {expected}")
    missing = next((key for key in ("recipe", "grid") if key not in tree), None)
    if missing:
        raise _mistake(path, lines, "", f"{missing} is missing: {is_good[missing][1]}")


def _mistake(path: Path, lines: Lines, key: str, told: str) -> UserError:
    line = lines[(key,)][1] if (key,) in lines else 0
    return UserError(f"{path}{f':{line}' if line else ''}: {told}.", "Mend it; recipes/experiments/ holds examples.")


def _refuse_unlike_heldout(sweep: Sweep, recipes: Sequence[Recipe]) -> None:
    """Rows drawn from what differs would be other rows in each cell. Raises UserError."""
    if len({json.dumps(recipe.data.model_dump(mode="json", exclude={"text"})) for recipe in recipes}) == 1:
        return
    held = {json.dumps([source.model_dump(mode="json") for source in recipe.data.heldout]) for recipe in recipes}
    if len(held) > 1 or any(not recipe.data.heldout or recipe.data.heldout_rows for recipe in recipes):
        raise UserError(
            f"The cells of {sweep.name} differ in their data and draw held-out rows from it: they do not compare.",
            "Name the same files in data.heldout for all of them, and leave data.heldout_rows at 0.",
        )


def cells_of(sweep: Sweep, out: Path) -> list[Cell]:
    """The product of the axes, in order. Raises UserError for points that are none, or cells of the same name."""
    axes = [[_point(axis, point) for point in points] for axis, points in sweep.grid.items()]
    product = list(itertools.product(*axes))
    if len(product) > MAX_CELLS:
        raise UserError(
            f"The grid of {sweep.name} has {len(product)} cells, at most {MAX_CELLS} are run.", "Shorten it."
        )
    cells = []
    for points in product:
        at = {axis: value for axis, (value, _) in zip(sweep.grid, points, strict=True)}
        name = "-".join(_slug(axis, value) for axis, value in at.items())[:41].rstrip("-")
        values = dict(sweep.common)
        for _, own in points:
            values |= own
        texts = [f"{key}={_yaml(_resolved(value, sweep, out))}" for key, value in values.items()]
        cells.append(Cell(name, at, (*texts, *sweep.overrides, f"name={json.dumps(name)}")))
    names = [cell.name for cell in cells]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UserError(f"Two cells of {sweep.name} are called {twice}.", "Give their points different values of at.")
    return cells


def _point(axis: str, point: Any) -> tuple[Any, dict[str, Any]]:
    """Where a point stands and what it overrides: a plain value is that of the key the axis is named by."""
    if not isinstance(point, dict):
        return point, {axis: point}
    if not isinstance(point.get("at"), int | float | str) or isinstance(point["at"], bool) or len(point) < 2:
        raise UserError(
            f"A point of grid.{axis} needs `at` (a number or a word) and keys of the recipe with their values.",
            "Write - {at: 1000, data.sources.0.sample: 1000}.",
        )
    return point["at"], {key: value for key, value in point.items() if key != "at"}


def _slug(axis: str, value: Any) -> str:
    """A point as part of a folder's name: words as they are, numbers behind the last part of their axis."""
    word = re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-") or "cell"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{re.sub('[^a-z0-9]+', '-', axis.split('.')[-1].lower())}-{word}" if is_number else word


def _resolved(value: Any, sweep: Sweep, out: Path) -> Any:
    """Paths beginning with . are relative to the sweep's file; `run:NAME` is the model of a recipe run first."""
    if isinstance(value, dict):
        return {key: _resolved(one, sweep, out) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, sweep, out) for one in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((sweep.folder / value).resolve())
    if isinstance(value, str) and value.startswith(_RUN):
        name, _, inside = value.removeprefix(_RUN).partition("/")
        recipe = next((path for path in sweep.first if path.stem == name), None)
        if recipe is None:
            raise UserError(f"{value}: no recipe of `first` is called {name}.", "Name it there, or mend the value.")
        run = out.resolve() / "first" / name
        return str(run / inside if inside else run / f"{4 + len(load_recipe(recipe).stages)}-model")
    return value


def _yaml(value: Any) -> str:
    """A value as an override writes it: JSON, but for floats, which YAML 1.1 knows by their point."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _recipes(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, Recipe]:
    return {cell.name: load_recipe(sweep.recipe, cell.overrides, needs_files=True) for cell in cells}


def missing_files(sweep: Sweep, out: Path) -> list[str]:
    """Paths that a run in `out` would read and that are not there; what is run first writes its own."""
    recipes = [load_recipe(recipe) for recipe in sweep.first]
    recipes += [load_recipe(sweep.recipe, cell.overrides) for cell in cells_of(sweep, out)]
    missing = {path for recipe in recipes for path in missing_inputs(recipe)}
    return sorted(path for path in missing if not Path(path).is_relative_to(out.resolve() / "first"))


def run_sweep(sweep: Sweep, out: Path) -> SweepResult:
    """Run every cell in `out`, each in a folder of its own, then write `comparison.html` there.

    A cell that stops for numerical reasons is told of on the page, and the others go on. Raises UserError, DiskError,
    Interrupted; NumericalStop where fewer than two cells came to an end.
    """
    cells = cells_of(sweep, out)
    firsts = {recipe.stem: load_recipe(recipe, needs_files=True) for recipe in sweep.first}
    # Before anything is written, unless what is run first may write what a cell reads.
    recipes = {} if firsts else _recipes(sweep, cells)
    _claim(sweep, out)
    for name, recipe in firsts.items():
        say(f"== first: {name}")
        run_recipe(recipe, out / "first" / name)
    recipes = recipes or _recipes(sweep, cells)
    write_json(out / SWEEP, {"name": sweep.name, "cells": [asdict(cell) for cell in cells]})
    relatives = [out / cell.name for cell in cells]
    result, models, stops = SweepResult(), {}, []
    for number, cell in enumerate(cells, start=1):
        say(f"== {cell.name} ({number} of {len(cells)})")
        told = {"name": cell.name, "at": cell.at, "status": "done", "model": None}
        try:
            run = run_recipe(recipes[cell.name], out / cell.name, relatives)
        except NumericalStop as stop:
            say(f"{cell.name}: {stop.problem}")
            told |= {"status": "stopped", "problem": stop.problem}
            stops.append(f"{cell.name} stopped for numerical reasons and is not compared: {stop.problem}")
        else:
            told |= {"model": run.model, "shared": [step.name for step in run.steps if step.status == "shared"]}
            models[cell.name] = run.model
        result.cells.append(told)
    if len(models) < 2:
        raise NumericalStop(
            f"{len(models)} of {len(cells)} cells came to an end.", "Lower peak_lr; see their autopsies."
        )
    files = _common_heldout([out / name for name in models], out)
    found = compare_models(models, files, sweep.questions, sweep.max_answer_tokens)
    found.notes += stops
    facts = [facts_of(cell.name, cell.at, out / cell.name, found) for cell in cells if cell.name in models]
    chapters, result.curves = trend_chapters(found, facts, sweep.curve_over)
    write_comparison(found, out / "comparison.html", sweep.name, chapters)
    write_json(out / "comparison.json", {"cells": result.cells, "curves": result.curves, "models": found.results})
    result.page = str(out / "comparison.html")
    return result


def _claim(sweep: Sweep, out: Path) -> None:
    """Refuse a folder that holds anything but this sweep. Raises UserError, DiskError."""
    elsewhere = "Give --out a new or empty folder."
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder.", elsewhere)
    mark = out / SWEEP
    if mark.is_file():
        written = read_json(mark)
        owner = written.get("name") if isinstance(written, dict) else None
        if owner != sweep.name:
            raise UserError(f"{out} holds the sweep {owner}, not {sweep.name}; nothing was touched.", elsewhere)
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} already holds something that is no sweep.", elsewhere)
    with disk_errors(out):
        make_folder(out)
    if not mark.is_file():
        write_json(mark, {"name": sweep.name, "cells": []})


def _common_heldout(runs: Sequence[Path], out: Path) -> list[str]:
    """Held-out dialogues that every run held out, by language, as files in `out`. Raises UserError, DiskError."""
    files = []
    for language in ("new", "old"):
        name = f"heldout-{language}.jsonl"
        found = [_rows(run / "3-data" / name) for run in runs]
        common = set(found[0]).intersection(*found[1:])
        if common:
            with disk_errors(out):
                text = "".join(row for key, row in found[0].items() if key in common)
                (out / name).write_text(text, encoding="utf-8")
            files.append(str(out / name))
    if not files:
        raise UserError("The runs have no held-out row in common.", "Name the same data.heldout files for all of them.")
    return files


def _rows(path: Path) -> dict[str, str]:
    """The lines of a file of held-out dialogues, by what is said in them."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return {json.dumps(json.loads(line)["messages"]): line for line in lines}
