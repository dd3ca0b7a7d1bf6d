"""Judging: every state loaded once, the same questions to each, picks made by a rule."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import UserError
from graftlm.model.causal import new_causal
from graftlm.release.judge import answer_exact, judge_states, learned_answers
from graftlm.talk.generate import Answer, Chatbot
from graftlm.talk.sampling import Sampling
from graftlm.text.dialogue import CARD, Conversation, Message, Rendered, render
from graftlm.text.rows import RowsBuilder
from graftlm.text.tokenizer import Tokenizer, train_base_tokenizer

TEXTS = ["below is an instruction that describes a task", "write a response that completes the request", "你好"] * 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_base_tokenizer(TEXTS, 300)


def said(language: Any, *texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], text) for n, text in enumerate(texts)), language=language)


def test_every_state_is_judged_once_and_answers_the_same_questions(tokenizer: Tokenizer, tmp_path: Path) -> None:
    alive: list[str] = []

    def states() -> Iterator[tuple[str, Any, Tokenizer]]:
        for name, seed in (("base", 1), ("full", 2), ("model", 2)):
            alive.append(name)
            model = new_causal(num_rows=tokenizer.num_pieces, hidden_size=8, num_layers=1, num_heads=1,
                               intermediate_size=8, max_positions=256, seed=seed)  # fmt: skip
            yield name, model, tokenizer

    conversations = {
        "new": [said("new", f"write {n}", "a task") for n in range(4)],
        "old": [said("old", f"task {n}", "a request", "more", "of it") for n in range(3)],
    }
    judge_states(states(), 3, conversations, CARD, torch.device("cpu"), 2, 3, tmp_path)
    assert alive == ["base", "full", "model"]
    heldout = json.loads((tmp_path / "heldout.json").read_text())
    assert [state["state"] for state in heldout] == alive
    assert heldout[0]["new"]["change_percent"] == 0
    change = 100 * (heldout[1]["new"]["bits_per_byte"] / heldout[0]["new"]["bits_per_byte"] - 1)
    assert heldout[1]["new"]["change_percent"] == pytest.approx(change)
    assert heldout[1]["old"] == heldout[2]["old"]
    assert heldout[0]["old"]["num_rows"] == 6
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert [sample["language"] for sample in samples] == ["new", "new", "old", "old"]
    assert all(list(sample["answers"]) == alive for sample in samples)
    assert all(sample["answers"]["full"] == sample["answers"]["model"] for sample in samples)
    assert len(samples[2]["prompt"]) == 3
    compression = json.loads((tmp_path / "compression.json").read_text())
    assert list(compression) == ["base"]
    assert compression["base"]["new"]["chars_per_token"] > 0


class Parrot(Chatbot):
    """Says the last word of what it is asked."""

    def __init__(self) -> None:
        pass

    def answer_many(self, conversations: Any, sampling: Sampling = Sampling(), label: str = "") -> list[Answer]:  # noqa: B008
        return [Answer(f" {c.messages[-1].content.split()[-1]} ", 1, 1) for c in conversations]


def questions(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, kind: str, *texts: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"id": f"q{number}", "kind": kind, "messages": messages, **more}


def test_exact_answers_are_counted_by_kind_and_shown_by_a_rule(tmp_path: Path) -> None:
    rows = [row(n, "echo", "say four", "four") for n in range(5)]
    rows += [row(n, "sums", "two and two", "four") for n in range(5, 8)]
    rows += [row(8, "follow", "say one", "one", "say two", "two"), row(9, "hard", "say x", "y", learnable=False)]
    path = questions(tmp_path / "q.jsonl", rows)
    found = answer_exact(Parrot(), path, 3, 8, tmp_path)
    assert (found["num_asked"], found["num_exact"]) == (10, 6)
    assert (found["num_learnable"], found["num_exact_learnable"]) == (9, 6)
    assert found["kinds"]["sums"] == {"asked": 3, "exact": 0, "learnable": True}
    assert {shown["kind"] for shown in found["shown"]} == {"echo", "sums", "follow"}
    assert found["shown"][-1]["kind"] == "follow"
    questions(path, rows[::-1])
    assert [s["id"] for s in answer_exact(Parrot(), path, 3, 8, tmp_path)["shown"]] == [s["id"] for s in found["shown"]]


def test_right_answers_that_were_trained_on_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = RowsBuilder(tokenizer.num_pieces)
    builder.add(render(said("new", "how many", "two of them"), tokenizer, CARD), "")
    first, second = (tokenizer.encode_continuation(text) for text in ("你好", "a task"))
    asked, end = tokenizer.encode("again"), tokenizer.eos_id
    is_target = [False] * len(asked) + [True] * (len(first) + 1)
    is_target += [False] * len(asked) + [True] * (len(second) + 1)
    builder.add(Rendered([*asked, *first, end, *asked, *second, end], is_target, 0), "")
    learned = list(learned_answers(builder.rows(), tokenizer))
    assert set(learned) == {"two of them", "你好", "a task"}
    rows = [row(1, "k", "who", "你好"), row(2, "k", "what", "a request"), row(3, "k", "x", "a task", learnable=False)]
    found = answer_exact(Parrot(), questions(tmp_path / "q.jsonl", rows), 3, 8, tmp_path, learned)
    assert (found["num_learnable"], found["num_learned_answers"]) == (2, 1)


@pytest.mark.parametrize("line", ["{", "3", '{"messages": []}', '{"messages": [{"role": "user", "content": 3}, {}]}'])
def test_a_question_without_an_answer_is_told_by_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row(1, "k", "a", "b")) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:2: no question with an answer"):
        answer_exact(Parrot(), tmp_path / "q.jsonl", 3, 8, tmp_path)
