"""What `graftlm data` tells before anything is trained: what files hold, what is dropped and why, rows as seen.

Owns the dry run of the data step over single files: no split, no held-out rows, nothing written. Does not know
recipes; a run's own data step is `corpus`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.recipe import Source
from graftlm.text.counting import Counting, DataReport
from graftlm.text.dialogue import Conversation, Template
from graftlm.text.display import show_conversations, show_token_rows
from graftlm.text.duplicates import drop_exact_duplicates, drop_near_duplicates
from graftlm.text.fit import Fitter
from graftlm.text.readers import read_source
from graftlm.text.rows import RowsBuilder, text_rows
from graftlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

UNBOUNDED_TOKENS = 2**31 - 1


def inspect_data(
    sources: Sequence[Source],
    template: Template,
    tokenizer: Tokenizer | None = None,
    *,
    max_tokens: int | None = None,
    near_duplicates: float | None = None,
    num_shown: int = 0,
    console: Console | None = None,
) -> DataReport:
    """The account of the sources, and the first `num_shown` kept rows printed on `console` as training sees them.

    Without a tokenizer nothing is rendered: tokens stay 0 and no row is too long. Raises UserError.
    """
    counting = Counting()
    found: list[Conversation] = []
    for source in sources:
        reading = read_source(source)
        counting.add(reading)
        found += reading.conversations
    found = drop_exact_duplicates(found, counting.dropped)
    if near_duplicates is not None:
        found = drop_near_duplicates(found, [], near_duplicates, counting.dropped)
    builder = RowsBuilder(tokenizer.num_pieces if tokenizer else 1)
    if tokenizer is not None:
        found = _fit(found, Fitter(tokenizer, template, max_tokens or UNBOUNDED_TOKENS), counting, builder)
    report = counting.report(found, builder.rows())
    report.by_language = {}  # a file by itself is of no language
    if num_shown and found and console is not None:
        if tokenizer is not None:
            show_token_rows(builder.rows(), num_shown, tokenizer, console)
        else:
            show_conversations(found[:num_shown], template, console)
    return report


def _fit(found: Sequence[Conversation], fitter: Fitter, counting: Counting, builder: RowsBuilder) -> list[Conversation]:
    """The conversations that have rows within the limit, the rows added to `builder`."""
    kept: list[Conversation] = []
    dialogues = [c for c in found if c.messages[0].role != "text"]
    for fitted in fitter.fit(dialogues):
        if counting.is_kept(fitted):
            kept.append(fitted.conversation)
            for row in fitted.rows:
                builder.add(row, fitted.conversation.source)
    plain = [c for c in found if c.messages[0].role == "text"]
    for conversation, rows in zip(
        plain, text_rows((c.text for c in plain), fitter.tokenizer, fitter.max_tokens), strict=True
    ):
        kept.append(conversation)
        for row in rows:
            builder.add(row, conversation.source)
    return kept
