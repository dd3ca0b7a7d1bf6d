"""The data step: what is kept, what is dropped and why."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.recipe import Data
from graftlm.text.corpus import prepare_data, read_conversations
from graftlm.text.templates import find_template
from graftlm.text.tokenizer import Tokenizer, train_base_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_base_tokenizer([f"line {i} of plain text, a question and its answer" for i in range(60)], 300)


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alpaca(question: object, given: str, answer: object) -> dict[str, object]:
    return {"instruction": question, "input": given, "output": answer}


def test_every_bad_row_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = [alpaca("a", "", "b"), alpaca("a", "", ""), alpaca("a", "", 3), alpaca("", "", "b"), ["x"]]
    kept, dropped = read_conversations(write(tmp_path / "rows.jsonl", rows))
    assert len(kept) == 1
    assert sum(dropped.counts.values()) == 4
    assert dropped.counts["an empty answer"] == 1
    assert dropped.examples["an empty answer"] == [f"{tmp_path / 'rows.jsonl'}:2"]


def test_belle_turns_and_sharegpt_turns_read_alike(tmp_path: Path) -> None:
    belle = {"instruction": "Human:你好\nAssistant:你好!\nHuman:再见\nAssistant:", "output": "再见!"}
    said = [("human", "你好"), ("gpt", "你好!"), ("human", "再见"), ("gpt", "再见!")]
    sharegpt = {"conversations": [{"from": who, "value": what} for who, what in said]}
    one = read_conversations(write(tmp_path / "a.jsonl", [belle]))[0][0]
    other = read_conversations(write(tmp_path / "b.jsonl", [sharegpt]))[0][0]
    assert one.messages == other.messages
    assert [m.content for m in one.messages] == [what for _, what in said]


def test_a_gbk_file_is_told_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "gbk.jsonl"
    path.write_bytes('{"instruction": "你好", "output": "好"}\n'.encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8") as raised:
        read_conversations(path)
    assert "iconv" in raised.value.fix


def test_rows_that_differ_in_their_input_only_are_both_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [alpaca("a question", given, "answer") for given in ("one", "two", "two")]
    section = Data(
        sources=({"path": write(tmp_path / "rows.jsonl", rows)},),
        heldout=({"path": write(tmp_path / "held.jsonl", [alpaca("a question", "three", "answer")])},),
        near_duplicates=None,
    )
    report = prepare_data(section, tokenizer, find_template("card", tokenizer), tmp_path / "out")
    assert report.rows_kept == 2
    assert report.dropped == {"exact duplicate": 1}
    again = read_conversations(tmp_path / "out" / "heldout-new.jsonl")[0][0]
    assert again.messages[0].input == "three"


def test_a_held_out_question_does_not_stay_in_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [alpaca("a question", "", "answer"), alpaca("plain text", "", "line")]
    section = Data(
        sources=({"path": write(tmp_path / "rows.jsonl", rows)},),
        heldout=({"path": write(tmp_path / "held.jsonl", [alpaca("a question", "", "its answer")])},),
    )
    report = prepare_data(section, tokenizer, find_template("card", tokenizer), tmp_path / "out")
    assert (report.rows_kept, report.dropped) == (1, {"also held out": 1})


def test_nothing_left_is_told_with_the_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [alpaca("a question", "", "answer " * 50)]
    held = write(tmp_path / "held.jsonl", [alpaca("line", "", "text")])
    section = Data(
        sources=({"path": write(tmp_path / "rows.jsonl", rows)},), heldout=({"path": held},), max_tokens=60
    )
    with pytest.raises(UserError, match="No row is left"):
        prepare_data(section, tokenizer, find_template("card", tokenizer), tmp_path / "out")
