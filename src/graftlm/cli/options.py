"""Flags that several verbs share, so that one flag means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
OutNeeded = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Text, JSONL or Parquet file; may be repeated.")]
