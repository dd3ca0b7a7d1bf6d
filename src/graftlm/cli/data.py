"""The verb that reads, counts and shows dialogues."""

from __future__ import annotations

from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import show


def data(
    files: list[str],
    template: Annotated[str, typer.Option(help="card, alpaca or tokenizer.")] = "card",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder, to count tokens.")] = None,
    num_shown: Annotated[int, typer.Option("--show", help="Rows to show rendered, the learned part coloured.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read dialogues, count what is kept or dropped and why, and show rows as training will see them.

    Example: graftlm data rows.jsonl --tokenizer grafted/ --show 5
    """
    from graftlm.text.corpus import inspect_data
    from graftlm.text.dialogue import find_template
    from graftlm.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = inspect_data(files, find_template(template, loaded), loaded, num_shown)
    show(found, as_json)
