"""Dialogues to token rows that fit: what is cut and what is left out when a dialogue is longer than the limit.

Owns the length policy. Never cuts inside a turn, so an answer that is kept keeps its end token. Does not know files
or splits; rendering is `dialogue`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from graftlm.run import ProgressShown
from graftlm.text.dialogue import Conversation, Message, Rendered, render_many, rows_of
from graftlm.text.sandbox import TemplateRefused
from graftlm.text.templates import Template
from graftlm.text.tokenizer import Tokenizer

BATCH_DIALOGUES = 2000
CHARS_PER_TOKEN = 8
"""A dialogue of several turns with more characters than this times the limit is surely too long: it is cut before it
is rendered, as rendering every answer's row of a very long one would take quadratic time."""

TooLong = Literal["drop", "cut_at_turn"]


@dataclass(slots=True)
class Fitted:
    """What became of one dialogue: its token rows, or why there are none.

    `shown` is the dialogue that yields exactly these rows, where there is one. `is_cut`: turns were left out of some
    row. `num_left_out`: answers that no row learns.
    """

    conversation: Conversation
    rows: list[Rendered] = field(default_factory=list)
    shown: Conversation | None = None
    problem: str = ""
    is_cut: bool = False
    num_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Fitter:
    """How dialogues become rows of at most `max_tokens`.

    Under `cut_at_turn` a template with one answer a row loses the oldest turns before an answer, as a chat that grows
    too long does; one with every answer in one row keeps the longest beginning. With `keeps_beginning` both keep the
    longest beginning, so that what is left is a dialogue (held-out rows: what is judged is what can be shown).
    """

    tokenizer: Tokenizer
    template: Template
    max_tokens: int
    too_long: TooLong = "cut_at_turn"
    keeps_beginning: bool = False

    def fit(
        self, conversations: Iterable[Conversation], total: int | None = None, label: str = "render"
    ) -> Iterator[Fitted]:
        """Every dialogue's rows, in order, a batch at a time; `total` of them, as far as is known.

        Raises UserError for a template that never ends an answer.
        """
        conversations, num_done = iter(conversations), 0
        with ProgressShown(label, total) as shown:
            while batch := list(islice(conversations, BATCH_DIALOGUES)):
                yield from self._fit_batch(batch)
                num_done += len(batch)
                shown.reach(num_done)

    def _fit_batch(self, batch: Sequence[Conversation]) -> Iterator[Fitted]:
        whole_chars = CHARS_PER_TOKEN * self.max_tokens
        rows = [
            rows_of(conversation, self.template)
            if len(conversation.messages) <= 3 or len(conversation.text) <= whole_chars
            else None
            for conversation in batch
        ]
        rendered = render_many([row for some in rows for row in some or ()], self.tokenizer, self.template)
        for conversation, some in zip(batch, rows, strict=True):
            found = None if some is None else [next(rendered) for _ in some]
            yield self._judge(conversation, found)

    def _judge(self, conversation: Conversation, rows: list[Rendered | TemplateRefused] | None) -> Fitted:
        fitted = Fitted(conversation)
        if rows is not None:
            refusal = next((row for row in rows if isinstance(row, TemplateRefused)), None)
            fitted.rows = [row for row in rows if isinstance(row, Rendered)]
            if refusal is not None or not any(any(row.is_target) for row in fitted.rows):
                fitted.rows = []
                fitted.problem = f"refused by the template: {refusal}" if refusal else "nothing in it is learned"
                return fitted
            if all(len(row.ids) <= self.max_tokens for row in fitted.rows):
                fitted.shown = conversation
                return fitted
            if conversation.num_answers == 1:
                return self._without_rows(fitted, fitted.rows[0])
        fitted.rows = []
        if self.too_long == "drop":
            fitted.problem = self._longer
            return fitted
        return self._cut(fitted)

    @property
    def _longer(self) -> str:
        return f"longer than {self.max_tokens} tokens"

    def _without_rows(self, fitted: Fitted, row: Rendered) -> Fitted:
        fitted.rows = []
        has_prompt_too_long = True not in row.is_target[: self.max_tokens]
        fitted.problem = f"its prompt alone is {self._longer}" if has_prompt_too_long else self._longer
        return fitted

    def _cut(self, fitted: Fitted) -> Fitted:
        conversation = fitted.conversation
        lengths = [len(ids) for ids in self.tokenizer.encode_continuations([_said(m) for m in conversation.messages])]
        if self.keeps_beginning or self.template.answers_per_row == "all":
            self._keep_beginning(fitted, lengths)
        else:
            self._keep_ends(fitted, lengths)
        fitted.is_cut = bool(fitted.rows)
        if not fitted.rows:
            fitted.problem = self._longer
        return fitted

    def _keep_beginning(self, fitted: Fitted, lengths: Sequence[int]) -> None:
        """The longest beginning of whole turns every row of which fits."""
        messages = fitted.conversation.messages
        ends = [i + 1 for i, message in enumerate(messages) if message.role == "assistant"]
        while ends and sum(lengths[: ends[-1]]) > self.max_tokens:
            ends.pop()
        while ends:
            shorter = replace(fitted.conversation, messages=messages[: ends.pop()])
            rows = self._rendered(rows_of(shorter, self.template))
            if rows:
                fitted.rows, fitted.shown = rows, shorter
                fitted.num_left_out = fitted.conversation.num_answers - shorter.num_answers
                return

    def _keep_ends(self, fitted: Fitted, lengths: Sequence[int]) -> None:
        """For each answer the row with as many of the turns before it as fit."""
        messages = fitted.conversation.messages
        head = 1 if messages[0].role == "system" else 0
        for end, message in enumerate(messages):
            if message.role != "assistant":
                continue
            begin = end - 1
            num_tokens = sum(lengths[:head]) + lengths[begin] + lengths[end]
            while begin - 2 >= head and num_tokens + lengths[begin - 1] + lengths[begin - 2] <= self.max_tokens:
                num_tokens += lengths[begin - 1] + lengths[begin - 2]
                begin -= 2
            while begin < end:
                kept = (*messages[:head], *messages[begin : end + 1])
                rows = self._rendered([replace(fitted.conversation, messages=kept)])
                if rows:
                    fitted.rows += rows
                    break
                begin += 2
            else:
                fitted.num_left_out += 1

    def _rendered(self, rows: Sequence[Conversation]) -> list[Rendered]:
        """The rows, or nothing when one of them is refused or too long."""
        rendered = list(render_many(rows, self.tokenizer, self.template))
        found = [row for row in rendered if isinstance(row, Rendered) and len(row.ids) <= self.max_tokens]
        return found if len(found) == len(rows) else []


def _said(message: Message) -> str:
    return f"{message.content}\n{message.input}" if message.input else message.content
