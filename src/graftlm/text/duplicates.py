"""Duplicates: rows said before, exactly or nearly, and rows that give away what is held out.

Owns what counts as the same. Does not know files, tokens or splits: `corpus` says what is compared with what. Near
means a Jaccard similarity of five-character shingles at or above a threshold; MinHash finds the candidates, the
shingles themselves decide, so that nothing is dropped on an estimate.

Shapes: K candidates, N texts, P permutations.

Source: Broder, "On the resemblance and containment of documents", 1997; `rensa` for MinHash and its index.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from graftlm.run import progress
from graftlm.text.dialogue import Conversation, Message
from graftlm.text.tally import Tally

NUM_PERMUTATIONS = 128
SHINGLE_CHARS = 5
MISSED_SHARE = 0.002
"""How many of the pairs just at the threshold the index may fail to find."""

MAX_CLOSE_LOOKS = 10
"""Texts that share a long frame are all candidates of each other: only the most alike are looked at closely."""

# The estimate's standard deviation is at most sqrt(0.25 / 128) = 0.044: below three of them, no need to look closer.
_ESTIMATE_SLACK = 0.13
_END_MARKS = "。.?？!！ "


def drop_exact_duplicates(conversations: Sequence[Conversation], dropped: Tally) -> list[Conversation]:
    """The conversations without those said before word for word."""
    seen: set[bytes] = set()
    kept = []
    for conversation in conversations:
        mark = _mark(conversation.messages)
        if mark in seen:
            dropped.add("exact duplicate", conversation.source)
            continue
        seen.add(mark)
        kept.append(conversation)
    return kept


def drop_near_duplicates(
    conversations: Sequence[Conversation], heldout: Sequence[Conversation], threshold: float, dropped: Tally
) -> list[Conversation]:
    """The conversations without those near to an earlier one that is kept, or to a held-out one."""
    index = _NearIndex(threshold)
    for conversation in heldout:
        index.insert(conversation.text, "also held out")
    kept = []
    for conversation in progress(conversations, len(conversations), "near duplicates"):
        reason = index.nearest(conversation.text)
        if reason:
            dropped.add(reason, conversation.source)
        else:
            index.insert(conversation.text, "near duplicate")
            kept.append(conversation)
    return kept


def drop_heldout(
    conversations: Sequence[Conversation], heldout: Sequence[Conversation], dropped: Tally
) -> list[Conversation]:
    """The conversations in which no held-out question is asked, its earlier turns being the same.

    Case, width, blanks and the last mark do not make another question; the answer does not matter.
    """
    asked = {_question(conversation.messages[:-1]) for conversation in heldout}
    kept = []
    for conversation in conversations:
        if any(question in asked for question in _questions(conversation)):
            dropped.add("also held out", conversation.source)
        else:
            kept.append(conversation)
    return kept


class _NearIndex:
    """Texts by what they share; each stands there under the reason for which a text near to it is dropped."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

        rows = rows_per_band(threshold)
        bands = NUM_PERMUTATIONS // rows
        self._threshold = threshold
        self._num_permutations = rows * bands  # rensa wants a number that the bands divide
        self._index = RMinHashLSH(threshold=threshold, num_perm=self._num_permutations, num_bands=bands)
        self._digests = array("I")
        self._known: list[tuple[str, str]] = []
        self._last: tuple[str, Any] = ("", None)

    def insert(self, text: str, reason: str) -> None:
        """Know `text` from now on."""
        minhash = self._minhash(text)
        self._index.insert(len(self._known), minhash)
        self._known.append((text, reason))
        self._digests.extend(minhash.digest())

    def nearest(self, text: str) -> str:
        """The reason of a known text that `text` is near to; empty when there is none."""
        minhash = self._minhash(text)
        own: set[str] | None = None
        for place in self._candidates(minhash.digest(), self._index.query(minhash)):
            own = set(shingles(text)) if own is None else own
            other, reason = self._known[place]
            theirs = set(shingles(other))
            if len(own & theirs) >= self._threshold * len(own | theirs):
                return reason
        return ""

    def _minhash(self, text: str) -> Any:
        """A text is asked for and then inserted: its hash is made once."""
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

        if self._last[1] is None or self._last[0] != text:
            minhash = RMinHash(num_perm=self._num_permutations, seed=0)
            minhash.update(shingles(text))
            self._last = (text, minhash)
        return self._last[1]

    def _candidates(self, digest: list[int], places: list[int]) -> list[int]:
        """Those of `places` worth a closer look, most alike first."""
        if not places:
            return []
        found_K = np.sort(np.asarray(places))
        digests_NP = np.frombuffer(self._digests, np.uint32).reshape(-1, self._num_permutations)
        estimates_K = (digests_NP[found_K] == np.asarray(digest, np.uint32)).mean(1)
        order_K = np.argsort(-estimates_K, kind="stable")[:MAX_CLOSE_LOOKS]
        return found_K[order_K[estimates_K[order_K] >= self._threshold - _ESTIMATE_SLACK]].tolist()


def rows_per_band(threshold: float) -> int:
    """The longest band that finds all but MISSED_SHARE of the pairs at `threshold`: 1 - (1 - s^rows)^bands.

    Source: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4.
    """
    for rows in range(NUM_PERMUTATIONS // 4, 1, -1):
        if (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) <= MISSED_SHARE:
            return rows
    return 1


def shingles(text: str) -> list[str]:
    """Every five characters in a row; a shorter text is one shingle."""
    return [text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1))]


def _mark(messages: Sequence[Message]) -> bytes:
    text = "\x1f".join(f"{m.role}\x1e{m.content}\x1e{m.input}" for m in messages)
    return hashlib.sha256(text.encode()).digest()


def _questions(conversation: Conversation) -> Iterator[bytes]:
    """What each answer of a conversation was asked: all that came before it."""
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            yield _question(conversation.messages[:i])


def _question(messages: Sequence[Message]) -> bytes:
    said = [f"{m.content}\x1e{m.input}" for m in messages]
    text = "\x1f".join("".join(unicodedata.normalize("NFKC", one).casefold().split()) for one in said)
    return hashlib.sha256(text.rstrip(_END_MARKS + "\x1e").encode()).digest()
