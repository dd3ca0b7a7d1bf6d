"""The verb that reads, counts and shows dialogues."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show


def data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders or hub ids.")],
    format: Annotated[str, typer.Option(help="auto, alpaca, belle, sharegpt, messages or text.")] = "auto",
    template: Annotated[str, typer.Option(help="card, alpaca, tokenizer or a .jinja file.")] = "card",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder, to count tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row, in tokens; needs --tokenizer.")] = None,
    near_duplicates: Annotated[float | None, typer.Option(help="Similarity from which a row is one, say 0.9.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    num_shown: Annotated[int, typer.Option("--show", help="Rows to show rendered, the learned part coloured.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read dialogues, count what is kept, cut or dropped and why, and show rows as training will see them.

    Example: graftlm data rows.jsonl --tokenizer grafted/ --max-tokens 1024 --near-duplicates 0.9 --show 5
    """
    from rich.console import Console

    from graftlm.errors import UserError
    from graftlm.recipe import Data
    from graftlm.recipe_file import section_from_flags
    from graftlm.text.dialogue import find_template
    from graftlm.text.inspection import inspect_data
    from graftlm.text.tokenizer import load_tokenizer

    if max_tokens is not None and tokenizer is None:
        raise UserError("--max-tokens counts tokens, and no tokenizer is named.", "Add --tokenizer FOLDER.")
    sources = [{"path": file, "format": format, "split": split, "config": config} for file in files]
    flags = {"sources": sources, "heldout_rows": 1, "template": template, "near_duplicates": near_duplicates}
    section = section_from_flags(Data, flags | ({} if max_tokens is None else {"max_tokens": max_tokens}))
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = inspect_data(
        section.sources,
        find_template(section.template, loaded),
        loaded,
        max_tokens=max_tokens,
        near_duplicates=section.near_duplicates,
        num_shown=num_shown,
        console=Console(file=sys.stderr if as_json else sys.stdout),
    )
    show(found, as_json)
