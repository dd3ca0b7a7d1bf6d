"""What `graftlm data` tells before anything is trained: what files hold, what is dropped and why, rows as seen.

Owns the dry run of the data step over single files: no split, no held-out rows, nothing written. Does not know
recipes; a run's own data step is `corpus`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

from graftlm.recipe import Source
from graftlm.text.counting import Counting, DataReport
from graftlm.text.dialogue import Conversation, Rendered, Template
from graftlm.text.display import show_conversations, show_token_rows
from graftlm.text.duplicates import Marks
from graftlm.text.fit import Fitter
from graftlm.text.near import drop_near_duplicates
from graftlm.text.readers import Reading, dialogues_of
from graftlm.text.rows import RowsBuilder, text_rows
from graftlm.text.shelf import Fate, Shelf, shelf_in
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
    with tempfile.TemporaryDirectory(prefix="graftlm-") as folder, shelf_in(Path(folder)) as shelf:
        marks = Marks(shelf)
        for source in sources:
            reading = Reading()
            for conversation in dialogues_of(source, reading):
                marks.add(conversation)
                shelf.put(conversation)
            counting.add(reading)
        shelf.finish()
        marks.drop_duplicates()
        if near_duplicates is not None:
            drop_near_duplicates(shelf, near_duplicates)
        shelf.tell_dropped(counting.dropped)
        shown = _Shown(num_shown, RowsBuilder(tokenizer.num_pieces if tokenizer else 1))
        if tokenizer is None:
            for _, conversation in shelf.read(Fate.LEARN):
                counting.learn(conversation, ())
                shown.add(conversation, ())
        else:
            _fit(shelf, Fitter(tokenizer, template, max_tokens or UNBOUNDED_TOKENS), counting, shown)
    if num_shown and shown.conversations and console is not None:
        if tokenizer is not None:
            show_token_rows(shown.builder.rows(), num_shown, tokenizer, console)
        else:
            show_conversations(shown.conversations, template, console)
    report = counting.report()
    report.by_language = {}  # a file by itself is of no language
    return report


@dataclass(slots=True)
class _Shown:
    """The first dialogues that are kept, and their rows."""

    most: int
    builder: RowsBuilder
    conversations: list[Conversation] = field(default_factory=list)

    def add(self, conversation: Conversation, rows: Sequence[Rendered]) -> None:
        """Keep it, where fewer than `most` are kept."""
        if len(self.conversations) < self.most:
            self.conversations.append(conversation)
            for row in rows:
                self.builder.add(row, conversation.source)


def _fit(shelf: Shelf, fitter: Fitter, counting: Counting, shown: _Shown) -> None:
    """Count the conversations that have rows within the limit: dialogues first, then plain texts."""

    def of_role(is_plain: bool) -> Iterator[Conversation]:
        found = (conversation for _, conversation in shelf.read(Fate.LEARN))
        return (conversation for conversation in found if (conversation.messages[0].role == "text") == is_plain)

    for fitted in fitter.fit(of_role(False), shelf.count(Fate.LEARN)):
        if counting.is_kept(fitted):
            counting.learn(fitted.conversation, fitted.rows)
            shown.add(fitted.conversation, fitted.rows)
    plain, again = tee(of_role(True))
    texts = (conversation.text for conversation in again)
    for conversation, rows in zip(plain, text_rows(texts, fitter.tokenizer, fitter.max_tokens), strict=True):
        counting.learn(conversation, rows)
        shown.add(conversation, rows)
