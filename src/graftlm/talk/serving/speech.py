"""What is asked of the model and how its tokens become pieces of an answer.

Owns Ask, Piece and Speech: whole characters only, stop strings found across tokens and never half shown, tokens told
with their probabilities in step with the text. Does not know models, batches or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftlm.talk.generate import Characters
from graftlm.talk.sampling import Sampling
from graftlm.text.tokenizer import Tokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer wanted. `num_top`: how many likeliest tokens to tell at every place; None tells no probabilities."""

    prompt_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    num_top: int | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its natural log-probability."""

    spelled: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Said:
    """A token of an answer, and the likeliest ones at its place."""

    token: Scored
    top: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of the answer to the ask `index`; `num_tokens` counts all its tokens so far. The last one has a finish."""

    index: int
    text: str
    num_tokens: int
    finish: Finish | None = None
    tokens: tuple[Said, ...] = ()


class Speech:
    """The text of one answer while it comes, token by token."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._characters = Characters(tokenizer)
        self._stop = tuple(filter(None, stop))
        self._held = ""  # text that may turn out to be the beginning of a stop string
        self._num_characters = 0  # decoded so far, the held ones included
        self._tokens: list[tuple[int, Said]] = []  # not told yet, with the character each begins at

    def take(self, token_id: int, said: Said | None = None) -> tuple[str, tuple[Said, ...], bool]:
        """Text and tokens that may be shown now, and whether a stop string ended the answer."""
        if said is not None:
            self._tokens.append((self._num_characters, said))
        new = self._characters.take(token_id)
        self._num_characters += len(new)
        self._held += new
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return *self._show(min(found)), True
        num_doubtful = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return *self._show(len(self._held) - num_doubtful), False

    def rest(self) -> tuple[str, tuple[Said, ...]]:
        """What was held back, when the answer ended by itself."""
        text, tokens = self._held, tuple(said for _, said in self._tokens)
        self._held, self._tokens = "", []
        return text, tokens

    def _show(self, num_characters: int) -> tuple[str, tuple[Said, ...]]:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        num_shown = self._num_characters - len(self._held)
        tokens = tuple(said for start, said in self._tokens if start < num_shown)
        del self._tokens[: len(tokens)]
        return text, tokens


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the first ones of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
