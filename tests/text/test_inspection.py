"""What `graftlm data` tells before training."""

import io
from pathlib import Path

import pytest
from chat_templates import TEMPLATES
from rich.console import Console
from row_files import alpaca, write_rows

from graftlm.errors import UserError
from graftlm.recipe import Source
from graftlm.text.inspection import inspect_data
from graftlm.text.templates import CARD
from graftlm.text.tokenizer import Tokenizer

LONG = "abcdefgh ijklmnop qrstuvw xyz 0123456789 " * 4
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2


def sources(*paths: str) -> list[Source]:
    return [Source(path=path) for path in paths]


def test_the_account_of_several_files(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    one = write_rows(
        tmp_path / "a.jsonl", [alpaca(), alpaca(), alpaca(answer=""), alpaca(answer=LONG), alpaca(answer=LONG + ".")]
    )
    two = write_rows(tmp_path / "b.jsonl", [{"messages": MESSAGES}])
    report = inspect_data(sources(one, two), CARD, llama_tokenizer, near_duplicates=0.9)
    assert (report.rows_read, report.rows_kept, report.token_rows) == (6, 3, 4)
    assert report.dropped == {"an empty answer": 1, "exact duplicate": 1, "near duplicate": 1}
    assert {Path(name).name: facts["format"] for name, facts in report.files.items()} == {
        "a.jsonl": "alpaca", "b.jsonl": "messages",
    }  # fmt: skip
    assert 0 < report.labels < report.tokens
    assert report.rows_read == report.rows_kept + sum(report.dropped.values())
    within = inspect_data(sources(one), CARD, llama_tokenizer, max_tokens=150)
    assert within.dropped["longer than 150 tokens"] == 2


def test_without_a_tokenizer_rows_are_counted_and_shown_as_text(tmp_path: Path) -> None:
    out = io.StringIO()
    path = write_rows(tmp_path / "a.jsonl", [alpaca("first"), alpaca("second")])
    report = inspect_data(sources(path), CARD, num_shown=1, console=Console(file=out))
    assert (report.rows_kept, report.tokens) == (2, 0)
    assert "### Instruction:\n\nfirst" in out.getvalue()
    assert "second" not in out.getvalue()


def test_plain_text_is_counted_in_rows_of_the_objective_text(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo " + "w " * 60)
    out = io.StringIO()
    report = inspect_data(
        sources(str(tmp_path / "a.txt")), CARD, llama_tokenizer, max_tokens=64, num_shown=1, console=Console(file=out)
    )
    assert (report.format, report.rows_kept) == ("text", 2)
    assert report.token_rows > 2
    assert report.labels == report.tokens - report.token_rows
    assert "<s>⟦ one</s>⟧" in out.getvalue()


def test_what_the_template_refuses_is_counted(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    row = {"messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}
    path = write_rows(tmp_path / "a.jsonl", [row, {"messages": MESSAGES}])
    report = inspect_data(sources(path), TEMPLATES["mistral"], llama_tokenizer)
    assert report.dropped == {"refused by the template: no system message here": 1}
    assert (report.rows_kept, report.token_rows) == (1, 1)


def test_answers_that_no_row_learns_are_told(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    row = {"messages": [*MESSAGES[:2], {"role": "user", "content": "c"}, {"role": "assistant", "content": LONG * 2}]}
    report = inspect_data(sources(write_rows(tmp_path / "a.jsonl", [row])), CARD, llama_tokenizer, max_tokens=200)
    assert (report.rows_kept, report.token_rows, report.answers_left_out) == (1, 1, 1)
    assert report.cut == {"longer than the limit: cut at a turn": 1}


def test_an_unusable_file_is_told(tmp_path: Path) -> None:
    """B2: two lines for a file that is not there."""
    with pytest.raises(UserError, match="cannot be read"):
        inspect_data(sources(str(tmp_path / "none.jsonl")), CARD)
