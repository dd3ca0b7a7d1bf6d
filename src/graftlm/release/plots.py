"""Plots as inline SVG. Owns their look; does not know what they show."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(series: Series, label: str) -> str:
    """Lines over steps; few points are marked."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, label=name, marker="o" if len(xs) < 20 else None, markersize=3, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="small")
    return _svg(figure)


def bars(names: Sequence[str], groups: Mapping[str, Sequence[float]], label: str) -> str:
    """Grouped bars with their values written above."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(groups), 1)
    for number, (group, values) in enumerate(groups.items()):
        places = [place + number * width for place in range(len(names))]
        drawn = axes.bar(places, values, width, label=group)
        axes.bar_label(drawn, fmt="%.2f", fontsize="small")
    axes.set_xticks([place + width * (len(groups) - 1) / 2 for place in range(len(names))], names)
    axes.set_ylabel(label)
    axes.legend(fontsize="small")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg")
    text = written.getvalue()
    return text[text.index("<svg") :]
