"""Rows as training sees them, for eyes: what is learned stands out, in colour or between marks.

Owns how a row looks on a terminal. Does not know where rows come from or what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from graftlm.text.dialogue import Conversation, Template, TemplateRefused, rows_of, segments_of
from graftlm.text.marks import control_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from graftlm.text.rows import TokenRows
    from graftlm.text.tokenizer import Tokenizer

LEARNED_MARKS = ("⟦", "⟧")
"""Put around what is learned where there are no colours."""

LONGEST_SHOWN_CHARS = 4000

Part = tuple[str, bool, bool]
"""A stretch of a row: its text, whether it is learned, whether it is a control token."""


def show_token_rows(rows: TokenRows, num_shown: int, tokenizer: Tokenizer, console: Console) -> None:
    """Print the rows of the first `num_shown` dialogues: every token from its own mask and bytes."""
    has_marks = _begin(console)
    dialogues = groupby(range(len(rows)), key=lambda i: rows.sources[i])
    for (source, places), _ in zip(dialogues, range(num_shown), strict=False):
        numbers = list(places)
        for number, i in enumerate(numbers, start=1):
            ids, is_target = rows.row(i)
            _rule(console, source, number, len(numbers))
            parts = token_parts(ids.tolist(), is_target.tolist(), tokenizer)
            console.print(coloured(parts, has_marks=has_marks), soft_wrap=True)


def show_conversations(conversations: Iterable[Conversation], template: Template, console: Console) -> None:
    """Print the rows of conversations without a tokenizer: the rendered text and what of it is learned."""
    has_marks = _begin(console)
    for conversation in conversations:
        rows = rows_of(conversation, template) if conversation.num_answers else [conversation]
        for number, row in enumerate(rows, start=1):
            _rule(console, conversation.source, number, len(rows))
            try:
                console.print(coloured(text_parts(row, template), has_marks=has_marks), soft_wrap=True)
            except TemplateRefused as refusal:
                console.print(f"refused by the template: {refusal}", markup=False)


def coloured(parts: Iterable[Part], *, has_marks: bool = False) -> Text:
    """Learned in bold green, control tokens in magenta, the rest plain; long parts are clipped."""
    from rich.text import Text

    shown = Text()
    for is_target, some in groupby(parts, key=lambda part: part[1]):
        begin, end = LEARNED_MARKS if is_target and has_marks else ("", "")
        shown.append(begin)
        for text, _, is_control in some:
            shown.append(_clipped(text), style=_style(is_target, is_control))
        shown.append(end)
    return shown


def token_parts(ids: Sequence[int], is_target: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts of a row of tokens."""
    tokens = zip(ids, is_target, strict=True)
    for (is_learned, is_control), some in groupby(tokens, key=lambda one: (one[1], one[0] in tokenizer.special_ids)):
        found = [token_id for token_id, _ in some]
        if is_control:
            yield "".join(map(tokenizer.piece, found)), is_learned, True
        else:
            yield b"".join(map(tokenizer.token_bytes, found)).decode("utf-8", "replace"), is_learned, False


def text_parts(conversation: Conversation, template: Template) -> Iterator[Part]:
    """The parts of a row as text. Raises as `render`."""
    if not conversation.num_answers:
        yield conversation.text, True, False  # a plain text
        return
    for segment in segments_of(conversation, control_of(None), template):
        yield segment.text, segment.is_target, segment.token_id is not None


def _begin(console: Console) -> bool:
    """Say how to read what follows; whether marks are needed."""
    has_colours = console.is_terminal and not console.no_color
    look = "bold green" if has_colours else f"between {' '.join(LEARNED_MARKS)}"
    console.print(f"Learned is what is {look}.", highlight=False)
    return not has_colours


def _rule(console: Console, source: str, number: int, of: int) -> None:
    from rich.text import Text

    # A place like rows.jsonl:7[2] would be read as markup.
    console.rule(Text(source + (f", row {number} of {of}" if of > 1 else "")))


def _clipped(text: str) -> str:
    half = LONGEST_SHOWN_CHARS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]} … {left_out:,} characters … {text[-half:]}" if left_out > 0 else text


def _style(is_target: bool, is_control: bool) -> str:
    colour = "magenta" if is_control else "green" if is_target else ""
    return " ".join(part for part in ("bold" if is_target else "", colour) if part)
