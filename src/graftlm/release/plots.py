"""Plots as inline SVG, drawn with the page's own colours so that they read in the light and in the dark.

Owns scales, ticks and marks. Does not know what is plotted. A plot carries its title and its numbers in words for
those who cannot see it, needs no script, and its text stays text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
# More steps than this are drawn as means of neighbours, with a band from the least to the greatest.
MAX_POINTS = 300
_LOG_FROM = 30.0
# The look of the page, for a file that has no page around it.
_PICTURE_STYLE = (
    "svg{background:#fdfdfc}text{fill:#5a6576;font:12px system-ui,sans-serif}.title{fill:#1c2330;font-weight:600}"
    ".grid{stroke:#dde1e7}.stroke{fill:none;stroke:currentColor;stroke-width:2}.fill{fill:currentColor}"
    ".band{fill:currentColor;opacity:.18}.new{color:#b4471d}.old{color:#1b6cae}.train{color:#6b7686}.plain{color:#54408f}"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A named series. `colour` is a CSS class of the page: new, old, train or plain; `marks` draws its points."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = "plain"
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Events:
    """Steps at which something happened, marked across a plot. `colour` is bad, ok or plain; `is_small` marks the foot
    of the plot only, for what may happen at many steps."""

    name: str
    steps: Sequence[float]
    colour: str = "bad"
    is_small: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """One figure with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers to places: linear, or by the logarithm where all are positive and far apart."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.is_log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A plot before it is put on a page: its marks, what they say in words, and (name, colour, has marks) by line."""

    title: str
    told: str
    marks: Sequence[str]
    legend: Sequence[tuple[str, str, bool]]


def line_plot(
    title: str, lines: Sequence[Line], x_label: str = "step", *, may_be_log: bool = True, events: Sequence[Events] = ()
) -> str:
    """`draw_lines` as a figure of a page; empty where nothing is to be drawn."""
    drawing = draw_lines(title, lines, x_label, may_be_log=may_be_log, events=events)
    return figure(drawing.title, drawing.told, drawing.marks, legend_of(drawing.legend)) if drawing else ""


def draw_lines(
    title: str, lines: Sequence[Line], x_label: str = "step", *, may_be_log: bool = True, events: Sequence[Events] = ()
) -> Drawing | None:
    """Lines over steps, each named in a legend; a value that is not finite is left out.

    The scale is logarithmic where values lie far apart, unless `may_be_log` says no.
    """
    drawn = [_finite(line) for line in lines]
    drawn = [line for line in drawn if line.xs]
    if not drawn:
        return None
    ys = [y for line in drawn for y in line.ys]
    events = [marked for marked in events if marked.steps]
    xs = [*(x for line in drawn for x in line.xs), *(step for marked in events for step in marked.steps)]
    x = Scale(*_spread(xs), LEFT, WIDTH - RIGHT)
    y = _y_scale(ys, may_be_log)
    marks = [*_grid(x, y, x_label), *(part for marked in events for part in _event_marks(marked, x))]
    marks += [part for line in drawn for part in _line_marks(line, x, y)]
    told = "; ".join(
        f"{line.name}: from {short(line.ys[0])} to {short(line.ys[-1])}, least {short(min(line.ys))}, "
        f"greatest {short(max(line.ys))}"
        for line in drawn
    )
    told += "".join(f"; {marked.name} at {_steps_told(marked.steps)}" for marked in events)
    legend = [(line.name, line.colour, line.marks) for line in drawn] if len(drawn) + len(events) > 1 else []
    legend += [(marked.name, f"{marked.colour}{'' if marked.is_small else ' thin'}", False) for marked in events]
    return Drawing(title, told, marks, legend)


def picture(drawings: Sequence[Drawing]) -> str:
    """Drawings below each other as one SVG file that stands by itself, beside a text that shows it."""
    parts, top = [], 0
    for drawing in drawings:
        parts.append(f'<text class="title" x="8" y="{top + 18}">{html.escape(drawing.title)}</text>')
        marks = "".join(drawing.marks)
        parts.append(f'<svg y="{top + 24}" width="{WIDTH}" height="{HEIGHT}" overflow="visible">{marks}</svg>')
        top += HEIGHT + 32
        for place, (name, colour, _) in enumerate(drawing.legend):
            x, y = 8 + 240 * (place % 2), top + 12 + 18 * (place // 2)
            parts.append(f'<line class="stroke {colour}" x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}"/>')
            parts.append(mark_text(x + 28, y, name, "start"))
        top += 18 * math.ceil(len(drawing.legend) / 2) + 14
    label = html.escape(" ".join(f"{drawing.title}. {drawing.told}." for drawing in drawings))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" aria-label="{label}">'
        f"<style>{_PICTURE_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def readings_plot(title: str, states: Sequence[str], groups: Sequence[tuple[str, str, Sequence[Reading]]]) -> str:
    """Figures with intervals at each state; a group is its name, its colour and one reading a state.

    The scale is logarithmic where values lie far apart, as that of `draw_lines`. Below it there is room for a value
    under the lowest point, and the states' names stand below that.
    """
    spread = [bound for _, _, readings in groups for r in readings for bound in (r.low, r.high) if math.isfinite(bound)]
    if not spread:
        return ""
    is_log = min(spread) > 0 and max(spread) / min(spread) > _LOG_FROM
    low, high = (min(spread) / 1.3, max(spread) * 1.6) if is_log else (0, max(spread) * 1.12 or 1)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, is_log)
    step = (WIDTH - LEFT - RIGHT) / len(states)
    places = [LEFT + step * (number + 0.5) for number in range(len(states))]
    ticks = [tick for tick in powers_of(low, high) if low <= tick <= high] if is_log else ticks_of(0, y.high)
    marks = y_grid(y, ticks)
    height = HEIGHT + 14
    marks += [mark_text(place, height - 8, state, "middle") for place, state in zip(places, states, strict=True)]
    for number, (_, colour, readings) in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * 10
        points = [(place + shift, y(r.value), r) for place, r in zip(places, readings, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        marks.append(f'<polyline class="stroke thin {colour}" points="{path}"/>')
        for place, (px, py, reading) in enumerate(points):
            marks.append(
                f'<line class="stroke {colour}" x1="{px:.1f}" x2="{px:.1f}" '
                f'y1="{y(reading.low):.1f}" y2="{y(reading.high):.1f}"/>'
                f'<circle class="fill {colour}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>'
            )
            others = [other[place].value for _, _, other in groups]
            below = len(others) > 1 and reading.value == min(others) and reading.value != max(others)
            marks.append(mark_text(px, py + (17 if below else -9), short(reading.value), "middle", f"value {colour}"))
    told = "; ".join(
        f"{name}: " + ", ".join(f"{state} {short(r.value)}" for state, r in zip(states, readings, strict=True))
        for name, _, readings in groups
    )
    title += ", logarithmic scale" if is_log else ""
    return figure(title, told, marks, legend_of([(name, colour, True) for name, colour, _ in groups]), height)


def bars_plot(title: str, bars: Sequence[tuple[str, str, float]]) -> str:
    """Horizontal bars with their values: name, colour, value."""
    greatest = max((value for _, _, value in bars), default=0) or 1
    height = 30 * len(bars) + 8
    marks = []
    for number, (name, colour, value) in enumerate(bars):
        top = 8 + 30 * number
        width = max(1.0, (WIDTH - 250) * value / greatest)
        marks.append(mark_text(180, top + 14, name, "end"))
        marks.append(f'<rect class="fill {colour}" x="190" y="{top}" width="{width:.1f}" height="20" rx="3"/>')
        marks.append(mark_text(196 + width, top + 15, short(value), "start", "value"))
    told = "; ".join(f"{name}: {short(value)}" for name, _, value in bars)
    return figure(title, told, marks, "", height)


def figure(title: str, told: str, marks: Sequence[str], legend: str, height: float = HEIGHT) -> str:
    """A plot on a page; `told` says its numbers in words."""
    title, told = html.escape(title), html.escape(told)
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{title}. {told}">{"".join(marks)}</svg>{legend}</figure>'
    )


def legend_of(entries: Sequence[tuple[str, str, bool]]) -> str:
    """What the lines are: name, colour and whether it has marks, of each."""
    if not entries:
        return ""
    keys = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="stroke {colour}" x1="1" x2="25" y1="5" y2="5"/>'
        + (f'<circle class="fill {colour}" cx="13" cy="5" r="4"/>' if has_marks else "")
        + f"</svg>{html.escape(name)}</li>"
        for name, colour, has_marks in entries
    )
    return f'<ul class="legend">{keys}</ul>'


def _finite(line: Line) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if isinstance(y, int | float) and math.isfinite(y)]
    return Line(line.name, [x for x, _ in pairs], [y for _, y in pairs], line.colour, line.marks)


def _line_marks(line: Line, x: Scale, y: Scale) -> list[str]:
    size = math.ceil(len(line.xs) / MAX_POINTS)
    groups = [slice(start, start + size) for start in range(0, len(line.xs), size)]
    xs = [sum(line.xs[group]) / len(line.xs[group]) for group in groups]
    means = [sum(line.ys[group]) / len(line.ys[group]) for group in groups]
    marks = []
    if size > 1:
        upper = [f"{x(at):.1f},{y(max(line.ys[group])):.1f}" for at, group in zip(xs, groups, strict=True)]
        lower = [f"{x(at):.1f},{y(min(line.ys[group])):.1f}" for at, group in zip(xs, groups, strict=True)]
        marks.append(f'<polygon class="band {line.colour}" points="{" ".join(upper + lower[::-1])}"/>')
    path = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, mean in zip(xs, means, strict=True))
    marks.append(f'<polyline class="stroke {line.colour}" points="{path}"/>')
    if line.marks or len(xs) == 1:
        marks += [
            f'<circle class="fill {line.colour}" cx="{x(at):.1f}" cy="{y(mean):.1f}" r="3.5"/>'
            for at, mean in zip(xs, means, strict=True)
        ]
    return marks


def _event_marks(marked: Events, x: Scale) -> list[str]:
    """A mark for every step, one where several fall on the same place."""
    top = HEIGHT - BOTTOM - 7 if marked.is_small else TOP
    kind = "stroke" if marked.is_small else "stroke thin"
    return [
        f'<line class="{kind} {marked.colour}" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{HEIGHT - BOTTOM}"/>'
        for place in dict.fromkeys(round(x(step), 1) for step in marked.steps)
    ]


def _steps_told(steps: Sequence[float]) -> str:
    named = list(dict.fromkeys(steps))
    if len(named) > 5:
        return f"{len(named)} steps from {min(named):,.0f} to {max(named):,.0f}"
    return f"step{'s' if len(named) > 1 else ''} {', '.join(f'{step:,.0f}' for step in named)}"


def _y_scale(ys: Sequence[float], may_be_log: bool) -> Scale:
    low, high = min(ys), max(ys)
    if may_be_log and low > 0 and high / low > _LOG_FROM:
        return Scale(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), HEIGHT - BOTTOM, TOP, is_log=True
        )
    if 0 < low < high / 2:
        low = 0.0
    low, high = _spread([low, high])
    ticks = ticks_of(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step, HEIGHT - BOTTOM, TOP)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest, never equal."""
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    return low, high


def ticks_of(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(x: Scale, y: Scale, x_label: str) -> list[str]:
    y_ticks = powers_of(y.low, y.high) if y.is_log else ticks_of(y.low, y.high)
    x_ticks = [tick for tick in ticks_of(x.low, x.high) if tick == int(tick)] or [x.low]
    marks = y_grid(y, y_ticks)
    marks += [mark_text(x(tick), HEIGHT - 18, f"{tick:,.0f}", "middle") for tick in x_ticks]
    return [*marks, mark_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "middle")]


def powers_of(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, about five."""
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]


def y_grid(y: Scale, ticks: Sequence[float]) -> list[str]:
    """Lines across the plot, with their values."""
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        + mark_text(LEFT - 6, y(tick) + 4, short(tick), "end")
        for tick in ticks
    ]


def mark_text(x: float, y: float, text: str, anchor: str, colour: str = "") -> str:
    """Text within a plot."""
    return f'<text class="{colour}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def short(value: float) -> str:
    """A number as short as reading off a plot needs."""
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
