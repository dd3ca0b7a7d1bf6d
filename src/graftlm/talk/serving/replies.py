"""The JSON that goes back: OpenAI's objects and chunks, built from pieces of answers.

Owns the shapes of both routes, whole and streamed, usage and log-probabilities included. Does not know where pieces
come from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftlm.talk.serving.requests import ChatRequest
from graftlm.talk.serving.speech import Ask, Piece, Said, Scored


@dataclass
class Answers:
    """All choices of one request while they come."""

    texts: list[str]
    tokens: list[list[Said]]
    finishes: list[str | None]
    counts: list[int]

    @classmethod
    def none_yet(cls, count: int) -> Answers:
        """Before the first piece."""
        return cls([""] * count, [[] for _ in range(count)], [None] * count, [0] * count)

    def add(self, piece: Piece) -> None:
        """Take in one piece."""
        self.texts[piece.index] += piece.text
        self.tokens[piece.index] += piece.tokens
        self.counts[piece.index] = piece.num_tokens
        self.finishes[piece.index] = piece.finish or self.finishes[piece.index]


def usage_of(asks: Sequence[Ask], choices_per_prompt: int, answers: Answers) -> dict[str, int]:
    """Token counts of a request: each prompt counts once, each answer for itself."""
    prompt = sum(len(ask.prompt_ids) for ask in asks[::choices_per_prompt])
    answer = sum(answers.counts)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


@dataclass
class Shape:
    """The objects of one request to one of the two routes."""

    model: str
    is_chat: bool
    scores_tokens: bool
    wants_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    reply_id: str = ""
    _num_characters: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reply_id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    @classmethod
    def of(cls, request: Any, model: str) -> Shape:
        """The shape that answers this request."""
        return cls(model, isinstance(request, ChatRequest), request.num_top is not None, request.wants_usage)

    def whole(self, answers: Answers, usage: dict[str, int]) -> dict[str, Any]:
        """The object that answers a request without stream."""
        choices = []
        for index, text in enumerate(answers.texts):
            scores = self._scores(index, answers.tokens[index])
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
            )
            choices.append({"index": index, **said, "logprobs": scores, "finish_reason": answers.finishes[index]})
        return self._object("chat.completion" if self.is_chat else "text_completion", choices, usage)

    def opening(self, count: int) -> list[dict[str, Any]]:
        """The chunks before anything is said: a chat's choices tell their role."""
        if not self.is_chat:
            return []
        delta = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return [self._chunk([{"index": i, **delta, "logprobs": None, "finish_reason": None}]) for i in range(count)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of one piece: what it says, and its end."""
        scores = self._scores(piece.index, piece.tokens) if piece.tokens else None
        if not self.is_chat:
            choice = {"index": piece.index, "text": piece.text, "logprobs": scores, "finish_reason": piece.finish}
            return [self._chunk([choice])]
        found = []
        if piece.text or piece.tokens:
            delta = {"delta": {"content": piece.text}}
            found.append({"index": piece.index, **delta, "logprobs": scores, "finish_reason": None})
        if piece.finish:
            found.append({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish})
        return [self._chunk([choice]) for choice in found]

    def closing(self, usage: dict[str, int]) -> list[dict[str, Any]]:
        """The chunk behind all choices, when counts were asked for."""
        return [{**self._chunk([]), "usage": usage}] if self.wants_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk" if self.is_chat else "text_completion", choices, None)
        if not self.wants_usage:
            del chunk["usage"]
        return chunk

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        head = {"id": self.reply_id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": usage}

    def _scores(self, index: int, tokens: Iterable[Said]) -> dict[str, Any] | None:
        if not self.scores_tokens:
            return None
        if self.is_chat:
            return {"content": [_chat_scores(said) for said in tokens], "refusal": None}
        return self._text_scores(index, list(tokens))

    def _text_scores(self, index: int, tokens: list[Said]) -> dict[str, Any]:
        spelled = [_spelled(said.token) for said in tokens]
        offsets = []
        for text in spelled:
            offsets.append(self._num_characters.setdefault(index, 0))
            self._num_characters[index] += len(text)
        top = [{_spelled(scored): scored.logprob for scored in said.top} for said in tokens]
        return {
            "tokens": spelled,
            "token_logprobs": [said.token.logprob for said in tokens],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }


def _spelled(scored: Scored) -> str:
    """A token as text; what is half a character is spelled in bytes, as OpenAI does, so that no two look alike."""
    try:
        return scored.spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in scored.spelled)


def _chat_scores(said: Said) -> dict[str, Any]:
    def shape(scored: Scored) -> dict[str, Any]:
        return {"token": _spelled(scored), "logprob": scored.logprob, "bytes": list(scored.spelled)}

    return {**shape(said.token), "top_logprobs": [shape(scored) for scored in said.top]}
