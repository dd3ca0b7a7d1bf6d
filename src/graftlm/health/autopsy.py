"""The autopsy: what a run or a log says went wrong, why, and what to change.

Owns which files are read: of a run folder all its stages with their pre-flight, its recipe, tokenizer and rows; of
anything else the curves, as far as they reach. Reads only, so that a run still going, or one that was killed, can be
looked at. Does not judge (`course.py`, `curves.py`, `incident.py`) and does not draw (`release/autopsy_page.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.health.course import SEVERITIES, VERDICTS, Course, Diagnosis, Names, diagnose_course
from graftlm.health.cures import Asked
from graftlm.health.finding import Finding, Verdict
from graftlm.health.logs import read_log, read_metrics_log
from graftlm.run import DONE, RECIPE, is_in_use, read_json
from graftlm.text.rows import TokenRows
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

METRICS, PREFLIGHT, TRAINER_STATE = "metrics.jsonl", "preflight.json", "trainer_state.json"
SCRATCH = "0-scratch"
_GIVE = "Give the folder of a run (graftlm run --out), one of its stages, or a training log."
_WORDS: dict[Verdict, str] = {
    "healthy": "Nothing here asks for a person.",
    "recovered": "Something went wrong and was mended, or passed by itself; training went on well.",
    "damaged": "Training went on, but the loss ended far above its best.",
    "diverged": "The loss ended no better than it began.",
    "crashed": "Training stopped by itself before its end.",
}
_OLD_LOST: dict[Verdict, str] = {"damaged": "Something went wrong and training went on, but with damage."}
_OLD_LOST_TOO = "Held-out loss of the old language ended far above its start."
_IN_TROUBLE = "It was in trouble at its last step so far, and nothing had mended that yet."


@dataclass(frozen=True, slots=True)
class Autopsy:
    """What was found, stage by stage; `path` is what was looked at, `is_run` whether that is a whole run's folder."""

    path: Path
    name: str
    courses: list[Course]
    is_run: bool = False

    @property
    def verdict(self) -> Verdict:
        """The gravest of its stages' verdicts."""
        return VERDICTS[max(VERDICTS.index(course.verdict) for course in self.courses)]

    @property
    def told(self) -> str:
        """The verdict in words."""
        if any(course.is_in_trouble and course.verdict == self.verdict for course in self.courses):
            return _IN_TROUBLE
        if any(course.is_old_lost for course in self.courses):
            return f"{_OLD_LOST.get(self.verdict, _WORDS[self.verdict])} {_OLD_LOST_TOO}"
        return _WORDS[self.verdict]

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """All findings: gravest first, then in the order of stages and steps."""
        found = [told for course in self.courses for told in course.diagnoses]
        return sorted(found, key=lambda told: SEVERITIES.index(told.finding.severity))

    @property
    def changes(self) -> list[str]:
        """The recipe's lines to change, of all findings; where two speak of one knob, the graver one's, and of two as
        grave that of what happened rather than of what was foreseen. Of two rates the lower, where no rate is known
        that a stage came through with."""
        by_knob: dict[str, str] = {}
        recovered = {course.name for course in self.courses if course.verdict == "recovered"}
        by_weight = sorted(
            self.diagnoses, key=lambda told: (SEVERITIES.index(told.finding.severity), told.finding.step is None)
        )
        for told in by_weight:
            for line in told.lines:
                knob, _, value = line.partition("=")
                known = by_knob.setdefault(knob, line)
                if (
                    knob.endswith("peak_lr")
                    and told.stage not in recovered
                    and float(value) < float(known.partition("=")[2])
                ):
                    by_knob[knob] = line
        return list(by_knob.values())

    def to_json(self) -> dict[str, Any]:
        """As `graftlm autopsy --json` prints it and `health.json` holds it."""
        return {
            "run": str(self.path),
            "verdict": self.verdict,
            "told": self.told,
            "findings": [_finding_json(told) for told in self.diagnoses],
            "changes": self.changes,
            "stages": [_course_json(course) for course in self.courses],
            "interventions": [
                {"stage": course.name, **{key: value for key, value in line.items() if key != "event"}}
                for course in self.courses
                for line in course.log.interventions
            ],
        }


def autopsy(path: str | Path) -> Autopsy:
    """Look at a run folder, a stage's folder or a log. Raises UserError for what is none of these."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}.", _GIVE)
    if path.is_dir():
        run = _run_in(path)
        if run is not None:
            return Autopsy(path, run.name, _courses(run), is_run=True)
        if (path / METRICS).is_file() or (path / PREFLIGHT).is_file():
            return Autopsy(path, path.resolve().name, [_stage_course(path, _run_in(path.absolute().parent))])
        if not (path / TRAINER_STATE).is_file():
            raise UserError(f"{path} is no run: it holds no {RECIPE} and no {METRICS}.", _GIVE)
        path = path / TRAINER_STATE
    log = read_log(path)
    if path.name == METRICS:
        folder = path.resolve().parent
        return Autopsy(path, log.name, [_stage_course(folder, _run_in(folder.parent))])
    course = Course(log.name, log)
    diagnose_course(course)
    return Autopsy(path, log.name, [course])


class _Run:
    """What a run's folder tells about its stages."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder, self.recipe, self.name = folder, recipe, str(recipe["name"])
        self._rows: dict[str, TokenRows | None] = {}

    def stages(self) -> dict[str, Asked]:
        """What each stage was asked by its folder's name, in order."""
        grow = self.recipe.get("grow") or {}
        scratch = (self.recipe.get("base") or {}).get("scratch")
        found = {SCRATCH: Asked("base.scratch.training", scratch["training"])} if scratch else {}
        for number, stage in enumerate(self.recipe["stages"]):
            found[f"{4 + number}-{stage['name']}"] = Asked(f"stages.{stage['name']}", stage, grow)
        return found

    def names(self, stage: str) -> Names:
        """What tokens and rows of a stage are called."""
        asked = self.stages()[stage].stage
        folder = "text" if asked.get("objective") == "text" else "train"
        if stage == SCRATCH:  # its rows were never written
            return Names(token=lambda token_id: _token_text(self._scratch_tokenizer, token_id))
        return Names(
            token=lambda token_id: _token_text(self._tokenizer, token_id),
            row=lambda row_id: self._source(folder, row_id),
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return _tokenizer_in(self.folder / "1-tokenizer")

    @cached_property
    def _scratch_tokenizer(self) -> Tokenizer | None:
        return _tokenizer_in(self.folder / SCRATCH / "tokenizer")

    def _source(self, folder: str, row_id: int) -> str:
        if folder not in self._rows:
            try:
                self._rows[folder] = TokenRows.load(self.folder / "3-data" / folder)
            except UserError:
                self._rows[folder] = None  # evidence of less: an autopsy takes what is left
        rows = self._rows[folder]
        return rows.sources[row_id] if rows is not None and row_id < len(rows.sources) else ""


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder) if folder.is_dir() else None
    except UserError:
        return None


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return "" if tokenizer is None else tokenizer.name_of(token_id)


def _run_in(folder: Path) -> _Run | None:
    """The run in a folder; None where its recipe.json is missing or another thing's. Raises UserError if damaged."""
    if not (folder / RECIPE).is_file():
        return None
    content = read_json(folder / RECIPE)
    recipe = content.get("recipe") if isinstance(content, dict) else None
    is_ours = isinstance(recipe, dict) and "name" in recipe and isinstance(recipe.get("stages"), list)
    return _Run(folder, recipe) if is_ours and recipe is not None else None


def _courses(run: _Run) -> list[Course]:
    folders = [run.folder / name for name in run.stages()]
    begun = [folder for folder in folders if (folder / METRICS).is_file() or (folder / PREFLIGHT).is_file()]
    if not begun:
        raise UserError(
            f"{run.folder} has not begun to train: none of its stages holds a {METRICS}.",
            "Run its recipe again to go on, then look once more.",
        )
    return [_stage_course(folder, run) for folder in begun]


def _stage_course(folder: Path, run: _Run | None) -> Course:
    log = read_metrics_log(folder / METRICS)
    course = Course(folder.resolve().name, log, "unfinished")
    course.is_running = is_in_use(run.folder) if run is not None else None
    if (folder / DONE).is_file():
        course.state = "finished"
    elif log.ending:
        course.state = "stopped"
    if (folder / PREFLIGHT).is_file():
        taken = read_json(folder / PREFLIGHT)
        course.preflight = [_finding(found) for found in taken.get("findings", ())]
        course.look = taken.get("look", {})
    course.good_checkpoint = _good_checkpoint(folder)
    known = run is not None and course.name in run.stages()
    if run is not None and known:
        course.asked = run.stages()[course.name]
    diagnose_course(course, run.names(course.name) if run is not None and known else None)
    if course.is_refused:
        course.state = "stopped"
    return course


def _good_checkpoint(folder: Path) -> str:
    """The newest checkpoint written down as good, as `training/checkpoint.py` lays them out; "" where there is none."""
    for values in sorted(folder.glob("checkpoints/step-*/values.json"), reverse=True):
        try:
            if read_json(values).get("is_good"):
                return str(values.parent.relative_to(folder))
        except UserError:
            continue  # evidence of less
    return ""


def _finding(found: dict[str, Any]) -> Finding:
    values: dict[str, Any] = {f.name: found.get(f.name) for f in fields(Finding)}
    return Finding(**values)


def _finding_json(told: Diagnosis) -> dict[str, Any]:
    finding = told.finding
    return {
        "cause": finding.cause, "severity": finding.severity, "stage": told.stage, "where": finding.where,
        "step": finding.step, "last_step": told.last_step, "count": told.count, "evidence": finding.evidence,
        "cure": finding.cure, "lines": list(told.lines), "row_ids": list(told.row_ids),
        "batch_file": f"{told.stage}/{told.batch_file}" if told.batch_file else None,
    }  # fmt: skip


def _course_json(course: Course) -> dict[str, Any]:
    losses = [r.loss for r in course.log.records if r.loss is not None and math.isfinite(r.loss)]
    return {
        "name": course.name, "verdict": course.verdict, "state": course.state, "last_step": course.log.last_step,
        "num_skipped": sum(r.skipped for r in course.log.records), "num_rollbacks": len(course.log.interventions),
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "ending": course.log.ending,
        "good_checkpoint": f"{course.name}/{course.good_checkpoint}" if course.good_checkpoint else None,
    }  # fmt: skip
