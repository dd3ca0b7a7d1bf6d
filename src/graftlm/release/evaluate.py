"""Held-out figures: loss per answer token and bits per byte with 95 % intervals, tasks, and speed; `graftlm eval`.

Owns how figures are made from losses by row, and what is measured of one model on one file. Bits per byte compare
models whose tokenizers differ; losses per token do not. Does not know runs, reports or how models are compared.

Shapes: D dialogues.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.device import Precision, pick_device
from graftlm.errors import UserError
from graftlm.model.causal import body_of, load_causal, parameter_count
from graftlm.model.packed import attend_packed, attend_plain
from graftlm.release.intervals import Interval, ratio_interval
from graftlm.release.tasks import Task, TaskResult, answer_task, choose, is_task_file, read_task
from graftlm.run import progress
from graftlm.talk.generate import Answer, Chatbot, find_speaker, ready_for_talking
from graftlm.talk.sampling import Sampling
from graftlm.text.corpus import read_conversations
from graftlm.text.dialogue import Conversation, Rendered, render_many, rows_of
from graftlm.text.rows import RowsBuilder
from graftlm.text.templates import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.heldout import heldout_losses

BUDGET_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Figures:
    """One model on one set. Intervals are 95 %, by the bootstrap over dialogues.

    `interval` is that of bits per byte. `num_left_out` counts rows longer than the model's context or refused by its
    template.
    """

    bits_per_byte: float
    loss_per_answer_token: float
    interval: Interval
    num_rows: int
    num_answer_tokens: int
    num_left_out: int
    loss_interval: Interval


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model makes of D dialogues: loss of their answers (nats), answer tokens and answer bytes, each (D,).

    `is_whole_D`: every row of the dialogue was judged. `seconds` is the time of the forward passes over `num_tokens`
    tokens, prompts included.
    """

    nats_D: np.ndarray
    num_targets_D: np.ndarray
    num_bytes_D: np.ndarray
    is_whole_D: np.ndarray
    num_rows: int
    num_left_out: int
    num_tokens: int
    seconds: float

    def figures(self) -> Figures:
        """The figures of all rows that were judged."""
        return Figures(
            float(self.nats_D.sum() / math.log(2) / max(self.num_bytes_D.sum(), 1)),
            float(self.nats_D.sum() / max(self.num_targets_D.sum(), 1)),
            ratio_interval(self.nats_D / math.log(2), self.num_bytes_D),
            self.num_rows,
            int(self.num_targets_D.sum()),
            self.num_left_out,
            ratio_interval(self.nats_D, self.num_targets_D),
        )


@dataclass(frozen=True, slots=True)
class Dialogues:
    """A file of held-out dialogues: those with an answer to judge by, and what was dropped by reason."""

    conversations: tuple[Conversation, ...]
    dropped: dict[str, int]


class Candidate:
    """A model that is judged. Raises UserError for a folder that is broken, foreign or half-written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder, self.tokenizer, self.template = find_speaker(name)
        self.device = pick_device("auto")

    @cached_property
    def model(self) -> Any:
        """The model in float32, as its losses are measured."""
        model: Any = load_causal(self.folder)
        return model.to(self.device)

    @cached_property
    def chatbot(self) -> Chatbot:
        """The model as it talks; it is not for scoring any more."""
        return Chatbot(ready_for_talking(self.model, self.device), self.tokenizer, self.template)

    @property
    def num_parameters(self) -> int:
        """Numbers the model holds, a tied matrix counted once."""
        return parameter_count(self.model)

    def release(self) -> None:
        """Let go of the model's memory; it is loaded again where it is needed again."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("chatbot", None)


Data = Dialogues | Task
"""What a file given as `--data` holds."""


def read_data(files: Sequence[str]) -> dict[str, Data]:
    """Dialogues or tasks by file. Raises UserError for a file that is missing, foreign, empty, or named twice."""
    twice = next((name for place, name in enumerate(files) if name in files[:place]), None)
    if twice is not None:
        raise UserError(f"--data names {twice} twice.", "Name each file once.")
    return {name: read_task(Path(name)) if is_task_file(name) else _read_dialogues(name) for name in files}


def _read_dialogues(name: str) -> Dialogues:
    conversations, dropped = read_conversations(name)
    answered = tuple(c for c in conversations if c.num_answers and c.messages[0].role != "text")
    if not answered:
        lost = ", ".join(f"{reason}: {count}" for reason, count in dropped.counts.items())
        raise UserError(
            f"{name} holds no dialogue with an answer to judge by{f' ({lost})' if lost else ''}.",
            f"Look: graftlm data {name}",
        )
    return Dialogues(answered, dropped.counts)


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on one file: what is told of it, what it is made of, and the answers to the questions picked."""

    told: dict[str, Any]
    scores: Scores | TaskResult
    answers: tuple[str, ...] = ()


def evaluate_files(
    model: str, files: Sequence[str], num_questions: int = 4, max_answer_tokens: int = 64
) -> dict[str, Any]:
    """Figures of a model by file; `num_questions` of each file of dialogues are answered, for the speed.

    Raises UserError for a broken model folder or unusable files.
    """
    read = read_data(files)  # before the model: a wrong name is told at once
    measured = measure(Candidate(model), read, num_questions, max_answer_tokens)
    return {name: one.told for name, one in measured.items()}


def measure(
    candidate: Candidate, read: Mapping[str, Data], num_questions: int, max_answer_tokens: int
) -> dict[str, Measured]:
    """All that is measured of a model, by file. Raises UserError where a file holds nothing it can be judged by."""
    scores: dict[str, Scores | TaskResult] = {}
    for name, data in read.items():  # before anything is said: for talking the model is laid out anew
        label = f"{candidate.name}, {Path(name).name}"
        if isinstance(data, Dialogues):
            scores[name] = score_conversations(
                candidate.model, candidate.tokenizer, candidate.template, data.conversations, candidate.device, label
            )
        elif data.has_choices:
            scores[name] = choose(
                candidate.model, candidate.tokenizer, candidate.template, data, candidate.device, label
            )
    found: dict[str, Measured] = {}
    for name, data in read.items():
        if isinstance(data, Task):
            result = scores.get(name)
            if not isinstance(result, TaskResult):
                result = answer_task(candidate.chatbot, data, max_answer_tokens)
            found[name] = Measured(result.told(), result, result.answers)
            continue
        scored = scores[name]
        assert isinstance(scored, Scores)
        answers, speed = answer_timed(
            candidate.chatbot, pick_questions(data.conversations, num_questions), max_answer_tokens
        )
        told = {
            **asdict(scored.figures()),
            "dropped": data.dropped,
            **compression_of(candidate.tokenizer, data.conversations),
            "scoring_tokens_per_second": scored.num_tokens / max(scored.seconds, 1e-9),
            "answer_tokens_per_second": speed,
        }
        found[name] = Measured(told, scored, answers)
    return found


def evaluate_conversations(
    model: Any,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    device: torch.device,
    label: str = "held-out",
) -> Figures:
    """Figures of a model on conversations, rendered with the model's own tokenizer; answers and their ends count."""
    return score_conversations(model, tokenizer, template, conversations, device, label).figures()


def score_conversations(
    model: Any,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    device: torch.device,
    label: str = "held-out",
) -> Scores:
    """Losses by dialogue, rendered with the model's own tokenizer. Raises UserError where no row can be judged."""
    builder = RowsBuilder(tokenizer.num_pieces)
    rows = [(place, row) for place, one in enumerate(conversations) for row in rows_of(one, template)]
    longest = model.config.max_position_embeddings
    places: list[int] = []
    is_whole_D = np.ones(len(conversations), dtype=bool)
    rendered_rows = render_many([row for _, row in rows], tokenizer, template)
    for (place, _), rendered in zip(rows, rendered_rows, strict=True):
        if isinstance(rendered, Rendered) and len(rendered.ids) <= longest:
            builder.add(rendered, "")
            places.append(place)
        else:
            is_whole_D[place] = False
    if not places:
        raise UserError(
            f"Each of the {len(rows)} rows is longer than the model's {longest} positions, or refused by its template.",
            "Give shorter dialogues; graftlm data FILE --tokenizer MODEL --show 3 shows them.",
        )
    body: Any = body_of(model)
    attend_packed(body)
    began = time.perf_counter()
    losses = heldout_losses(model, builder.rows(), Precision(torch.float32, device, None), BUDGET_TOKENS, label)
    seconds = time.perf_counter() - began
    attend_plain(model)

    def by_dialogue(values: np.ndarray) -> np.ndarray:
        return np.bincount(places, weights=values, minlength=len(conversations))

    return Scores(
        by_dialogue(losses.nats), by_dialogue(losses.num_targets), by_dialogue(losses.num_bytes), is_whole_D,
        len(places), len(rows) - len(places), int(builder.rows().num_tokens), seconds,
    )  # fmt: skip


def compression_of(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> dict[str, float]:
    """Characters and UTF-8 bytes a token, over all that is said in the conversations."""
    texts = [message.content for conversation in conversations for message in conversation.messages]
    num_tokens = sum(map(len, tokenizer.encode_continuations(texts)))
    return {
        "chars_per_token": sum(map(len, texts)) / max(num_tokens, 1),
        "bytes_per_token": sum(len(text.encode()) for text in texts) / max(num_tokens, 1),
    }


def mark_of(text: str) -> str:
    """By which questions are picked: never by what comes of them."""
    return hashlib.sha256(text.encode()).hexdigest()


def pick_questions(conversations: Sequence[Conversation], number: int) -> list[Conversation]:
    """The dialogues whose last answer the models give themselves: the first by the sha256 of their words."""
    ending_in_answers = (c for c in conversations if c.messages[-1].role == "assistant" and len(c.messages) > 1)
    return sorted(ending_in_answers, key=lambda c: mark_of(c.text))[:number]


def answer_timed(
    chatbot: Chatbot, conversations: Sequence[Conversation], max_answer_tokens: int
) -> tuple[tuple[str, ...], float | None]:
    """The model's own last answers, one after another with the likeliest piece each time; and its tokens a second.

    A question that does not fit the model's context is answered with nothing.
    """
    sampling = Sampling(max_tokens=max_answer_tokens)
    answers: list[Answer] = []
    began = time.perf_counter()
    for asked in progress(conversations, len(conversations), "answers"):
        question = Conversation(asked.messages[:-1], asked.source, asked.language)
        try:
            answers.append(chatbot.answer(question, sampling))
        except UserError:
            answers.append(Answer("", 0, 0))
    seconds, num_said = time.perf_counter() - began, sum(answer.answer_tokens for answer in answers)
    return tuple(answer.text for answer in answers), num_said / seconds if num_said else None
