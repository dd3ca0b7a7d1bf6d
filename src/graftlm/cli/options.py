"""Flags that several verbs share, so that one flag means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
RunOut = Annotated[Path | None, typer.Option("--out", help="The run's folder; runs/NAME if not given.")]
OutNeeded = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Text, JSONL or Parquet file; may be repeated.")]


def check_new_folder(out: Path) -> None:
    """A verb that writes a model must not write into anything that is there. Raises UserError."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already holds something.", "Give --out a new or empty folder.")
