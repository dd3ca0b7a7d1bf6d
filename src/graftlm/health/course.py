"""The course of one stage: its curves, its incidents and its pre-flight put together into findings and a verdict.

Owns how many signs of one fault become one finding, which of them tells most, and what the stage amounts to. Pure: what
a token or row is called, and what the recipe asked, is handed in by `autopsy.py`, which reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from graftlm.health.cures import Asked, recipe_lines
from graftlm.health.curves import WINDOW, diagnose_curves
from graftlm.health.finding import Finding, Verdict
from graftlm.health.incident import HOPELESS, HOPELESS_IN_A_ROW, Incident, finding_of, is_bad_start
from graftlm.health.rates import RATE_CUT, RateCuts, hottest_first, rate_cuts_of
from graftlm.health.records import RunLog

State = Literal["finished", "stopped", "unfinished", "log"]
SEVERITIES = ("fatal", "warning", "note")
VERDICTS: tuple[Verdict, ...] = ("healthy", "recovered", "damaged", "diverged", "crashed")
# What curves show of a fault that a replay has named: part of its evidence, no finding of its own.
_SHOWN_BY_INCIDENTS = frozenset(
    {"loss-not-finite", "overflow-storm", "ratchet", "scale-at-floor", "not-finite", "scale-starts-too-high"}
)
_ROWS_NAMED = 3
OLD_LOST = 1.0  # nats a token above the start: e times the perplexity


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A finding, the stage it is of, how often and until when it was seen, and the recipe's lines that cure it.

    `row_ids` are those of the step it is told of, where they are known; the stage's `batch_file` holds the rows.
    """

    finding: Finding
    stage: str
    count: int = 1
    last_step: int | None = None
    lines: tuple[str, ...] = ()
    row_ids: tuple[int, ...] = ()
    batch_file: str = ""


@dataclass(frozen=True, slots=True)
class Names:
    """What ids are called: the text of a token, and the "file:line" of a row; "" where nobody knows."""

    token: Callable[[int], str] = lambda _: ""
    row: Callable[[int], str] = lambda _: ""


@dataclass(slots=True)
class Course:
    """One stage as it went. `look` holds the numbers its pre-flight took, `asked` is None where no recipe is known;
    `good_checkpoint` is the newest state kept that nothing spoke against, relative to the stage's folder; `is_running`
    whether its run goes on now, where that is known; `is_in_trouble` tells of a stage that has not ended that what went
    wrong last was not over at its last step, `is_old_lost` that held-out loss of the old language ended far above its
    start."""

    name: str
    log: RunLog
    state: State = "log"
    preflight: list[Finding] = field(default_factory=list)
    look: Mapping[str, Any] = field(default_factory=dict)
    asked: Asked | None = None
    good_checkpoint: str = ""
    verdict: Verdict = "healthy"
    is_running: bool | None = None
    is_in_trouble: bool = False
    is_old_lost: bool = False
    diagnoses: list[Diagnosis] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether pre-flight stopped it before its first step."""
        has_doctor = self.asked is None or self.asked.stage.get("recovery") != "off"
        is_grave = any(finding.severity == "fatal" for finding in self.preflight)
        return has_doctor and is_grave and self.state != "finished" and not self.log.records


def diagnose_course(course: Course, names: Names | None = None) -> None:
    """Fill in the course's diagnoses, in the order of their steps, and its verdict."""
    shown, verdict = diagnose_curves(course.log)
    incidents = [_incident(line) for line in course.log.incidents]
    if any(finding_of(incident).severity != "note" for incident in incidents) and verdict == "healthy":
        verdict = "recovered"  # every such step was skipped or gone back from
    if course.state == "finished" and verdict == "crashed":
        verdict = "recovered"  # it looked like an end, and went on to its own
    course.is_in_trouble = (
        course.state == "unfinished" and not course.log.ending and _is_in_trouble(course.log, verdict)
    )
    if course.is_in_trouble and verdict != "diverged":
        verdict = "damaged"
    course.verdict = "crashed" if course.is_refused else verdict
    if course.verdict not in ("healthy", "recovered"):
        shown = [finding for finding in shown if finding.cause != "over-fitted"]  # far more than that
    lost = _old_language_lost(course.log)
    if lost and course.verdict == "recovered":
        course.verdict, lost = "damaged", replace(lost, severity="fatal")
    course.is_old_lost = lost is not None
    found = [_diagnosis(finding, course) for finding in [*course.preflight, *shown, *([lost] if lost else [])]]
    found = _without_shown(found, _grouped(incidents, course, names or Names()), course)
    if course.verdict in ("healthy", "recovered"):
        found = [replace(told, finding=_no_longer_fatal(told.finding)) for told in found]
    course.diagnoses = sorted(found, key=lambda told: told.finding.step or 0)


def _old_language_lost(log: RunLog) -> Finding | None:
    """A note where held-out loss of the old language ended far above the reading before the first step.

    Some forgetting is the price of another language; where a run had to be mended as well, it is damage.
    """
    readings = log.readings.get("old", ())
    if len(readings) < 2 or readings[0][0] != 0 or not math.isfinite(readings[0][1]):
        return None
    (_, first), (step, last) = readings[0], readings[-1]
    if last <= first + OLD_LOST:
        return None
    return Finding(
        "old-language-lost", "note", "held-out loss, old language", step,
        f"Held-out loss of the old language began at {first:.2f} nats a token and ended at {last:.2f} (step {step}).",
        "Train on rows of the old language too (data.sources, language: old), or lower peak_lr.",
    )  # fmt: skip


def _is_in_trouble(log: RunLog, verdict: Verdict) -> bool:
    """Whether what went wrong last goes on: steps skipped up to the last one, or a rollback not yet proven."""
    if verdict not in ("healthy", "recovered"):
        return True
    good = [record.step for record in log.records if not record.skipped]
    since = good[-1] if good else 0
    if log.last_step - since >= HOPELESS_IN_A_ROW and any(
        line["cause"] in HOPELESS and line["step"] > since for line in log.incidents
    ):
        return True
    return bool(log.interventions) and sum(step > log.interventions[-1]["step"] for step in good) < WINDOW


def _incident(line: Mapping[str, Any]) -> Incident:
    """An incident as it was written; what another version wrote besides is passed over."""
    known = {f.name for f in fields(Incident)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items() if k in known}
    return Incident(**values)


def _taken(course: Course) -> RateCuts:
    """What rollbacks had left of the recipe's rates."""
    return rate_cuts_of(course.log.interventions[-1]) if course.log.interventions else RateCuts()


def _proposed(course: Course, asked: Asked, culprits: Sequence[str]) -> RateCuts:
    """What of the recipe's rates a new run should take: what the run came through with, else one cut more."""
    taken = _taken(course)
    if course.log.interventions and course.verdict == "recovered":
        return taken
    return taken.cut(culprits, asked.peak_lr or math.inf, asked.own_rates)


def _diagnosis(finding: Finding, course: Course, culprits: Sequence[str] = (), *, is_start: bool = False) -> Diagnosis:
    if course.asked is None:
        return Diagnosis(finding, course.name, last_step=finding.step)
    if finding.severity == "note" and finding.cause != "over-fitted":
        return Diagnosis(finding, course.name, last_step=finding.step)
    lines = recipe_lines(
        finding.cause, course.asked, where=finding.where, is_start=is_start,
        cuts=_proposed(course, course.asked, culprits), lora_factor=course.look.get("lora_factor"),
        weight_rms={role: numbers["weight_rms"] for role, numbers in course.look.get("roles", {}).items()},
    )  # fmt: skip
    if lines and course.log.interventions and "peak_lr" in lines[0]:
        finding = replace(finding, cure=f"{finding.cure} {_rates_tried(course)}")
    return Diagnosis(finding, course.name, last_step=finding.step, lines=lines)


def _rates_tried(course: Course) -> str:
    left = _taken(course).left()
    if course.verdict == "recovered":
        return f"It came through with {left}."
    return f"Rollbacks went down to {left}, still too much: take {RATE_CUT:g} of that."


def _grouped(incidents: Sequence[Incident], course: Course, names: Names) -> list[Diagnosis]:
    """One diagnosis a class of incidents, told by the one that tells most."""
    by_cause: dict[str, list[Incident]] = {}
    for incident in incidents:
        by_cause.setdefault(incident.cause, []).append(incident)
    return [_of_one_cause(alike, course, names) for alike in by_cause.values()]


def _of_one_cause(alike: Sequence[Incident], course: Course, names: Names) -> Diagnosis:
    telling = max(alike, key=lambda one: (bool(one.culprits), _has_some_bad_rows(one), one.row_id >= 0))
    if course.asked is not None:
        telling = replace(telling, culprits=tuple(hottest_first(telling.culprits, course.asked.own_rates)))
    finding = finding_of(telling, names.token(telling.token_id) if telling.token_id >= 0 else "")
    first, last = min(one.step for one in alike), max(one.step for one in alike)
    told = [finding.evidence, _sources(telling, names) if telling.cause in HOPELESS else ""]
    if len(alike) > 1:
        at = (
            f" at step {first}"
            if first == last
            else f", from step {first} to step {last}; told as of step {telling.step}"
        )
        told.append(f"Seen {len(alike)} times{at}.")
    finding = replace(finding, step=first, evidence=" ".join(filter(None, told)))
    told_of = _diagnosis(finding, course, telling.culprits, is_start=_is_from_start(telling))
    batch = {"row_ids": telling.batch_rows, "batch_file": telling.batch_file}
    return replace(told_of, count=len(alike), last_step=last, **batch)


def _has_some_bad_rows(incident: Incident) -> bool:
    return 0 < len(incident.bad_rows) < incident.num_rows


def _is_from_start(incident: Incident) -> bool:
    """Whether how new rows start is to blame: no rate is. An adapter starts as nothing: what it is, it learned."""
    if incident.culprits or incident.cause not in HOPELESS:
        return False
    return is_bad_start(incident) or _has_some_bad_rows(incident)


def _sources(incident: Incident, names: Names) -> str:
    """Where the rows named stand in the files they came from."""
    others = incident.bad_rows[:_ROWS_NAMED] if _has_some_bad_rows(incident) else ()
    ids = dict.fromkeys((incident.row_id, *others))
    places = [(row_id, names.row(row_id)) for row_id in ids if row_id >= 0]
    known = [f"row {row_id} is {place}" for row_id, place in places if place]
    return f"{'; '.join(known).capitalize()}." if known else ""


def _without_shown(found: Sequence[Diagnosis], incidents: Sequence[Diagnosis], course: Course) -> list[Diagnosis]:
    """Curves' findings that an incident explains become part of that incident's evidence; how it ended comes last."""
    by_cause = {told.finding.cause: told for told in incidents}
    grave = [told.finding.cause for told in incidents if told.finding.severity == "fatal"]
    last = course.log.incidents[-1]["cause"] if course.log.incidents else ""
    # No step touched a weight, so no rate can be to blame for a storm of overflows that the scale alone caused.
    by_scale = "scale-too-high" in by_cause and any(told.finding.cause == "scale-starts-too-high" for told in found)
    kept = []
    for told in sorted(found, key=lambda told: told.finding.evidence == course.log.ending):
        cause, evidence = told.finding.cause, told.finding.evidence
        owner = cause if cause in by_cause else ""
        if not owner and cause in _SHOWN_BY_INCIDENTS and grave:
            owner = last if last in grave else grave[0]
        elif not owner and cause == "overflow-storm" and by_scale:
            owner = "scale-too-high"
        if not owner:
            kept.append(told)
            continue
        if evidence == course.log.ending:
            evidence = f"It ended the run at step {told.finding.step}{_after_rollbacks(course)}."
        known = by_cause[owner]
        by_cause[owner] = replace(
            known, finding=replace(known.finding, evidence=f"{known.finding.evidence} {evidence}")
        )
    return [*kept, *by_cause.values()]


def _after_rollbacks(course: Course) -> str:
    num = len(course.log.interventions)
    return f", after {num} rollback{'s' if num > 1 else ''}" if num else ""


def _no_longer_fatal(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.severity == "fatal" else finding
