"""Plots of comparisons: differences with their intervals against nought, and a curve with a fitted trend.

Owns these two drawings. Does not know what is compared. Scales, colours and text are those of `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftlm.release.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Reading,
    Scale,
    figure,
    legend_of,
    mark_text,
    short,
    ticks_of,
    y_grid,
)

_ROW = 42


@dataclass(frozen=True, slots=True)
class Trend:
    """Readings over a quantity, and the points (x, y) of the curve fitted to them, if one was."""

    name: str
    colour: str
    xs: Sequence[float]
    readings: Sequence[Reading]
    fitted: Sequence[tuple[float, float]] = ()


def differences_plot(title: str, rows: Sequence[tuple[str, Reading]], *, lower_is_better: bool) -> str:
    """One line a model: its difference with the interval, green where all of it is better, red where all is worse."""
    if not rows:
        return ""
    reach = max(max(abs(reading.low), abs(reading.high)) for _, reading in rows) * 1.1 or 1.0
    height = _ROW * len(rows) + 34
    x = Scale(-reach, reach, 24, WIDTH - 24)
    ticks = [tick for tick in ticks_of(-reach, reach) if abs(tick) < reach]
    marks = [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 24}"/>'
        + mark_text(x(tick), height - 8, _signed(tick), "middle")
        for tick in ticks
    ]
    marks.append(f'<line class="stroke thin train" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 24}"/>')
    told = []
    for place, (name, reading) in enumerate(rows):
        colour, verdict = _verdict(reading, lower_is_better)
        y = 30 + _ROW * place
        marks.append(mark_text(24, y - 12, f"{name}: {_signed(reading.value)}", "start", "value"))
        marks.append(
            f'<line class="stroke {colour}" x1="{x(reading.low):.1f}" x2="{x(reading.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="fill {colour}" cx="{x(reading.value):.1f}" cy="{y}" r="4.5"/>'
        )
        told.append(f"{name} {_signed(reading.value)}, {verdict}")
    return figure(title, "; ".join(told), marks, "", height)


def is_sure(reading: Reading) -> bool:
    """Whether an interval leaves nought out."""
    return reading.low > 0 or reading.high < 0


def _verdict(reading: Reading, lower_is_better: bool) -> tuple[str, str]:
    if not is_sure(reading):
        return "train", "not told apart"
    return ("ok", "better") if (reading.value < 0) == lower_is_better else ("bad", "worse")


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else ("+" if value > 0 else "\u2212") + short(abs(value))


def trend_plot(title: str, trends: Sequence[Trend], x_label: str) -> str:
    """Readings over a quantity on a logarithmic scale, dashed the curve fitted to them."""
    xs = [x for trend in trends for x in trend.xs] + [x for trend in trends for x, _ in trend.fitted]
    ys = [bound for trend in trends for reading in trend.readings for bound in (reading.low, reading.high)]
    ys += [y for trend in trends for _, y in trend.fitted]
    if not xs or min(xs) <= 0 or min(xs) == max(xs):
        return ""
    room = (max(ys) - min(ys)) * 0.12 or 0.1
    x = Scale(min(xs) / 1.15, max(xs) * 1.15, LEFT, WIDTH - RIGHT, is_log=True)
    y = Scale(max(0.0, min(ys) - room), max(ys) + 2 * room, HEIGHT - BOTTOM, TOP)
    marks = y_grid(y, ticks_of(y.low, y.high))
    marks += [mark_text(x(at), HEIGHT - 18, _count(at), "middle") for at in _apart(sorted(set(_measured(trends))), x)]
    marks.append(mark_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, f"{x_label}, logarithmic scale", "middle"))
    for trend in trends:
        if trend.fitted:
            path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in trend.fitted)
            marks.append(f'<polyline class="stroke thin {trend.colour}" points="{path}"/>')
        for at, reading in zip(trend.xs, trend.readings, strict=True):
            marks.append(
                f'<line class="stroke {trend.colour}" x1="{x(at):.1f}" x2="{x(at):.1f}" '
                f'y1="{y(reading.low):.1f}" y2="{y(reading.high):.1f}"/>'
                f'<circle class="fill {trend.colour}" cx="{x(at):.1f}" cy="{y(reading.value):.1f}" r="4"/>'
            )
            value = mark_text(x(at), y(reading.high) - 7, short(reading.value), "middle", f"value {trend.colour}")
            marks.append(value)
    told = "; ".join(
        f"{trend.name}: " + ", ".join(f"{short(r.value)} at {_count(x)}" for x, r in zip(trend.xs, trend.readings,
                                                                                        strict=True))
        for trend in trends
    )  # fmt: skip
    return figure(title, told, marks, legend_of([(trend.name, trend.colour, True) for trend in trends]))


def _measured(trends: Sequence[Trend]) -> list[float]:
    return [x for trend in trends for x in trend.xs]


def _apart(values: Sequence[float], x: Scale) -> list[float]:
    """Values whose names do not run into each other on the axis."""
    kept: list[float] = []
    for value in values:
        if not kept or x(value) - x(kept[-1]) > 44:
            kept.append(value)
    return kept


def _count(value: float) -> str:
    """A quantity as short as an axis needs: 36,500, 1.2 M, 7 B."""
    for size, name in ((1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:,.0f}" if value == math.floor(value) else f"{value:.3g}"
