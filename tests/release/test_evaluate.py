"""Figures of one model: their intervals, tasks by hand-made likelihoods, and files that are none."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_models import dialogues, write_model, write_rows

from graftlm.errors import UserError
from graftlm.release.evaluate import Candidate, evaluate_files, read_data
from graftlm.release.intervals import difference_interval, ratio_interval, resampled_sums, share_interval
from graftlm.release.tasks import answer_task, choose, read_task
from graftlm.release.tasks_export import export_tasks
from graftlm.text.dialogue import Conversation, Message, Template, render


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate") / "model")


def test_a_ratios_interval_holds_what_the_bootstrap_would_give() -> None:
    """Against the normal approximation of the same ratio, and the plain bootstrap written out."""
    dice = np.random.default_rng(3)
    below = dice.integers(5, 50, 400).astype(float)
    above = below * dice.normal(2.0, 0.5, 400)
    low, high = ratio_interval(above, below)
    ratio = above.sum() / below.sum()
    error = math.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)
    assert ratio_interval(above, below) == (low, high)
    sums = resampled_sums(np.stack([above, below], axis=1))
    assert sums.mean(0) == pytest.approx([above.sum(), below.sum()], rel=0.01)


def test_a_paired_difference_is_surer_than_two_figures() -> None:
    dice = np.random.default_rng(4)
    hard = dice.gamma(2.0, 10.0, 300)
    one, other, below = hard * 1.02 + dice.normal(0, 0.1, 300), hard, np.full(300, 10.0)
    low, high = difference_interval(one, below, other, below)
    assert 0 < low < high
    apart = ratio_interval(one, below), ratio_interval(other, below)
    assert apart[0][0] < apart[1][1], "their own intervals overlap"


@pytest.mark.parametrize(
    ("hits", "asked", "expected"), [(0, 10, (0.0, 0.2775)), (8, 10, (0.4902, 0.9433)), (0, 0, (0.0, 1.0))]
)
def test_a_shares_interval_is_wilsons(hits: int, asked: int, expected: tuple[float, float]) -> None:
    """Table values of Wilson's interval."""
    assert share_interval(hits, asked) == pytest.approx(expected, abs=1e-4)


def test_figures_of_a_file(model: Path, tmp_path: Path) -> None:
    """Per byte and per token from one sum; the interval by dialogue; speed of reading and answering."""
    rows = dialogues(tmp_path / "rows.jsonl")
    found = evaluate_files(str(model), [str(rows)], num_questions=2, max_answer_tokens=4)[str(rows)]
    assert found["num_rows"] == 7
    low, high = found["loss_interval"]
    assert low <= found["loss_per_answer_token"] <= high
    assert found["chars_per_token"] > 0.5
    assert found["scoring_tokens_per_second"] > 0
    assert found["answer_tokens_per_second"] is None or found["answer_tokens_per_second"] > 0
    candidate = Candidate(str(model))
    scores = candidate_nats(candidate, read_data([str(rows)])[str(rows)].conversations[0])
    one = write_rows(tmp_path / "one.jsonl", [json.loads(rows.read_text().splitlines()[0])])
    alone = evaluate_files(str(model), [str(one)], num_questions=0)[str(one)]
    assert alone["loss_per_answer_token"] == pytest.approx(scores, rel=1e-4)
    assert alone["answer_tokens_per_second"] is None


def candidate_nats(candidate: Candidate, conversation: Conversation) -> float:
    """Nats per answer token by the model's plain forward pass."""
    row = render(conversation, candidate.tokenizer, candidate.template)
    with torch.no_grad():
        log_shares = candidate.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    losses = [-log_shares[at - 1, row.ids[at]].item() for at in range(1, len(row.ids)) if row.is_target[at]]
    return sum(losses) / len(losses)


def test_choices_are_scored_by_their_words_alone(model: Path, tmp_path: Path) -> None:
    """Against sums of log-likelihood by hand: per byte and per token may disagree; the answer's end does not count."""
    rows: list[dict[str, Any]] = [
        {"question": f"how are you {n}?", "choices": ["hello there", "今天天气很好", "one"], "index": n % 3}
        for n in range(6)
    ]
    rows.append({"question": "how " * 300, "choices": ["one", "two"], "index": 0})
    path = write_rows(tmp_path / "choices.jsonl", rows)
    candidate = Candidate(str(model))
    result = choose(candidate.model, candidate.tokenizer, candidate.template, read_task(path), candidate.device)
    for place, row in enumerate(rows[:6]):
        per_byte, per_token = [], []
        for choice in row["choices"]:
            told = Conversation((Message("user", row["question"]), Message("assistant", choice)))
            ids = render(told, candidate.tokenizer, candidate.template, for_reply=True).ids
            whole = [*ids, *candidate.tokenizer.encode_continuation(choice)]
            with torch.no_grad():
                shares = candidate.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(shares[at - 1, whole[at]].item() for at in range(len(ids), len(whole)))
            per_byte.append(total / len(choice.encode()))
            per_token.append(total / (len(whole) - len(ids)))
        assert result.rights["per_byte"][place] == (int(np.argmax(per_byte)) == row["index"])
        assert result.rights["per_token"][place] == (int(np.argmax(per_token)) == row["index"])
    told = result.told()
    assert (told["num_questions"], told["num_left_out"]) == (6, 1)
    assert told["per_byte_interval"][0] <= told["per_byte"] <= told["per_byte_interval"][1]
    assert evaluate_files(str(model), [str(path)])[str(path)] == told


def test_a_question_the_template_refuses_is_left_out(model: Path, tmp_path: Path) -> None:
    rows = [{"question": question, "choices": ["one", "two"], "index": 0} for question in ("hello", "no")]
    task = read_task(write_rows(tmp_path / "choices.jsonl", rows))
    strict = "{% if 'no' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    template = Template("strict", strict + "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "all")
    one = Candidate(str(model))
    assert choose(one.model, one.tokenizer, template, task, one.device).is_asked.tolist() == [True, False]


def test_exact_answers_are_those_that_are_equal(model: Path, tmp_path: Path) -> None:
    """What the model says at temperature 0 is asked for, with spaces around it; the other question wants more."""
    candidate = Candidate(str(model))
    questions = [{"question": f"how are you {n}?", "answer": "x"} for n in range(3)]
    path = write_rows(tmp_path / "q.jsonl", [*questions, {"question": "how " * 300, "answer": "x"}])
    said = answer_task(candidate.chatbot, read_task(path), 4).answers
    questions[0]["answer"] = f" {said[0].strip()}x".replace("x", "") or "x"
    path = write_rows(path, [*questions, {"question": "how " * 300, "answer": "x"}])
    result = answer_task(candidate.chatbot, read_task(path), 4)
    assert result.answers == said
    assert result.rights["exact"].tolist() == [bool(said[0].strip()), False, False, False]
    assert result.told()["num_left_out"] == 1


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"question": "a"}'], "q.jsonl:1: no answer that is text, and no choices"),
        (['{"question": " ", "answer": "b"}'], "q.jsonl:1: no question that is text"),
        (['{"question": "a", "answer": "b"}', "{"], "q.jsonl:2: not JSON"),
        (['{"question": "a", "choices": ["b"], "index": 0}'], "a list of two or more texts"),
        (['{"question": "a", "choices": ["b", "b"], "index": 0}'], "two choices are the same"),
        (['{"question": "a", "choices": ["b", "c"], "index": 2}'], "index is 2, expected"),
        (['{"question": "a", "choices": ["b", "c"], "index": true}'], "index is True, expected"),
        (
            ['{"question": "a", "answer": "b"}', '{"question": "a", "choices": ["b", "c"], "index": 0}'],
            "q.jsonl:2: choices, unlike",
        ),
        (['{"question": "a", "answer": "\\ud800"}'], "q.jsonl:1: no answer that is text"),
        ([], "q.jsonl"),
        (['{"frage": "a"}'], "its format cannot be told"),
    ],
)
def test_a_file_of_no_use_is_told_by_line(tmp_path: Path, lines: list[str], told: str) -> None:
    """B1, B2: broken and foreign rows."""
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_data([str(path)])
    assert told in error.value.problem


def test_a_file_is_named_once(tmp_path: Path) -> None:
    rows = str(dialogues(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="twice"):
        read_data([rows, rows])


def test_tasks_in_lm_evals_form(tmp_path: Path) -> None:
    """Fields of its task guide; what is written reads again as the same task."""
    choices = [{"question": "天气？", "choices": ["好", "坏"], "index": 1}]
    read = read_data([
        str(write_rows(tmp_path / "wea-ther.jsonl", choices)),
        str(write_rows(tmp_path / "sums.jsonl", [{"question": "1+1", "answer": "2"}])),
        str(dialogues(tmp_path / "rows.jsonl")),
    ])  # fmt: skip
    out = tmp_path / "tasks"
    assert export_tasks(read, out) == ["graftlm_wea_ther", "graftlm_sums"]
    told = yaml.safe_load((out / "graftlm_wea_ther.yaml").read_text(encoding="utf-8"))
    assert (told["task"], told["output_type"], told["dataset_path"]) == ("graftlm_wea_ther", "multiple_choice", "json")
    assert (told["doc_to_text"], told["doc_to_choice"], told["doc_to_target"]) == (
        "{{question}}", "{{choices}}", "{{index}}",
    )  # fmt: skip
    file = Path(told["dataset_kwargs"]["data_files"][told["test_split"]])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == choices
    told = yaml.safe_load((out / "graftlm_sums.yaml").read_text(encoding="utf-8"))
    assert told["output_type"] == "generate_until"
    assert [one["metric"] for one in told["metric_list"]] == ["exact_match"]
    assert read_task(out / "graftlm_sums.jsonl").questions[0].answer == "2"
    with pytest.raises(UserError, match="already holds"):
        export_tasks(read, out)
    with pytest.raises(UserError, match="no task to export"):
        export_tasks(read_data([str(tmp_path / "rows.jsonl")]), tmp_path / "other")
