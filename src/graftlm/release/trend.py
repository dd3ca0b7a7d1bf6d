"""What a sweep adds to a comparison: a table of its runs, and a curve with a fitted power law.

Owns the fit and how it is told, with what it cannot know. Does not run anything.

Shapes: N runs along a curve, R resamples, D dialogues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.release.compare import Comparison
from graftlm.release.compare_page import COLOURS, Chapter
from graftlm.release.compare_plots import Trend, trend_plot
from graftlm.release.intervals import interval_of, resampled_sums
from graftlm.release.page import duration, safe, table
from graftlm.release.plots import Reading
from graftlm.release.record import read_run

OVER = {
    "at": "", "parameters": "parameters", "rows": "dialogues learned from", "tokens": "tokens learned",
}  # fmt: skip
_CURVE_POINTS = 40
_BEYOND = 3.0


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run of a sweep: where it stands on the axes, and what was counted of it."""

    name: str
    at: Mapping[str, Any]
    parameters: int
    rows: int
    tokens: int
    seconds: float
    exact: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """`factor · x ** -exponent`, fitted to N points; `residual` is the largest deviation of a point, as a share of it.

    `interval` is the exponent's, 95 %, over which dialogues were held out: chance in training is not in it.
    """

    factor: float
    exponent: float
    interval: tuple[float, float]
    residual: float

    def __call__(self, x: float) -> float:
        return self.factor * x**-self.exponent


def facts_of(name: str, at: Mapping[str, Any], folder: Path, found: Comparison) -> RunFacts:
    """What a finished run recorded of itself. Raises UserError for a record that is damaged."""
    run = read_run(folder)
    data = run.data or {}
    asked = run.questions
    exact = (asked["num_exact_learnable"], asked["num_learnable"]) if asked else None
    return RunFacts(
        name, at, found.facts[name]["parameters"], data.get("rows_kept", 0), data.get("labels", 0),
        sum(done["seconds"] for done in run.done.values()), exact,
    )  # fmt: skip


def fit_power_law(xs_N: np.ndarray, ys_N: np.ndarray, resampled_RN: np.ndarray) -> PowerLaw:
    """A straight line through the logarithms, least squares; also through every resample of the readings."""
    log_N = np.log(xs_N)
    centred_N = log_N - log_N.mean()
    slope = float(np.log(ys_N) @ centred_N / (centred_N @ centred_N))
    factor = math.exp(float(np.log(ys_N).mean() - slope * log_N.mean()))
    slopes_R = np.log(resampled_RN) @ centred_N / (centred_N @ centred_N)
    residual = float(np.max(np.abs(ys_N / (factor * xs_N**slope) - 1)))
    low, high = interval_of(-slopes_R)
    return PowerLaw(factor, -slope, (low, high), residual)


def trend_chapters(
    found: Comparison, facts: Sequence[RunFacts], over: str
) -> tuple[list[Chapter], list[dict[str, Any]]]:
    """Chapters for the top of the page, and the fitted curves as values. Without numbers to draw over, no curve."""
    curves: list[dict[str, Any]] = []
    plots: list[str] = []
    told: list[str] = []
    axis = next(iter(facts[0].at))
    label = OVER[over] or axis.split(".")[-1].replace("_", " ")
    for file in (file for file in found.files if "task" not in found.results[found.names[0]][file]):
        trends = []
        for place, (others, line) in enumerate(_lines(facts, over).items()):
            trend, law = _trend(found, file, line, over, others, COLOURS[place % len(COLOURS)])
            trends.append(trend)
            if law is not None:
                curves.append(_values(law, file, others, trend, over))
                told.append(f"<li>{_sentence(law, Path(file).stem, others, trend, label)}</li>")
        if trends:
            plots.append(trend_plot(f"Bits per byte, {Path(file).stem}", trends, label))
    chapters = [("runs", "The runs", _table(facts))]
    if any(plots):
        note = (
            '<p class="soft">Fitted: a power law, a straight line on logarithmic scales, drawn dashed and a little '
            "beyond what was measured. Bars and intervals are over which dialogues were held out; each run was trained "
            "once, so the chance in training is in none of them. Two points lie on a line whatever they are.</p>"
        )
        curve = f'<ul>{"".join(told)}</ul><div class="plots">{"".join(plots)}</div>{note}'
        chapters.insert(0, ("trend", "The trend", curve))
    return chapters, curves


def _lines(facts: Sequence[RunFacts], over: str) -> dict[str, list[RunFacts]]:
    """Runs that lie on one curve: those that differ on the first axis only; two different numbers at least."""
    lines: dict[str, list[RunFacts]] = {}
    for one in facts:
        x = _x(one, over)
        if x is not None and x > 0:
            others = ", ".join(str(value) for value in list(one.at.values())[1:])
            lines.setdefault(others, []).append(one)
    return {
        others: sorted(line, key=lambda one: _x(one, over) or 0)
        for others, line in lines.items()
        if len({_x(one, over) for one in line}) > 1
    }


def _x(one: RunFacts, over: str) -> float | None:
    value = next(iter(one.at.values())) if over == "at" else getattr(one, over)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _trend(
    found: Comparison, file: str, line: Sequence[RunFacts], over: str, others: str, colour: str
) -> tuple[Trend, PowerLaw | None]:
    """Readings of the dialogues that every run on the line could be judged by, and the law fitted to them."""
    scores = [found.scores[one.name][file] for one in line]
    whole_D = np.logical_and.reduce([one.is_whole_D for one in scores])
    xs = [_x(one, over) or 0.0 for one in line]
    if not whole_D.any():
        return Trend(others, colour, (), ()), None
    columns = [c for one in scores for c in (one.nats_D[whole_D] / math.log(2), one.num_bytes_D[whole_D])]
    values_DC = np.stack(columns, axis=1).astype(float)
    sums_C, sums_RC = values_DC.sum(0), resampled_sums(values_DC)
    ys_N = sums_C[0::2] / np.maximum(sums_C[1::2], 1)
    resampled_RN = sums_RC[:, 0::2] / np.maximum(sums_RC[:, 1::2], 1)
    readings = [Reading(float(y), *interval_of(resampled_RN[:, n])) for n, y in enumerate(ys_N)]
    if (ys_N <= 0).any() or (resampled_RN <= 0).any():
        return Trend(others, colour, xs, readings), None
    law = fit_power_law(np.array(xs), ys_N, resampled_RN)
    drawn = np.geomspace(min(xs), max(xs) * _BEYOND, _CURVE_POINTS)
    return Trend(others or "measured", colour, xs, readings, [(float(x), law(float(x))) for x in drawn]), law


def _values(law: PowerLaw, file: str, others: str, trend: Trend, over: str) -> dict[str, Any]:
    return {
        "file": Path(file).name, "others": others, "over": over, "factor": law.factor, "exponent": law.exponent,
        "exponent_interval": law.interval, "largest_deviation": law.residual,
        "points": [[x, reading.value] for x, reading in zip(trend.xs, trend.readings, strict=True)],
    }  # fmt: skip


def _sentence(law: PowerLaw, file: str, others: str, trend: Trend, label: str) -> str:
    low, high = law.interval
    change = 100 * (2**-law.exponent - 1)
    where = safe(file) + (f", {safe(others)}" if others else "")
    is_seen = low > 0 or high < 0
    kind = "falls" if law.exponent > 0 else "rises"
    told = (
        f"<b>{where}</b>: bits per byte \u2248 {law.factor:.3g} \u00b7 x<sup>{_power(-law.exponent)}</sup> "
        f"(95 % interval of the exponent {_power(-high)} to {_power(-low)})"
    )
    if not is_seen:
        return f"{told}. No trend is told apart from none."
    largest = max(trend.xs)
    fit = "" if len(trend.xs) < 3 else f" The points lie within {100 * law.residual:.1f} % of it."
    return (
        f"{told}: with twice as many {safe(label)} it {kind} by {abs(change):.1f} %.{fit} "
        f"At {2 * largest:,.0f}, beyond what was measured, the law says {law(2 * largest):.3g}."
    )


def _power(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")


def _table(facts: Sequence[RunFacts]) -> str:
    axes = list(facts[0].at)
    rows = [
        (
            one.name, *(str(one.at[axis]) for axis in axes), one.parameters, one.rows, one.tokens,
            f"{one.exact[0]:,} of {one.exact[1]:,}" if one.exact else "not asked", duration(one.seconds),
        )
        for one in facts
    ]  # fmt: skip
    head = ("run", *axes, "parameters", "dialogues", "tokens learned", "answered exactly", "time of its steps")
    return table(head, rows) + '<p class="soft">Steps that runs share are counted in each of them.</p>'
