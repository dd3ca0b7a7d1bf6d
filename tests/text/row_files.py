"""Files of rows that tests read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graftlm.recipe import Source
from graftlm.text.readers import Reading, read_source


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write JSON lines; a string that is no row of its own is written as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def alpaca(question: Any = "a question", given: Any = "", answer: Any = "an answer") -> dict[str, Any]:
    """One instruction row."""
    return {"instruction": question, "input": given, "output": answer}


def read_rows(path: Path, rows: Iterable[Any], **knobs: Any) -> Reading:
    """Write rows to `path` and read them as a source."""
    return read_source(Source(path=write_rows(path, rows), **knobs))


def said(reading: Reading) -> list[list[tuple[str, str]]]:
    """Roles and contents of every dialogue."""
    return [[(m.role, m.content) for m in conversation.messages] for conversation in reading.conversations]
