"""Rows for eyes: what is learned stands out with and without colours."""

import io

import pytest
from chat_templates import TEMPLATES
from rich.console import Console

from graftlm.text.dialogue import Conversation, Message, render
from graftlm.text.display import (
    LONGEST_SHOWN_CHARS,
    coloured,
    show_conversations,
    show_token_rows,
    text_parts,
    token_parts,
)
from graftlm.text.rows import RowsBuilder
from graftlm.text.templates import CARD
from graftlm.text.tokenizer import Tokenizer

DIALOGUE = Conversation((Message("user", "[bold]什么[/bold]"), Message("assistant", "猫😀。")), "rows.jsonl:1")


def printed(has_colours: bool, show: object) -> str:
    out = io.StringIO()
    colours = "standard" if has_colours else None
    console = Console(file=out, force_terminal=has_colours, width=80, color_system=colours)
    show(console)  # type: ignore[operator]
    return out.getvalue()


def rows_of_dialogue(tokenizer: Tokenizer, *templates: str) -> RowsBuilder:
    builder = RowsBuilder(tokenizer.num_pieces)
    for name in templates:
        builder.add(render(DIALOGUE, tokenizer, TEMPLATES[name]), DIALOGUE.source)
    return builder


def test_marks_stand_around_what_is_learned(tokenizer: Tokenizer) -> None:
    for template, end in (("card", "</s>"), ("chatml", "<|im_end|>")):
        row = render(DIALOGUE, tokenizer, TEMPLATES[template])
        shown = coloured(token_parts(row.ids, row.is_target, tokenizer), has_marks=True).plain
        assert f"⟦猫😀。{end}⟧" in shown
        assert shown.count("⟦") == 1
        assert "[bold]什么[/bold]" in shown
    assert coloured(text_parts(DIALOGUE, CARD), has_marks=True).plain.endswith("### Response:\n\n⟦猫😀。</s>⟧")


def test_without_colours_there_are_marks_and_with_colours_there_are_none(llama_tokenizer: Tokenizer) -> None:
    rows = rows_of_dialogue(llama_tokenizer, "card").rows()
    plain = printed(False, lambda console: show_token_rows(rows, 1, llama_tokenizer, console))
    assert "⟦猫😀。</s>⟧" in plain
    assert "\x1b" not in plain
    assert "rows.jsonl:1" in plain
    coloured_text = printed(True, lambda console: show_token_rows(rows, 1, llama_tokenizer, console))
    assert "⟦" not in coloured_text
    assert "\x1b[1;32m猫😀。" in coloured_text
    assert "\x1b[1;35m</s>" in coloured_text


def test_rows_of_one_dialogue_are_shown_together_and_numbered(llama_tokenizer: Tokenizer) -> None:
    builder = rows_of_dialogue(llama_tokenizer, "card", "card")
    builder.add(render(DIALOGUE, llama_tokenizer, CARD), "rows.jsonl:2")
    out = printed(False, lambda console: show_token_rows(builder.rows(), 1, llama_tokenizer, console))
    assert "rows.jsonl:1, row 2 of 2" in out
    assert "rows.jsonl:2" not in out


def test_without_a_tokenizer_the_text_is_shown() -> None:
    document = Conversation((Message("text", "a document"),), "text.txt:1")
    refused = Conversation((Message("user", "a"), Message("system", "late"), Message("assistant", "b")), "rows.jsonl:9")
    out = printed(False, lambda console: show_conversations([DIALOGUE, document, refused], CARD, console))
    assert "⟦猫😀。</s>⟧" in out
    assert "⟦a document⟧" in out
    assert "refused by the template: a system message must come first" in out


@pytest.mark.parametrize("length", [LONGEST_SHOWN_CHARS, LONGEST_SHOWN_CHARS + 7])
def test_long_parts_are_clipped(length: int) -> None:
    shown = coloured([("a" * length, True, False)]).plain
    assert (shown == "a" * length) == (length == LONGEST_SHOWN_CHARS)
    assert length == LONGEST_SHOWN_CHARS or "… 7 characters …" in shown
