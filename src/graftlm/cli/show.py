"""How a verb's result reaches standard output: one JSON object, or `key  value` lines."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any


def show(value: Any, as_json: bool) -> None:
    """Print a result: JSON, or `key  value` lines."""
    found: Any = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, cell in found.items():
        text = json.dumps(cell, ensure_ascii=False, indent=1) if isinstance(cell, dict | list) else str(cell)
        table.add_row(f"[bold]{key}[/]", text.replace("[", r"\["))
    Console().print(table)
