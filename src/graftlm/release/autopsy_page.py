"""The autopsy as a page: what happened to a run, the evidence, and what to type to have it otherwise.

Owns the order of telling and which curves are drawn. Does not judge: it shows an `Autopsy` as `health/` made it. The
page is one file, fetches nothing and cannot act, as the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from graftlm.health.autopsy import Autopsy
from graftlm.health.course import Course, Diagnosis
from graftlm.health.curves import WINDOW, smoothed
from graftlm.health.finding import Finding
from graftlm.health.rates import rate_cuts_of
from graftlm.health.records import LogRecord
from graftlm.release.page import card, chapter, facts, page, safe, table
from graftlm.release.plots import Events, Line, line_plot
from graftlm.run import disk_errors, write_json

HEALTH, PAGE = "health.json", "autopsy.html"
MOST_TOLD = 60  # lines of a timeline
MOST_ROWS = 8  # of a step's rows by name
_ROLES = {
    "adapter": ("adapter", "plain"), "body": ("transformer body", "train"), "old_rows": ("rows of old pieces", "old"),
    "new_rows": ("rows of new pieces", "new"),
}  # fmt: skip
_TITLES = {
    "forward-overflow": "The forward pass leaves the range of 16 bits",
    "forward-not-finite": "The forward pass is not finite in any precision",
    "backward-overflow": "The backward pass is not finite at any loss scale",
    "weights-not-finite": "Weights hold numbers that are not finite",
    "empty-labels": "Steps without an answer to learn from",
    "scale-too-high": "Overflows that only the loss scale caused",
    "not-reproduced": "An overflow that did not come again",
    "loss-rose": "The loss rose far above its best",
    "loss-not-finite": "The loss was not a number",
    "overflow-storm": "A storm of overflows",
    "ratchet": "A loss scale that only falls",
    "scale-at-floor": "The loss scale reached its floor",
    "over-fitted": "Learned by heart: held-out loss rose again",
    "no-forward-headroom": "No room above the activations in fp16",
    "first-loss-high": "The first loss is worse than knowing nothing",
    "out-of-memory": "Out of memory",
}


def write_autopsy(found: Autopsy, folder: Path) -> Path:
    """Write health.json and autopsy.html into `folder`, each whole or absent; returns the page. Raises DiskError."""
    path = folder / PAGE
    write_json(folder / HEALTH, found.to_json())
    with disk_errors(folder):
        unfinished = path.with_name(f".{PAGE}")
        unfinished.write_text(autopsy_page(found), encoding="utf-8")
        unfinished.replace(path)
    return path


def autopsy_page(found: Autopsy) -> str:
    """The page of an autopsy."""
    chapters = [
        ("findings", "What was found", _findings(found)),
        ("timeline", "What happened, in order", _timelines(found)),
        *((f"stage-{n}", f"Curves: {course.name}", _curves(course)) for n, course in enumerate(found.courses)),
    ]
    links = "".join(f'<a href="#{mark}">{safe(title)}</a>' for mark, title, _ in chapters)
    body = (
        f'<header><p class="soft">GraftLM, autopsy</p><h1>{safe(found.name)}</h1>{_summary(found)}</header>'
        f'<nav aria-label="Chapters">{links}</nav><main>'
        + "".join(chapter(mark, title, told) for mark, title, told in chapters)
        + "</main><footer>Written by graftlm autopsy, from what the run had logged by then; the same in figures stands "
        f"in {HEALTH}.</footer>"
    )
    return page(f"{found.name}: GraftLM autopsy", body)


def state_in_words(course: Course) -> str:
    """How far a stage or log went, and how it ended."""
    steps = f"{course.log.last_step:,} step{'s' if course.log.last_step != 1 else ''}"
    if course.state == "stopped":
        return "refused before its first step" if course.is_refused else f"stopped at step {course.log.last_step:,}"
    told = {True: "it is running", False: "interrupted or killed, and goes on with the same command"}
    now = "running, interrupted or killed" if course.is_running is None else told[course.is_running]
    return {"finished": f"finished, {steps}", "log": f"{steps} logged"}.get(
        course.state, f"not finished, {steps} so far: {now}"
    )


def title_of(finding: Finding) -> str:
    """A finding's cause as a heading."""
    return _TITLES.get(finding.cause, finding.cause.replace("-", " ").capitalize())


def _summary(found: Autopsy) -> str:
    is_well = found.verdict in ("healthy", "recovered")
    told = f'<p><b class="{"ok" if is_well else "bad"}">{safe(found.verdict.capitalize())}.</b> {safe(found.told)}</p>'
    cards = [card(course.name, course.verdict, state_in_words(course)) for course in found.courses]
    skipped = sum(len(_skipped(course)) for course in found.courses)
    rollbacks = sum(len(course.log.interventions) for course in found.courses)
    cards.append(card("Steps skipped", f"{skipped:,}", "gradients not finite; none of them touched a weight"))
    cards.append(card("Rollbacks", f"{rollbacks:,}", "to the last good state, with a lower learning rate"))
    return f'{told}<div class="cards">{"".join(cards)}</div>'


def _findings(found: Autopsy) -> str:
    if not found.diagnoses:
        return "<p>Nothing: no alarm in curves, replays or pre-flight.</p>"
    several = len(found.courses) > 1
    told = "".join(_finding(number, told, several) for number, told in enumerate(found.diagnoses, start=1))
    if found.changes:
        command = f"graftlm run RECIPE --out ANOTHER_FOLDER {' '.join(found.changes)}"
        told += f'<h3>To try it</h3><pre class="wraps" tabindex="0">{safe(command)}</pre>'
    return told


def _finding(number: int, told: Diagnosis, several: bool) -> str:
    finding = told.finding
    kind = "ok" if finding.severity == "note" else "bad"
    values: list[tuple[str, Any]] = [("cause", finding.cause), ("where", finding.where), ("when", when(told))]
    if told.row_ids:
        values.append(("rows of the step", rows_told(told)))
    if several:
        values.insert(0, ("stage", told.stage))
    lines = "\n".join(told.lines)
    change = f'<p><b>Change.</b></p><pre class="wraps" tabindex="0">{safe(lines)}</pre>' if lines else ""
    return (
        f'<h3>{number}. {safe(title_of(finding))} <span class="{kind}">({safe(finding.severity)})</span></h3>'
        f"{facts(values)}<p>{safe(finding.evidence)}</p><p><b>Cure.</b> {safe(finding.cure)}</p>{change}"
    )


def rows_told(told: Diagnosis) -> str:
    """The first rows of the step a finding is told of, and the file that holds all."""
    shown = ", ".join(map(str, told.row_ids[:MOST_ROWS])) + (", …" if len(told.row_ids) > MOST_ROWS else "")
    return f"{shown}; kept in {told.stage}/{told.batch_file}" if told.batch_file else shown


def when(told: Diagnosis) -> str:
    """The steps a finding was seen at."""
    if told.finding.step is None:
        return "before the first step"
    last = told.last_step if told.last_step is not None else told.finding.step
    span = f"step {told.finding.step:,}" + (f" to {last:,}" if last > told.finding.step else "")
    return f"{span}, {told.count} times" if told.count > 1 else span


def _timelines(found: Autopsy) -> str:
    return "".join(
        (f"<h3>{safe(course.name)}</h3>" if len(found.courses) > 1 else "")
        + table(("step", "what"), list(_happenings(course))[:MOST_TOLD])
        for course in found.courses
    )


def _happenings(course: Course) -> Iterator[tuple[str, str]]:
    """(steps, what) of a stage, in the order in which it happened."""
    log = course.log
    for finding in course.preflight:
        yield "before", f"Pre-flight, {finding.severity}: {finding.evidence}"
    if course.look and not course.preflight:
        yield "before", "Pre-flight: green."
    readings = [(r.step, r.loss) for r in log.records if r.loss is not None]
    held = [reading for reading in log.heldout if math.isfinite(reading[1])]
    best = min(held, key=lambda reading: reading[1], default=None)
    is_first = best is not None and (not readings or best[0] < readings[0][0])
    if best and is_first:
        yield f"{best[0]:,}", f"Best held-out loss: {_nats(best[1])}."
    if readings:
        yield f"{readings[0][0]:,}", f"First loss logged: {_nats(readings[0][1])}."
    # What was given up lies at later steps than what came after it: the best stands before the first of those.
    places = [line.get("at_step", line["step"]) for line in log.events]
    cut = next((place for place, step in enumerate(places) if best and step > best[0]), len(places))
    yield from _events_told(log.events[:cut])
    if best and not is_first:
        yield f"{best[0]:,}", f"Best held-out loss: {_nats(best[1])}."
    yield from _events_told(log.events[cut:])
    if readings:
        yield f"{readings[-1][0]:,}", f"Last loss logged: {_nats(readings[-1][1])}."
    if course.good_checkpoint and course.verdict not in ("healthy", "recovered"):
        yield "", f"The last good state is kept: {course.name}/{course.good_checkpoint}."
    yield f"{log.last_step:,}", (log.ending or state_in_words(course).capitalize()).rstrip(".") + "."


def _nats(loss: float) -> str:
    return f"{loss:.3f} nats a token" if math.isfinite(loss) else "not a finite number"


def _events_told(events: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for kind, lines in groupby(events, key=lambda line: (line["event"], line.get("cause"))):
        yield from _event_told(kind[0], list(lines))


def _event_told(event: str, lines: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    if event == "note":
        yield from ((f"{line['step']:,}", f"{str(line['text']).capitalize().rstrip('.')}.") for line in lines)
        return
    if event == "intervention":
        yield from ((f"{line['at_step']:,}", _rollback_told(line)) for line in lines)
        return
    steps = [line["step"] for line in lines]
    span = f"{min(steps):,}" + (f" to {max(steps):,}" if max(steps) > min(steps) else "")
    where = " or ".join(dict.fromkeys(str(line["module"]) for line in lines if line.get("module")))
    times = f"{len(lines)} incidents" if len(lines) > 1 else "Incident"
    yield span, f"{times}: {lines[0]['cause']}{f', in {where}' if where else ''}."


def _rollback_told(line: Mapping[str, Any]) -> str:
    """Why, in the first words it was written down with, and what was done."""
    why = str(line["text"]).split(". ")[0].partition(": ")[2].rstrip(".")
    cut = rate_cuts_of(line).told()
    return f"Rolled back to step {line['step']:,}: {why}. {cut[0].upper()}{cut[1:]}."


def _curves(course: Course) -> str:
    log, events = course.log, _marked(course)
    losses = [
        Line("training, each step", *_points((r.step, r.loss) for r in log.records), "train pale"),
        Line(f"median of {WINDOW}", *_points(smoothed(log)), "plain"),
    ]
    losses += [
        Line(f"attempt {number}, gone back from", *_points((r.step, r.loss) for r in attempt), "new pale")
        for number, attempt in enumerate(log.abandoned, start=1)
    ]
    held = [
        Line(f"held-out, {language}", *_points(readings), language if language in ("new", "old") else "plain", True)
        for language, readings in (log.readings or {"rows": log.heldout}).items()
    ]
    scales = [(r.step, r.loss_scale) for r in log.records if r.loss_scale is not None] or log.scales
    is_scaled = len({scale for _, scale in scales}) > 1
    norms = _by_role(log.records, lambda r: r.by_role.get("grad_norms", {}))
    plots = [
        line_plot("Loss, nats a token", losses, events=events),
        line_plot("Held-out loss, nats a token", held, events=events),
        line_plot("Loss scale", [Line("loss scale", *_points(scales))], events=events) if is_scaled else "",
        line_plot("Gradient norm before clipping", norms or _whole_norm(log.records), events=events),
        line_plot("Update against weights, rms by rms", _by_role(log.records, _moved), events=events),
        line_plot(
            "Share of gradients that are exactly zero",
            _by_role(log.records, lambda r: {} if r.skipped else r.by_role.get("zero_gradient_share", {})),
            may_be_log=False,
            events=events,
        ),
        line_plot("Learning rate", [Line("learning rate", *_points((r.step, r.lr) for r in log.records))],
                  may_be_log=False, events=events),
    ]  # fmt: skip
    return f'<div class="plots">{"".join(plots)}</div>' if any(plots) else "<p>No step was logged.</p>"


def _marked(course: Course) -> list[Events]:
    grave = {told.finding.cause for told in course.diagnoses if told.finding.severity != "note"}
    return [
        Events("skipped steps", _skipped(course), "bad", is_small=True),
        Events("incidents", [line["step"] for line in course.log.incidents if line["cause"] in grave], "bad"),
        Events("rollbacks", [line.get("at_step", line["step"]) for line in course.log.interventions], "ok"),
    ]


def _skipped(course: Course) -> list[int]:
    """Steps skipped, of abandoned attempts too; overflows of a log that tells no more."""
    records = [*course.log.records, *(r for attempt in course.log.abandoned for r in attempt)]
    return [r.step for r in records if r.skipped] or sorted({step for step, _ in course.log.scales})


def _points(pairs: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    known = [(x, y) for x, y in pairs if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _by_role(records: list[LogRecord], read: Callable[[LogRecord], Mapping[str, float]]) -> list[Line]:
    """A line for every role that has anything but zeros to show."""
    lines = []
    for role, (name, colour) in _ROLES.items():
        xs, ys = _points((r.step, read(r).get(role)) for r in records)
        if any(ys):
            lines.append(Line(name, xs, ys, colour))
    return lines


def _moved(record: LogRecord) -> Mapping[str, float]:
    """How far a step moved each role, as a share of its weights' size; nothing of a skipped step."""
    if record.skipped:
        return {}
    sizes = record.by_role.get("weight_rms", {})
    return {role: rms / sizes[role] for role, rms in record.by_role.get("update_rms", {}).items() if sizes.get(role)}


def _whole_norm(records: list[LogRecord]) -> list[Line]:
    return [Line("gradient norm", *_points((r.step, r.grad_norm) for r in records))]
