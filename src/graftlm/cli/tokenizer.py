"""Verbs of the tokenizer: graft, check, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import AsJson, OutNeeded, Texts
from graftlm.cli.show import show


def tokenizer_graft(
    base: Annotated[str, typer.Option(help="Tokenizer folder, tokenizer.model or hub id.")],
    out: OutNeeded,
    mode: Annotated[str, typer.Option(help="continued, merge or card.")] = "continued",
    text: Texts = None,
    pieces: Annotated[str | None, typer.Option(help="Inventory to merge (SentencePiece or tokenizer.json).")] = None,
    script: Annotated[list[str] | None, typer.Option(help="Unicode script of the new language.")] = None,
    num_pieces: Annotated[int, typer.Option(help="Pieces to add, at most.")] = 8000,
    as_json: AsJson = False,
) -> None:
    """Graft new pieces onto a base tokenizer and prove that old text encodes as before.

    Example: graftlm tokenizer graft --base base/ --text zh.txt --script Han --num-pieces 8000 --out grafted/
    """
    from graftlm.recipe import Tokenizer
    from graftlm.recipe_file import section_from_flags
    from graftlm.text.tokenizer import graft_tokenizer

    flags = {"mode": mode, "text": text or (), "pieces": pieces, "script": script or ("Han",), "num_pieces": num_pieces}
    show(graft_tokenizer(base, section_from_flags(Tokenizer, flags), out), as_json)


def tokenizer_check(old: str, new: str, text: Texts = None, as_json: AsJson = False) -> None:
    """Prove, or refute, that NEW encodes old text as OLD does, and measure the drift.

    Example: graftlm tokenizer check base/ grafted/ --text zh.jsonl --text en.jsonl
    """
    from graftlm.text.tokenizer import check_tokenizers

    show(check_tokenizers(old, new, text or []), as_json)


def tokenizer_report_verb(
    tokenizers: list[str],
    text: Texts = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (SVG or PNG).")] = None,
    as_json: AsJson = False,
) -> None:
    """Characters and bytes per token of each tokenizer on each text.

    Example: graftlm tokenizer report base/ grafted/ --text zh.jsonl --plot compression.svg
    """
    from graftlm.text.tokenizer import tokenizer_report

    show(tokenizer_report(tokenizers, text or [], plot), as_json)
