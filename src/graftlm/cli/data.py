"""The verb that reads, counts and shows dialogues."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show

if TYPE_CHECKING:
    from graftlm.text.counting import DataReport


def data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders, patterns or hub ids.")],
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
    from graftlm.recipe import Data, Source
    from graftlm.recipe_file import section_from_flags
    from graftlm.text.dialogue import find_template
    from graftlm.text.inspection import inspect_data
    from graftlm.text.tokenizer import load_tokenizer

    if max_tokens is not None and tokenizer is None:
        raise UserError("--max-tokens counts tokens, and no tokenizer is named.", "Add --tokenizer FOLDER.")
    choice = {"format": format, "split": split, "config": config}
    sources = [section_from_flags(Source, {"path": file, **choice}) for file in files]
    flags = {"sources": (), "heldout_rows": 1, "template": template, "near_duplicates": near_duplicates}
    section = section_from_flags(Data, flags | ({} if max_tokens is None else {"max_tokens": max_tokens}))
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = inspect_data(
        sources,
        find_template(section.template, loaded),
        loaded,
        max_tokens=max_tokens,
        near_duplicates=section.near_duplicates,
        num_shown=num_shown,
        console=Console(file=sys.stderr if as_json else sys.stdout),
    )
    if as_json:
        show(found, True)
    else:
        print(_told(found))
    if not found.rows_kept:
        raise UserError(f"Of {found.rows_read:,} rows none is kept.", "The reasons are counted above; mend the files.")


def _told(found: DataReport) -> str:
    """The account for a person: counts with their reasons and the first places of each."""
    lines = []
    for name, facts in found.files.items():
        unread = f"   fields not read: {', '.join(facts['fields_not_read'])}" if "fields_not_read" in facts else ""
        lines.append(f"{name}   {facts['format']}, {facts['rows']:,} rows{unread}")
    lines.append(f"rows read    {found.rows_read:,}\nrows kept    {found.rows_kept:,}")
    if found.tokens:
        sizes = ", ".join(f"{name} {size:,}" for name, size in found.length_quantiles.items())
        lines.append(f"token rows   {found.token_rows:,} ({sizes} tokens)")
        lines.append(f"tokens       {found.tokens:,}, learned {found.labels:,} ({found.labels / found.tokens:.0%})")
    for title, counts in (("dropped", found.dropped), ("cut", found.cut), ("cleaned", found.cleaned)):
        for reason, number in counts.items():
            lines.append(f"{title:<9} {number:>8,}  {reason}   {', '.join(found.examples[reason])}")
    if found.answers_left_out:
        lines.append(f"answers that no row learns, as they were cut off: {found.answers_left_out:,}")
    return "\n".join(lines)
