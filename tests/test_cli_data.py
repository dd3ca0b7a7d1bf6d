"""`graftlm data`: what it prints, its JSON, and its mistakes in two lines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.cli.app import main
from graftlm.text.tokenizer import train_base_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The verb in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graftlm", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    found = [("天气？", "很好。"), ("天气？", "很好。"), ("空", ""), ("长", "a" * 400)]
    path.write_text("".join(json.dumps({"instruction": q, "output": a, "id": 1}) + "\n" for q, a in found))
    return path


def test_one_json_object_and_nothing_else(run: Run, rows: Path, tmp_path: Path) -> None:
    train_base_tokenizer([f"line {i} of text" for i in range(50)], 290, tmp_path / "tokenizer")
    code, out, err = run(rows, "--tokenizer", tmp_path / "tokenizer", "--max-tokens", 300, "--show", 1, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows_read"], found["rows_kept"], found["format"]) == (4, 1, "alpaca")
    assert found["dropped"] == {"an empty answer": 1, "exact duplicate": 1, "longer than 300 tokens": 1}
    assert found["examples"]["an empty answer"] == [f"{rows}:3"]
    assert 0 < found["labels"] < found["tokens"]
    assert found["files"] == {str(rows): {"format": "alpaca", "rows": 4, "fields_not_read": ["id"]}}
    assert "⟦很好。</s>⟧" in err


def test_a_pattern_is_one_source(run: Run, rows: Path) -> None:
    (rows.parent / "rows-2.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    code, out, _ = run(rows.parent / "rows*.jsonl", "--json")
    assert code == 0
    assert list(json.loads(out)["files"]) == [str(rows.parent / "rows-2.jsonl"), str(rows)]
    code, _, err = run(rows.parent / "none*.jsonl")
    assert code == 2
    assert f"No file matches {rows.parent}/none*.jsonl." in err


def test_the_account_for_a_person(run: Run, rows: Path) -> None:
    code, out, _ = run(rows, "--show", 1, "--template", "alpaca")
    assert code == 0
    assert "### Response:⟦很好。</s>⟧" in out
    assert "rows read    4" in out
    assert f"exact duplicate   {rows}:2" in out


def test_files_of_which_nothing_is_left_are_a_mistake(run: Run, tmp_path: Path) -> None:
    """The account is printed all the same: it holds the reasons."""
    path = tmp_path / "empty.jsonl"
    path.write_text('{"instruction": "a", "output": ""}\n')
    code, out, err = run(path, "--show", 1)
    assert (code, "Learned is" in out) == (2, False)
    assert "an empty answer" in out
    assert err.splitlines()[0] == "Of 1 rows none is kept."


def test_a_template_file_and_a_given_format(run: Run, rows: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.content }}{% if loop.last %} {{ eos_token }}{% endif %}{% endfor %}"
    )
    code, out, _ = run(rows, "--template", template, "--format", "belle", "--show", 1)
    assert code == 0
    # The blank a template prints between an answer and its end is learned too: it is part of how the model stops.
    assert "<天气？<⟦很好。 </s>⟧" in out
    assert "belle, 4 rows" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--format", "aplaca"), "--format: expected auto, alpaca, belle, sharegpt, messages or text, found 'aplaca'"),
        (("--template", "crad"), "no template is called crad"),
        (("--template", "none.jinja"), "cannot be read"),
        (("--near-duplicates", "2"), "--near-duplicates: expected a number of at most 1, found 2"),
        (("--max-tokens", "100"), "no tokenizer is named"),
        (("--split", "train"), "belongs to a hub data set"),
        (("none.jsonl",), "cannot be read"),
    ],
)
def test_mistakes_end_in_two_lines_and_exit_2(run: Run, rows: Path, flags: tuple[str, ...], told: str) -> None:
    code, out, err = run(rows, *flags)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 2
