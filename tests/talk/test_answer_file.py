"""Answering a file: order, resuming after a kill, bad rows, foreign outputs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.talk import answer_file, generate
from graftlm.talk.answer_file import generate_file
from graftlm.talk.generate import ask
from graftlm.talk.sampling import Sampling

SAMPLING = Sampling(max_tokens=8)
QUESTIONS = ["hello", "one two three four", "what is the capital of France?", "你好", "how are you?"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "id": n}) + "\n" for n, q in enumerate(QUESTIONS)))
    return file


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_row_is_answered_in_order(chatbot, prompts, tmp_path) -> None:
    result = generate_file(chatbot, prompts, tmp_path / "answers.jsonl", SAMPLING)
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["answer"] for row in rows] == [chatbot.answer(ask(q), SAMPLING).text for q in QUESTIONS]
    assert rows[3]["prompt"] == {"prompt": "你好", "id": 3}
    assert (result["rows"], result["tokens"]) == (5, sum(row["answer_tokens"] for row in rows))


def test_no_folder_is_made_by_a_slip_of_a_key(prompts, tmp_path) -> None:
    """As `/save` of the chat does: refused before the model is read."""
    with pytest.raises(UserError, match=r"There is no folder .*nodir") as refused:
        generate_file("no-model", prompts, tmp_path / "nodir" / "answers.jsonl", SAMPLING)
    assert "Make it first" in refused.value.fix
    assert not (tmp_path / "nodir").exists()


def test_progress_moves_while_a_window_is_answered(chatbot, prompts, tmp_path, monkeypatch) -> None:
    """A row that cannot be asked counts as done; rows are written a window at a time."""
    with prompts.open("a") as stream:
        stream.write(json.dumps("hello there " * 500) + "\n")
    monkeypatch.setattr(generate, "BATCH_ROWS", 2)
    reached: list[int] = []
    monkeypatch.setattr(answer_file.ProgressShown, "reach", lambda self, count, note="": reached.append(count))
    generate_file(chatbot, prompts, tmp_path / "out.jsonl", SAMPLING)
    assert reached == sorted(reached)
    assert {1, 3, 5, 6} <= set(reached)


def test_a_killed_run_goes_on_where_it_was(chatbot, prompts, tmp_path, monkeypatch) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    generate_file(chatbot, prompts, whole, SAMPLING)
    content = whole.read_bytes()
    second = content.index(b"\n", content.index(b"\n") + 1) + 1
    monkeypatch.setattr(answer_file, "WINDOW_ROWS", 2)
    for kept in (0, second, second + 20, len(content) - 1, len(content)):
        cut.write_bytes(content[:kept])
        result = generate_file(chatbot, prompts, cut, SAMPLING)
        assert cut.read_bytes() == content
        assert result["rows_before"] == content[:kept].count(b"\n") == 5 - result["rows"]


def test_bad_rows_are_told_by_line_and_left_out(chatbot, prompts, tmp_path, capsys) -> None:
    with prompts.open("a") as stream:
        stream.write('{"prompt": 3}\n' + json.dumps("hello there " * 500) + '\n{"prompt": "x"}\nbad\n')
    result = generate_file(chatbot, prompts, tmp_path / "out.jsonl", SAMPLING)
    told = capsys.readouterr().err
    assert f"{prompts}:6 prompt is a number, expected text" in told
    assert f"{prompts}:7 The question takes" in told
    assert f"{prompts}:9 not JSON" in told
    assert (result["rows"], result["bad_rows"]) == (6, 3)
    assert [row["line"] for row in rows_of(tmp_path / "out.jsonl")] == [1, 2, 3, 4, 5, 8]


def test_answers_to_other_prompts_or_of_another_model_are_not_mixed(chatbot, prompts, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    generate_file(chatbot, prompts, out, SAMPLING)
    with pytest.raises(UserError, match=r"out\.jsonl:1 was answered by in memory, not by other/model"):
        generate_file("other/model", prompts, out, SAMPLING)
    prompts.write_text(prompts.read_text().replace("hello", "goodbye"))
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl:1 is not an answer to a row"):
        generate_file(chatbot, prompts, out, SAMPLING)
    assert out.read_bytes() == before


def test_one_model_by_another_spelling_of_its_path_is_the_same(chatbot, prompts, tmp_path, monkeypatch) -> None:
    (tmp_path / "bot").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answer_file, "load_chatbot", lambda _: chatbot)
    out = tmp_path / "out.jsonl"
    generate_file("bot", prompts, out, SAMPLING)
    before = out.read_bytes()
    assert generate_file(tmp_path / "bot", prompts, out, SAMPLING)["rows"] == 0
    assert out.read_bytes() == before


def test_answers_of_other_settings_are_not_mixed(chatbot, prompts, tmp_path) -> None:
    """Before the model is read; a file that tells of no settings is not taken for one of these."""
    out = tmp_path / "out.jsonl"
    generate_file(chatbot, prompts, out, SAMPLING)
    out.write_bytes(before := out.read_bytes()[: out.read_bytes().index(b"\n") + 1])
    warm = replace(SAMPLING, temperature=0.5, max_tokens=9)
    with pytest.raises(
        UserError, match=r"jsonl:1 was answered with --temperature 0\.0, not 0\.5; --max-tokens 8, not 9\."
    ):
        generate_file(chatbot, prompts, out, warm)
    assert out.read_bytes() == before
    row = json.loads(before)
    assert row["settings"] == asdict(SAMPLING)
    out.write_text(json.dumps({key: value for key, value in row.items() if key != "settings"}) + "\n")
    with pytest.raises(UserError, match="with settings it does not tell"):
        generate_file(chatbot, prompts, out, SAMPLING)


def test_hopeless_inputs_are_refused(chatbot, prompts, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        generate_file(chatbot, empty, tmp_path / "o", SAMPLING)
    with pytest.raises(UserError, match="no file"):
        generate_file(chatbot, tmp_path / "none", tmp_path / "o", SAMPLING)
    with pytest.raises(UserError, match="the prompts or a folder"):
        generate_file(chatbot, prompts, prompts, SAMPLING)
    empty.write_text("3\n")
    with pytest.raises(UserError, match="None of the 1 rows"):
        generate_file(chatbot, empty, tmp_path / "o", SAMPLING)
