"""A run: the steps of the road in order, each skipped when what it is asked and given is unchanged.

Owns the plan, the chain of keys, and what is refused before anything is redone. Does not know how a step does its
work: `road.py` does.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from graftlm.device import machine_name, use_all_cores
from graftlm.errors import NumericalStop, UserError
from graftlm.feasible import (
    PRETRAINING,
    refuse_rows_that_may_come,
    refuse_what_cannot_be_computed,
    refuse_what_surely_does_not_fit,
)
from graftlm.health.autopsy import Autopsy, autopsy
from graftlm.inputs import check_inputs, inputs_of
from graftlm.recipe import Recipe
from graftlm.release.autopsy_page import HEALTH, write_autopsy
from graftlm.release.card import Form, write_card
from graftlm.release.export import Manifest, export_gguf_of_folder, whole_or_absent
from graftlm.release.gguf_file import Quantization
from graftlm.road import Facts, Road
from graftlm.run import RECIPE, RunFolder, disk_errors, read_json, say
from graftlm.step import STARTED, Order, Step, fingerprint, make_order
from graftlm.talk.generate import model_of_run
from graftlm.text.first_look import look_at_dialogues, look_at_lines, look_at_texts
from graftlm.text.rows import FORMAT_VERSION
from graftlm.training.ranks import ALONE, Ranks

EARLIER = "earlier"


@dataclass(slots=True)
class StepResult:
    """What became of one step: `done` now, `unchanged` since an earlier run, or `shared` with another run."""

    name: str
    seconds: float
    status: str


@dataclass(slots=True)
class RunResult:
    """The finished road; `questions` holds the exact questions shown and their counts, where the recipe has any;
    `health` what an autopsy says of its training, "" where that has nothing to tell."""

    steps: list[StepResult] = field(default_factory=list)
    model: str = ""
    report: str = ""
    questions: dict[str, Any] | None = None
    health: str = ""


def run_recipe(recipe: Recipe, folder: Path, relatives: Sequence[Path] = (), ranks: Ranks = ALONE) -> RunResult:
    """Walk the whole road in `folder`; what is finished and unchanged is kept, what was interrupted goes on.

    `relatives` are folders of other runs: a step one of them has finished for the same order is taken over from it.
    This process is the first of `ranks`; the others take part in training (`following.follow`).
    Raises UserError, NumericalStop, DiskError, Interrupted, RankLost.
    """
    with _begun(recipe, folder, relatives, ranks) as (walk, orders):
        try:
            result = walk.take_all(orders)
        except NumericalStop as stop:
            left = _leave_autopsy(folder)
            fix = f"{stop.fix.rstrip('.')}. Page: {left[1]}" if left else stop.fix
            raise NumericalStop(stop.problem, fix) from None
        left = _leave_autopsy(folder)  # one that lay there is of an end that is none any more
        if left and left[0].verdict != "healthy":
            result.health = f"{left[0].verdict}: {left[0].told} {left[1]}"
        return result


def _leave_autopsy(folder: Path) -> tuple[Autopsy, Path] | None:
    """Write health.json and autopsy.html into a run's folder: what was found, and the page. None where its training
    has nothing to tell, or the disk no room for it: what stopped the run matters more."""
    try:
        found = autopsy(folder)
        if found.verdict == "healthy" and not (folder / HEALTH).is_file():
            return None
        return found, write_autopsy(found, folder)
    except UserError:
        return None


@dataclass(slots=True)
class PreflightResult:
    """The pre-flight of every stage: its findings with the stage each is of, the least forward headroom (bits below
    fp16's largest number), the first stage's first loss by class of pieces (nats), and all that was seen by stage."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    headroom_bits: float | None = None
    first_loss: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


def preflight_recipe(recipe: Recipe, folder: Path) -> PreflightResult:
    """Take the steps before the first stage in `folder` (a later run keeps them), then look at every stage.

    Raises UserError, DiskError, Interrupted.
    """
    result = PreflightResult()
    with _begun(recipe, folder) as (walk, orders):
        walk.take_before_stages(orders)
        for name, look, findings in walk.road.look_at_stages():
            result.findings += [{"stage": name, **asdict(finding)} for finding in findings]
            result.stages[name] = asdict(look)
            bits = look.headroom_bits
            if math.isfinite(bits):
                result.headroom_bits = bits if result.headroom_bits is None else min(bits, result.headroom_bits)
            result.first_loss = result.first_loss or dict(look.first_loss)
    return result


@contextlib.contextmanager
def _begun(
    recipe: Recipe, folder: Path, relatives: Sequence[Path] = (), ranks: Ranks = ALONE
) -> Iterator[tuple[_Walk, dict[str, Order]]]:
    """A walk in a locked run folder, once nothing speaks against it; the resolved recipe is written."""
    check_inputs(recipe)
    use_all_cores()
    with RunFolder(folder, recipe.name) as run:
        walk = _Walk(recipe, run.folder, relatives, ranks)
        orders = walk.orders()
        walk.refuse_lost_training(orders)
        walk.look_at_inputs(orders)
        walk.refuse_impossible_stages(orders)
        run.write_recipe(recipe.model_dump(mode="json"), _inputs(orders))
        yield walk, orders


def due_steps(recipe: Recipe, folder: Path) -> list[str]:
    """Names of the steps `run_recipe` would take now, in order; nothing is written.

    Raises UserError where it would refuse to begin: unfinished training that would be lost, a damaged step.
    """
    walk = _Walk(recipe, folder)
    orders = walk.orders()
    walk.refuse_lost_training(orders)
    due = walk.due(orders)
    return [stop.name for stop in walk.stops if stop.name in due]


def export_run(folder: Path, to: str, out: Path | None, quantization: str | None = None) -> Manifest:
    """Write a finished run's model again: merged (`hf`), as its last stage's adapter, or for llama.cpp (`gguf`).

    `adapter` writes two folders: `adapter` and the `base` it belongs on. For `gguf` a plain model folder will do.
    `out` is whole and checked, or absent. Raises UserError, NumericalStop, DiskError.
    """
    form = next((known for known in get_args(Form) if known == to), None)
    if form is None:
        raise UserError(
            f"--to {to} is not known.", "Choose hf (one merged folder), adapter (base and PEFT adapter) or gguf."
        )
    if quantization is not None and to != "gguf":
        raise UserError(f"--quantization belongs to --to gguf, not to --to {to}.", "Leave it out.")
    if quantization not in (None, "f16", "q8_0"):
        raise UserError(f"--quantization {quantization} is not known.", "Choose f16 or q8_0.")
    kind: Quantization = "q8_0" if quantization == "q8_0" else "f16"
    name = f"export-gguf-{kind}" if to == "gguf" else f"export-{to}"
    if not (folder / RECIPE).is_file():
        return _export_folder(folder, to, out or folder.absolute().parent / name, kind)
    recipe = Recipe.model_validate(read_json(folder / RECIPE)["recipe"])
    out = out or folder / name

    def add_card(scratch: Path) -> None:
        write_card(folder, scratch, form)

    with RunFolder(folder, recipe.name):
        road = Road(recipe, folder)
        road.check_stages_done()
        if to == "adapter":
            return whole_or_absent(out, lambda scratch: road.export_adapter(scratch, add_card))
        if to == "gguf":
            return whole_or_absent(out, lambda scratch: road.export_gguf(scratch, kind, add_card))
        return whole_or_absent(out, lambda scratch: road.export_hf(scratch, add_card))


def _export_folder(folder: Path, to: str, out: Path, quantization: Quantization) -> Manifest:
    """What can be made of a model folder alone."""
    if to != "gguf" or not (folder / "config.json").is_file():
        found = "it holds no recipe.json" if folder.is_dir() else "there is no folder of that name"
        raise UserError(
            f"{folder} is no run folder: {found}.",
            "Give the folder of `graftlm run --out`" + (", or a model folder." if to == "gguf" else "."),
        )
    model = Path(model_of_run(folder))
    return whole_or_absent(out, lambda scratch: export_gguf_of_folder(model, scratch, quantization))


@dataclass(frozen=True, slots=True)
class _Stop:
    """A step as planned: its folder, its part of the recipe by section, the inputs it reads, and its work."""

    name: str
    asked: dict[str, Any]
    work: Callable[[Step], Facts]
    inputs: tuple[str, ...] = ()
    version: int = 1


class _Walk:
    """One walk along the road: what is planned, done, changed or left over."""

    def __init__(self, recipe: Recipe, folder: Path, relatives: Sequence[Path] = (), ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self.relatives = relatives
        self.road = Road(recipe, folder, ranks)
        self.stops = _plan(recipe, self.road)

    def orders(self) -> dict[str, Order]:
        """What each step is asked and given, with its key. Raises UserError for an input that cannot be read."""
        marks: dict[str, str] = {}
        orders: dict[str, Order] = {}
        key = ""
        for stop in self.stops:
            marks |= {path: fingerprint(path) for path in stop.inputs if path not in marks}
            given = {path: marks[path] for path in stop.inputs}
            orders[stop.name] = make_order(stop.name, stop.asked, given, key, stop.version)
            key = orders[stop.name].key
        return orders

    def refuse_lost_training(self, orders: dict[str, Order]) -> None:
        """Refuse, before anything is redone, to throw unfinished training away. Raises UserError."""
        changes: list[str] = []
        for stop in self.stops:
            step = Step(self.folder / stop.name)
            changes += step.changes(orders[stop.name])
            if step.is_begun_with_another(orders[stop.name].key):
                step.refuse_lost_training(changes)
        for step in self._left_over():
            step.refuse_lost_training([f"stages (the recipe has no {step.name} now)"])

    def look_at_inputs(self, orders: dict[str, Order]) -> None:
        """Refuse, before the first step, what a due step would and first rows already show. Raises UserError."""
        found = _first_look(self.road.recipe, self.due(orders), self.road.report_folder.name)
        if found:
            count = f"{len(found)} of the inputs are" if len(found) > 1 else "An input is"
            raise UserError(
                "\n".join([f"{count} of no use as it is:", *(f"  {line}" for line in found)]),
                "Mend that and run the same command again; graftlm data FILE --show 5 tells what a file holds.",
            )

    def refuse_impossible_stages(self, orders: dict[str, Order]) -> None:
        """Refuse, before the first step, a due stage that this machine cannot compute. Raises UserError.

        One that is done asks for nothing any more: its run may be finished on another machine.
        """
        recipe, due, device = self.road.recipe, self.due(orders), self.road.device
        scratch, stages = recipe.base.scratch, {}
        if scratch and "0-scratch" in due:
            stages[PRETRAINING] = scratch.training
        for number, stage in enumerate(recipe.stages):
            if self.road.stage_folder(number).name in due:
                stages[f"stages.{stage.name}"] = stage
        refuse_what_cannot_be_computed(stages, device)
        if PRETRAINING in stages:
            refuse_rows_that_may_come(recipe, stages)
        rows = None if "3-data" in due else self.folder
        refuse_what_surely_does_not_fit(recipe, stages, device, self.road.ranks, rows)

    def due(self, orders: dict[str, Order]) -> set[str]:
        """Names of the steps that are not done as ordered. Raises UserError for a damaged one."""
        return {stop.name for stop in self.stops if not Step(self.folder / stop.name).is_done(orders[stop.name].key)}

    def _left_over(self) -> list[Step]:
        """Folders of steps the recipe had once: after a stage came or went, later folders are numbered anew."""
        planned = {stop.name for stop in self.stops}
        folders = sorted(mark.parent for mark in self.folder.glob(f"*/{STARTED}"))
        return [Step(folder) for folder in folders if folder.name not in planned]

    def take_before_stages(self, orders: dict[str, Order]) -> None:
        """Take what is not done of tokenizer, base and data. Raises UserError, DiskError, Interrupted."""
        first = self.road.stage_folder(0).name
        for stop in itertools.takewhile(lambda stop: stop.name != first, self.stops):
            self._take(stop, orders[stop.name])

    def take_all(self, orders: dict[str, Order]) -> RunResult:
        """Take every step that is not done. Raises UserError, NumericalStop, DiskError, Interrupted."""
        for step in self._left_over():
            say(f"{step.name}: no step of this recipe any more, moved to {EARLIER}/{step.move_below(EARLIER)}")
        road = self.road
        result = RunResult(model=str(road.model_folder), report=str(road.report_folder / "report.html"))
        for stop in self.stops:
            result.steps.append(self._take(stop, orders[stop.name]))
        # Last of all, so that it tells of everything; no step's own file, so that no step is redone for it.
        write_card(self.folder, road.model_folder)
        asked = road.report_folder / "questions.json"
        result.questions = read_json(asked) if asked.is_file() else None
        return result

    def _take(self, stop: _Stop, order: Order) -> StepResult:
        step = Step(self.folder / stop.name)
        if step.is_done(order.key):
            step.free_space()  # a kill may have come between the done mark and this
            say(f"{stop.name}: unchanged")
            return StepResult(stop.name, step.seconds(), "unchanged")
        twins = (relative / stop.name for relative in self.relatives)
        twin = next((twin for twin in twins if twin != step.folder and Step(twin).is_done(order.key)), None)
        if twin is not None and not step.folder.exists():
            step.take_over(twin)
            say(f"{stop.name}: as in {twin}")
            return StepResult(stop.name, step.seconds(), "shared")
        changes = ", ".join(step.changes(order))
        say(f"{stop.name} ...{f' again, changed: {changes}' if changes else ''}")
        step.begin(order)
        started = time.monotonic()
        with disk_errors(step.folder):
            facts = stop.work(step)
        seconds = time.monotonic() - started
        step.finish(order.key, seconds, **facts, machine=machine_name(self.road.device))
        say(f"{stop.name}: done in {seconds:.1f} s")
        return StepResult(stop.name, seconds, "done")


def _plan(recipe: Recipe, road: Road) -> list[_Stop]:
    """Every step of the road, in order. A step's version rises when the form of what it writes changes."""
    inputs = inputs_of(recipe)
    stops = []
    if recipe.base.scratch:
        scratch = recipe.base.scratch.model_dump(mode="json", exclude={"training"})
        training = recipe.base.scratch.training.as_ordered()
        asked = {"base": {"scratch": scratch | {"training": training}}, "seed": recipe.seed}
        stops.append(_Stop("0-scratch", asked, road.build_scratch, inputs["scratch"]))
    stops += [
        _Stop("1-tokenizer", _section(recipe, "tokenizer"), road.graft_tokenizer, inputs["tokenizer"]),
        _Stop("2-base", _section(recipe, "grow"), road.grow_base, inputs["base"]),
        _Stop("3-data", _section(recipe, "data"), road.prepare_data, inputs["data"], FORMAT_VERSION),
    ]
    for number, stage in enumerate(recipe.stages):
        asked = {"stages": {stage.name: stage.as_ordered()}}
        stops.append(_Stop(road.stage_folder(number).name, asked, road.train_stage(number)))
    sampled = recipe.report.model_dump(mode="json", include={"num_samples", "max_answer_tokens"})
    stops += [
        _Stop(road.model_folder.name, _section(recipe, "export"), road.export_model),
        _Stop(road.heldout_folder.name, {"report": sampled}, road.judge, version=2),
        _Stop(road.report_folder.name, _section(recipe, "report"), road.report, inputs["report"]),
    ]
    return stops


def _first_look(recipe: Recipe, due: set[str], report: str) -> list[str]:
    """What the first rows of the files show to be wrong that the steps `due` will read, a line for each."""
    scratch, tokenizer, data = recipe.base.scratch, recipe.tokenizer, recipe.data
    found: list[str] = []
    if scratch and "0-scratch" in due:
        found += look_at_lines((*scratch.text, *scratch.heldout))
    if "1-tokenizer" in due:
        found += look_at_texts(tokenizer.text)
    if "3-data" in due:
        found += look_at_dialogues(data.sources, (*data.heldout, *data.text))
    if recipe.report.exact_questions and report in due:
        found += look_at_lines([recipe.report.exact_questions])
    return list(dict.fromkeys(found))


def _inputs(orders: dict[str, Order]) -> dict[str, str]:
    """Fingerprints of everything read by path, by path."""
    return {path: mark for order in orders.values() for path, mark in order.given.items()}


def _section(recipe: Recipe, name: str) -> dict[str, Any]:
    return {name: getattr(recipe, name).model_dump(mode="json")}
