"""The parts an HTML page is made of: escaping, tables, chapters, the look.

Owns how things look and that nothing in a page can act: all text is escaped, there is no script, nothing is fetched.
Does not know what a run is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

STYLE = Path(__file__).with_name("page.css")
# Even if a text slipped through unescaped, a browser must not run or fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def safe(value: Any) -> str:
    """Text that is shown and cannot act; characters that control a display become visible."""
    return html.escape(_CONTROL.sub("\ufffd", number(value) if isinstance(value, float | int) else str(value)))


def number(value: float) -> str:
    """A number for reading: thousands apart, about four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(change: float) -> str:
    """A signed change, as +1.2 %."""
    return f"{change:+.1f} %".replace("-", "\u2212")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls by itself where it is too wide; numbers stand right, decimals below decimals."""
    columns = [_column([row[place] for row in rows]) for place in range(len(head))]
    titles = "".join(f"<th{kind}>{safe(title)}</th>" for title, (kind, _) in zip(head, columns, strict=True))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind or _long(cells[place])}>{safe(cells[place])}</td>" for kind, cells in columns)
        + "</tr>"
        for place in range(len(rows))
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def facts(values: Sequence[tuple[str, Any]]) -> str:
    """Names and values, one a line."""
    rows = "".join(f'<tr><th scope="row">{safe(name)}</th><td>{safe(value)}</td></tr>' for name, value in values)
    return f'<div class="wide" tabindex="0"><table>{rows}</table></div>'


def chapter(mark: str, title: str, *parts: str) -> str:
    """A chapter the page's links lead to; without parts it says that nothing was measured."""
    told = "".join(parts) or "<p>Not measured.</p>"
    return f'<section id="{mark}"><h2>{safe(title)}</h2>{told}</section>'


def card(name: str, value: str, told: str) -> str:
    """One figure of the summary."""
    return f'<div class="card"><strong>{safe(name)}</strong><b>{safe(value)}</b><span>{safe(told)}</span></div>'


def folded(title: str, inside: str) -> str:
    """Something to open."""
    return f"<details><summary>{safe(title)}</summary>{inside}</details>"


def page(title: str, body: str) -> str:
    """The whole document."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{safe(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def _long(cell: Any) -> str:
    """Only long text may break into lines: a broken figure is hard to read."""
    return ' class="long"' if len(str(cell)) > 40 else ""


def _column(cells: Sequence[Any]) -> tuple[str, list[Any]]:
    """A column's class and its cells as shown."""
    if not cells or not all(isinstance(cell, int | float) for cell in cells):
        return "", list(cells)
    sizes = [abs(cell) for cell in cells if cell]
    if any(isinstance(cell, float) for cell in cells) and sizes and min(sizes) >= 0.01 and max(sizes) < 1e4:
        decimals = 4 if max(sizes) < 0.1 else 3 if max(sizes) < 100 else 1
        return ' class="n"', [f"{cell:,.{decimals}f}" for cell in cells]
    return ' class="n"', list(cells)
