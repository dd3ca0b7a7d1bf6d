"""Verbs of the tokenizer: graft, check, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from graftlm.cli.options import AsJson, OutNeeded, Texts
from graftlm.cli.show import show

Mode = Literal["continued", "merge", "card"]


def tokenizer_graft(
    base: Annotated[str, typer.Option(help="Tokenizer folder, tokenizer.model, Llama-3's ranks or hub id.")],
    out: OutNeeded,
    mode: Annotated[Mode, typer.Option(help="continued learns from --text, the others take --pieces.")] = "continued",
    text: Texts = None,
    pieces: Annotated[
        str | None, typer.Option(help="Inventory: SentencePiece model, tokenizer.json, or a list, one piece a line.")
    ] = None,
    script: Annotated[
        list[str] | None, typer.Option(help="Unicode script of the new language; may be repeated. Han if not given.")
    ] = None,
    num_pieces: Annotated[
        int | None, typer.Option(help="Pieces to add, at most; 8,000 learned or all of an inventory if not given.")
    ] = None,
    max_piece_chars: Annotated[
        str, typer.Option(help="Longest piece in characters, none, or auto: 4 for learned Chinese.")
    ] = "auto",
    common_characters: Annotated[
        str, typer.Option(help="Characters that always get a piece: gb2312-1, none, auto, or a file of them.")
    ] = "auto",
    leading_space: Annotated[
        str, typer.Option(help="May pieces begin with the space before a word: always, never or auto.")
    ] = "auto",
    pad_piece: Annotated[bool, typer.Option(help="Add [PAD] where the base has no padding token.")] = True,
    as_json: AsJson = False,
) -> None:
    """Graft new pieces onto a base tokenizer and prove that old text encodes as before.

    Example: graftlm tokenizer graft --base base/ --text zh.txt --script Han --num-pieces 8000 --out grafted/
    """
    from graftlm.recipe import Tokenizer
    from graftlm.recipe_file import section_from_flags
    from graftlm.text.tokenizer import graft_tokenizer

    flags = {
        "mode": mode,
        "text": text or (),
        "pieces": pieces,
        "script": script or ("Han",),
        "num_pieces": num_pieces,
        "max_piece_chars": int(max_piece_chars) if max_piece_chars.isdecimal() else max_piece_chars,
        "common_characters": common_characters,
        "leading_space": leading_space,
        "pad_piece": pad_piece,
    }
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
    plot: Annotated[Path | None, typer.Option(help="Write a plot (SVG, PNG or PDF).")] = None,
    as_json: AsJson = False,
) -> None:
    """Characters and bytes per token of each tokenizer on each text.

    Example: graftlm tokenizer report base/ grafted/ --text zh.jsonl --plot compression.svg
    """
    from graftlm.text.tokenizer import tokenizer_report

    show(tokenizer_report(tokenizers, text or [], plot), as_json)
