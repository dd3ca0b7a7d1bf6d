"""Questions with a right answer: exact match, and choices scored by their likelihood.

Owns the two forms of a task file, what counts as right, and the figures told of it. Does not know how many models
are judged. Both forms are JSON lines: `{"question", "answer"}` and `{"question", "choices": […], "index"}` (from 0).

Shapes: Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import Precision
from graftlm.errors import UserError
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed, attend_plain
from graftlm.release.intervals import share_interval
from graftlm.run import progress
from graftlm.talk.generate import Chatbot
from graftlm.talk.sampling import Sampling
from graftlm.text.dialogue import Conversation, Message, Rendered, TemplateRefused, render
from graftlm.text.files import open_files
from graftlm.text.lines import Row
from graftlm.text.rows import RowsBuilder
from graftlm.text.templates import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.heldout import heldout_losses

BUDGET_TOKENS = 8192
FORMS = '{"question": "…", "answer": "…"} or {"question": "…", "choices": ["…", "…"], "index": 0}'


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its right answer, or choices and which of them is right (from 0)."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    index: int = 0
    where: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A file of questions, all of one kind."""

    questions: tuple[Question, ...]
    has_choices: bool


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model made of a task: right or wrong by question (Q,), and which were asked at all (Q,).

    A question that does not fit the model's context, or that its template refuses, is not asked. `rights` has `exact`,
    or `per_byte` and `per_token`: the choice of the greatest log-likelihood per byte of its text, and per token.
    `answers` holds what was said.
    """

    kind: str
    rights: dict[str, np.ndarray]
    is_asked: np.ndarray
    answers: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """Shares of right answers with their 95 % intervals (Wilson)."""
        num_asked = int(self.is_asked.sum())
        found: dict[str, Any] = {"task": self.kind, "num_questions": num_asked}
        found["num_left_out"] = len(self.is_asked) - num_asked
        for name, is_right in self.rights.items():
            num_right = int(is_right[self.is_asked].sum())
            found[name] = num_right / num_asked if num_asked else None
            found[f"{name}_interval"] = share_interval(num_right, num_asked)
        return found


def is_task_file(path: str | Path) -> bool:
    """Whether the first row of a file of JSON lines is a question. Raises UserError for what is no file."""
    if not Path(path).is_file():
        return False
    file = next(open_files(path))
    first = next(iter(file.rows), None) if file.form in ("jsonl", "json") else None
    return first is not None and isinstance(first.value, dict) and "question" in first.value


def read_task(path: Path) -> Task:
    """The questions of a file. Raises UserError naming the first row that is none, or of another kind."""
    rows = chain.from_iterable(file.rows for file in open_files(path))
    questions = [_question(row) for row in rows]
    kinds = {bool(one.choices) for one in questions}
    if len(kinds) > 1:
        other = next(one for one in questions if bool(one.choices) != bool(questions[0].choices))
        raise UserError(
            f"{other.where}: {'choices' if other.choices else 'no choices'}, unlike the rows before it.",
            "Put questions with and without choices into files of their own.",
        )
    return Task(tuple(questions), kinds.pop())


def _question(row: Row) -> Question:
    def wrong(told: str) -> UserError:
        return UserError(f"{row.where}: {told}.", f"Write one question a line: {FORMS}.")

    if row.problem:
        raise wrong(row.problem)
    value = row.value
    if not isinstance(value, dict) or not _is_text(value.get("question")):
        raise wrong("no question that is text")
    if "choices" not in value:
        if not _is_text(value.get("answer")):
            raise wrong("no answer that is text, and no choices")
        return Question(value["question"], value["answer"], where=row.where)
    choices, index = value["choices"], value.get("index")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise wrong("choices must be a list of two or more texts")
    if len(set(choices)) < len(choices):
        raise wrong("two choices are the same")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise wrong(f"index is {index!r}, expected the number of the right choice, 0 to {len(choices) - 1}")
    return Question(value["question"], choices[index], tuple(choices), index, row.where)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def answer_task(chatbot: Chatbot, task: Task, max_answer_tokens: int, label: str = "questions") -> TaskResult:
    """Answer every question at temperature 0: exact means equal after stripping spaces."""
    sampling = Sampling(max_tokens=max_answer_tokens)
    prompts = []
    is_asked = np.ones(len(task.questions), dtype=bool)
    for place, one in enumerate(task.questions):
        try:
            prompts.append(chatbot.prompt(Conversation((Message("user", one.question),)), sampling))
        except UserError:
            is_asked[place] = False
    batches = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    said = [answer.text for batch in progress(batches, len(batches), label)
            for answer in chatbot.answer_prompts(batch, sampling)]  # fmt: skip
    answers = np.full(len(task.questions), "", dtype=object)
    answers[is_asked] = said
    is_right = np.array([a.strip() == q.answer.strip() for a, q in zip(answers, task.questions, strict=True)])
    return TaskResult("exact", {"exact": is_right}, is_asked, tuple(answers))


def choose(
    model: Any, tokenizer: Tokenizer, template: Template, task: Task, device: torch.device, label: str = "choices"
) -> TaskResult:
    """Score every choice as the answer to its question: the log-likelihood of its words, without the answer's end."""
    builder = RowsBuilder(tokenizer.num_pieces)
    is_asked = np.ones(len(task.questions), dtype=bool)
    places: list[tuple[int, int]] = []
    for place, one in enumerate(task.questions):
        try:
            rows = [_without_end(_answered(one.question, choice), tokenizer, template) for choice in one.choices]
        except TemplateRefused:
            rows = []
        if not rows or any(len(row.ids) > model.config.max_position_embeddings for row in rows):
            is_asked[place] = False
            continue
        for number, row in enumerate(rows):
            builder.add(row, "")
            places.append((place, number))
    widest = max(len(one.choices) for one in task.questions)
    scores = {name: np.full((len(task.questions), widest), -np.inf) for name in ("per_byte", "per_token")}
    if places:
        body: Any = body_of(model)
        attend_packed(body)
        losses = heldout_losses(model, builder.rows(), Precision(torch.float32, device, None), BUDGET_TOKENS, label)
        attend_plain(model)
        at = tuple(np.array(places).T)
        scores["per_byte"][at] = -losses.nats / np.maximum(losses.num_bytes, 1)
        scores["per_token"][at] = -losses.nats / np.maximum(losses.num_targets, 1)
    right = np.array([one.index for one in task.questions])
    rights = {name: found.argmax(1) == right for name, found in scores.items()}
    return TaskResult("choice", rights, is_asked)


def _answered(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def _without_end(conversation: Conversation, tokenizer: Tokenizer, template: Template) -> Rendered:
    """A rendered answer of which only the words count: how a template ends an answer says nothing about the choice."""
    row = render(conversation, tokenizer, template)
    is_target: Sequence[bool] = [
        is_learned and token_id not in tokenizer.special_ids
        for token_id, is_learned in zip(row.ids, row.is_target, strict=True)
    ]
    return Rendered(row.ids, list(is_target), row.num_target_bytes)
