"""Judging a finished road: held-out figures at every stop, samples, and questions with exactly one right answer.

Owns what is measured and how samples are picked: by a rule, never by their result. Does not know how they
are shown (`report.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.errors import UserError
from graftlm.release.evaluate import compression_of, evaluate_conversations, mark_of
from graftlm.run import progress, say, write_json
from graftlm.talk.generate import Chatbot, Sampling
from graftlm.text.dialogue import Conversation, Message
from graftlm.text.rows import TokenRows
from graftlm.text.templates import Template
from graftlm.text.texts import read_lines
from graftlm.text.tokenizer import Tokenizer

RULE = "in the order of the sha256 of their ids, one of each kind, at least one that needs the turns before it."


def judge_states(
    states: Iterable[tuple[str, Any, Tokenizer]],
    num_states: int,
    conversations: Mapping[str, Sequence[Conversation]],
    template: Template,
    device: torch.device,
    num_samples: int,
    max_answer_tokens: int,
    out: Path,
) -> None:
    """Judge every state of the road, each loaded once, and write heldout.json, samples.json and compression.json.

    heldout.json: figures by state and language, and the change of each against the first state (the base), in percent.
    samples.json: the answers of every state to the same `num_samples` questions of each language.
    compression.json: how far each state's tokenizer goes on the held-out dialogues, where it changes.
    """
    picked = [c for said in conversations.values() for c in sorted(said, key=lambda c: mark_of(c.text))[:num_samples]]
    samples = [
        {
            "language": c.language,
            "prompt": [{"role": m.role, "content": _whole(m)} for m in c.messages[:-1]],
            "reference": c.messages[-1].content,
            "answers": {},
        }
        for c in picked
    ]
    heldout: list[dict[str, Any]] = []
    compression: dict[str, dict[str, Any]] = {}
    measured: set[str] = set()
    for name, model, tokenizer in progress(states, num_states, "states judged"):
        say(f"held-out: {name}")
        heldout.append(_figures(name, model, tokenizer, template, conversations, device, heldout[:1]))
        if picked:
            answers = Chatbot(model, tokenizer, template).answer_many(
                [_asked(c) for c in picked], Sampling(max_tokens=max_answer_tokens), f"samples, {name}"
            )
            for sample, answer in zip(samples, answers, strict=True):
                sample["answers"][name] = answer.text
        if tokenizer.fingerprint not in measured:
            measured.add(tokenizer.fingerprint)
            compression[name] = {language: compression_of(tokenizer, said) for language, said in conversations.items()}
    write_json(out / "heldout.json", heldout)
    write_json(out / "samples.json", samples)
    write_json(out / "compression.json", compression)


def _figures(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Mapping[str, Sequence[Conversation]],
    device: torch.device,
    first: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    state: dict[str, Any] = {"state": name}
    for language, said in conversations.items():
        figures = asdict(
            evaluate_conversations(model, tokenizer, template, said, device, f"held-out, {name}, {language} language")
        )
        before = first[0][language]["bits_per_byte"] if first else figures["bits_per_byte"]
        figures["change_percent"] = 100 * (figures["bits_per_byte"] / before - 1)
        state[language] = figures
    return state


def learned_answers(rows: TokenRows, tokenizer: Tokenizer) -> Iterator[str]:
    """Every answer that the rows teach, spaces stripped; the same one as often as it is taught."""
    for number in range(len(rows)):
        ids, is_target = rows.row(number)
        borders = np.flatnonzero(np.diff(np.r_[False, is_target, False]))
        for start, end in zip(borders[::2], borders[1::2], strict=True):
            said = [piece_id for piece_id in ids[start:end].tolist() if piece_id not in tokenizer.special_ids]
            yield tokenizer.decode_continuation(said).strip()


def answer_exact(
    chatbot: Chatbot,
    questions: str | Path,
    num_shown: int,
    max_answer_tokens: int,
    out: Path,
    learned: Iterable[str] = (),
) -> dict[str, Any]:
    """Answer every question of a JSONL file (messages; the last is the one right answer) at temperature 0.

    Exact means equal after stripping spaces. Kinds marked `"learnable": false` are counted apart. How many right
    answers are among those `learned` is counted too: there the fact is known, and the wording of the question new.
    Raises UserError for a row that is no such question.
    """
    rows = [
        _question(line, f"{questions}:{n}") for n, line in enumerate(read_lines(Path(questions)), 1) if line.strip()
    ]
    asked = [_asked(Conversation(tuple(Message(m["role"], m["content"]) for m in row["messages"]))) for row in rows]
    answers = chatbot.answer_many(asked, Sampling(max_tokens=max_answer_tokens), "questions")
    kinds: dict[str, dict[str, Any]] = {}
    for row, answer in zip(rows, answers, strict=True):
        row["answer"] = answer.text
        row["is_exact"] = answer.text.strip() == row["messages"][-1]["content"].strip()
        kind = kinds.setdefault(row["kind"], {"asked": 0, "exact": 0, "learnable": row["learnable"]})
        kind["asked"] += 1
        kind["exact"] += row["is_exact"]
    learnable = [row for row in rows if row["learnable"]]
    right = [row["messages"][-1]["content"].strip() for row in learnable]
    known = set(right).intersection(learned)
    result = {
        "num_asked": len(rows),
        "num_exact": sum(row["is_exact"] for row in rows),
        "num_learnable": len(learnable),
        "num_exact_learnable": sum(row["is_exact"] for row in learnable),
        "num_learned_answers": sum(answer in known for answer in right),
        "kinds": kinds,
        "rule": RULE,
        "shown": _pick_shown(learnable, num_shown),
    }
    write_json(out / "questions.json", result)
    return result


def _pick_shown(rows: Sequence[dict[str, Any]], num_shown: int) -> list[dict[str, Any]]:
    by_mark = sorted(rows, key=lambda row: mark_of(str(row["id"])))
    follow_up = next((row for row in by_mark if len(row["messages"]) > 2), None)
    shown = [follow_up] if follow_up and num_shown else []
    for row in by_mark:
        if len(shown) < num_shown and row["kind"] not in {one["kind"] for one in shown}:
            shown.append(row)
    return shown[1:] + shown[:1] if follow_up else shown


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        messages = row["messages"]
        if len(messages) < 2 or not all(isinstance(m["role"] + m["content"], str) for m in messages):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{where}: no question with an answer.", 'Write {"id", "kind", "messages": [...]} on each line.'
        ) from None
    return {
        "id": row.get("id", where),
        "kind": row.get("kind", "questions"),
        "learnable": row.get("learnable", True),
        "messages": messages,
    }


def _asked(conversation: Conversation) -> Conversation:
    return Conversation(conversation.messages[:-1], conversation.source, conversation.language)


def _whole(message: Message) -> str:
    return "\n".join(filter(None, (message.content, message.input)))
