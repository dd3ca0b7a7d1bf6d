"""Duplicates: dialogues said before word for word, and those that give away what is held out.

Owns what counts as the same; what is nearly the same lies in `near.py`. Does not know files, tokens or splits: `corpus`
says what is compared with what.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from graftlm.text.dialogue import Conversation, Message
from graftlm.text.piles import Piles, same_as_before
from graftlm.text.shelf import CHUNK, STILL_THERE, Fate, Shelf

_END_MARKS = "。.?？!！ "
# 128 bits of a digest: among ten thousand million dialogues two different ones share them with a chance of 1e-19.
_MARK = np.dtype([("high", ">u8"), ("low", ">u8")])
_MARKED = np.dtype([("high", np.uint64), ("low", np.uint64), ("place", np.int64)])


class Marks:
    """What the dialogues of a shelf say, 16 bytes each, on disk."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._piles = Piles(shelf.folder / "marks", _MARKED)
        self._recent = bytearray()
        self._num_written = 0

    def add(self, conversation: Conversation) -> None:
        """Mark the dialogue that is put on the shelf next."""
        self._recent += _mark(conversation.messages)
        if len(self._recent) >= CHUNK * _MARK.itemsize:
            self._write()

    def _write(self) -> None:
        marks = np.frombuffer(bytes(self._recent), _MARK)
        records = np.empty(len(marks), _MARKED)
        records["high"], records["low"] = marks["high"], marks["low"]
        records["place"] = np.arange(self._num_written, self._num_written + len(marks))
        self._piles.add((records["high"] >> np.uint64(56)).astype(np.int64), records)
        self._num_written += len(marks)
        self._recent.clear()

    def drop_duplicates(self) -> None:
        """Drop what was said before word for word: among what is learned, and among what is held out."""
        self._write()
        fates = self._shelf.fates
        for records in self._piles:
            records = records[np.isin(fates[records["place"]], STILL_THERE)]
            columns = (records["low"], records["high"], fates[records["place"]])
            order = np.lexsort((records["place"], *columns))
            is_said_N = same_as_before(*(column[order] for column in columns))
            fates[records["place"][order[is_said_N]]] = Fate.DUPLICATE


def asked_in(conversations: Iterable[Conversation]) -> frozenset[bytes]:
    """What held-out dialogues ask: all but the last answer, as `gives_away` compares it."""
    return frozenset(_question(conversation.messages[:-1]) for conversation in conversations)


def gives_away(conversation: Conversation, asked: Collection[bytes]) -> bool:
    """Whether a held-out question is asked in a conversation, its earlier turns being the same.

    Case, width, blanks and the last mark do not make another question; the answer does not matter.
    """
    return any(question in asked for question in _questions(conversation))


def _mark(messages: Sequence[Message]) -> bytes:
    text = "\x1f".join(f"{m.role}\x1e{m.content}\x1e{m.input}" for m in messages)
    return hashlib.sha256(text.encode()).digest()[: _MARK.itemsize]


def _questions(conversation: Conversation) -> Iterator[bytes]:
    """What each answer of a conversation was asked: all that came before it."""
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            yield _question(conversation.messages[:i])


def _question(messages: Sequence[Message]) -> bytes:
    said = [f"{m.content}\x1e{m.input}" for m in messages]
    text = "\x1f".join("".join(unicodedata.normalize("NFKC", one).casefold().split()) for one in said)
    return hashlib.sha256(text.rstrip(_END_MARKS + "\x1e").encode()).digest()
