"""The two engines that turn text into ids: `tokenizers` and SentencePiece.

Owns how each library is called so that control tokens in a text stay text, and how an id becomes bytes.
Does not know folders, grafts or which control token means what; `tokenizer.Tokenizer` puts those on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import sentencepiece
from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError
from graftlm.text.tokenizer.sentencepiece_bpe import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    ModelProto,
    without_prefix,
)


class Engine(Protocol):
    """What both engines can do. Ids are ints below `num_pieces`; no method adds control tokens."""

    num_pieces: int
    special_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, piece_id: int) -> str: ...
    def token_bytes(self, piece_id: int) -> bytes: ...
    def definition(self) -> str: ...


def _byte_of_visible_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes. Source: openai/gpt-2, encoder.py, bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    shifted = 256
    for byte in range(256):
        if byte not in printable:
            table[chr(shifted)] = byte
            shifted += 1
    return table


BYTE_OF_CHAR = _byte_of_visible_char()
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def refuse_surrogates(texts: Iterable[str], error: Exception) -> None:
    """Raise a UserError naming the first lone surrogate in `texts`; raise `error` again if there is none."""
    for text in texts:
        for position, char in enumerate(text):
            if "\ud800" <= char <= "\udfff":
                raise UserError(
                    f"A text holds the lone surrogate {char!r} at character {position}; "
                    "only whole Unicode text can be encoded.",
                    "Read the source as UTF-8 (errors='replace'), or drop the row.",
                ) from error
    raise error


class FastEngine:
    """Encodes with a `tokenizers` tokenizer."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._parts: dict[str, Any] = json.loads(fast.to_str())
        self.fast = fast
        self.fast.encode_special_tokens = True  # "</s>" in a text stays text
        self.fast.no_truncation()
        self.fast.no_padding()
        self._continuation = self._without_prefix()
        vocabulary = fast.get_vocab(with_added_tokens=True)
        self.num_pieces = max(vocabulary.values()) + 1
        added = {token["id"]: token for token in self._parts["added_tokens"]}
        self._bytes: dict[int, bytes] = {}
        self._added = {piece_id: token["content"] for piece_id, token in added.items()}
        self.special_ids = frozenset(piece_id for piece_id, token in added.items() if token["special"])
        decoder = json.dumps(self._parts["decoder"])
        self.is_byte_level = '"ByteLevel"' in decoder
        self._has_byte_pieces = '"ByteFallback"' in decoder

    def _without_prefix(self) -> FastTokenizer:
        """The tokenizer that puts no space before a text: itself where it puts none."""
        parts = _without_leading_space(self._parts)
        if all(parts[stage] == self._parts[stage] for stage in ("normalizer", "pre_tokenizer")):
            return self.fast
        continuation = FastTokenizer.from_str(json.dumps(parts))
        continuation.encode_special_tokens = True
        return continuation

    @property
    def parts(self) -> dict[str, Any]:
        """The tokenizer.json, parsed. Read only."""
        return self._parts

    def encode(self, text: str) -> list[int]:
        """Ids of a text standing by itself."""
        try:
            return self.fast.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            refuse_surrogates([text], error)
            raise

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows a newline: no space is put before it."""
        try:
            return self._continuation.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            refuse_surrogates([text], error)
            raise

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_continuation` of each text."""
        try:
            found = self._continuation.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            refuse_surrogates(texts, error)
            raise
        return [one.ids for one in found]

    def encode_words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """`encode_continuation` of each text, cut into the words that the pre-tokenizer makes of it."""
        cut = []
        for found in self._continuation.encode_batch(list(texts), add_special_tokens=False):
            ids, numbers = found.ids, found.word_ids
            if ids and numbers[0] == numbers[-1]:
                cut.append([ids])
                continue
            words: dict[int | None, list[int]] = {}
            for piece_id, number in zip(ids, numbers, strict=True):
                words.setdefault(number, []).append(piece_id)
            cut.append(list(words.values()))
        return cut

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, each standing by itself."""
        try:
            return [found.ids for found in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            refuse_surrogates(texts, error)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def piece(self, piece_id: int) -> str:
        """The piece of an id as the vocabulary spells it. Raises IndexError for an id without a piece."""
        piece = self.fast.id_to_token(piece_id)
        if piece is None:
            raise IndexError(f"id {piece_id} has no piece; ids run below {self.num_pieces}")
        return piece

    def token_bytes(self, piece_id: int) -> bytes:
        """The UTF-8 bytes an id stands for; none for a control token."""
        found = self._bytes.get(piece_id)
        if found is None:
            found = self._bytes[piece_id] = self._spell(piece_id)
        return found

    def _spell(self, piece_id: int) -> bytes:
        if piece_id in self.special_ids:
            return b""
        if piece_id in self._added:
            return self._added[piece_id].encode()
        piece = self.piece(piece_id)
        if self.is_byte_level:
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        if self._has_byte_pieces:
            return bytes_of_piece(piece)
        return self.decode([piece_id]).encode()

    def definition(self) -> str:
        """Everything that decides how a text is encoded, as one string."""
        parts = {key: self._parts[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return json.dumps(parts, sort_keys=True, ensure_ascii=False)


class SentencePieceEngine:
    """Encodes with SentencePiece itself: the only exact engine for a model whose scores tie."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(model).SerializeToString())
        self.num_pieces = len(model.pieces)
        self.special_ids = frozenset(
            index for index, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text standing by itself."""
        try:
            return self._processor.encode(text)
        except RuntimeError as error:
            refuse_surrogates([text], error)
            raise

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows a newline: no space is put before it."""
        try:
            return self._continuation.encode(text)
        except RuntimeError as error:
            refuse_surrogates([text], error)
            raise

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_continuation` of each text."""
        return [self.encode_continuation(text) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, each standing by itself."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        return self._processor.decode([piece_id for piece_id in ids if piece_id not in self.special_ids])

    def piece(self, piece_id: int) -> str:
        """The piece of an id as the vocabulary spells it. Raises IndexError for an id without a piece."""
        if not 0 <= piece_id < self.num_pieces:
            raise IndexError(f"id {piece_id} has no piece; ids run below {self.num_pieces}")
        return self.model.pieces[piece_id].piece

    def token_bytes(self, piece_id: int) -> bytes:
        """The UTF-8 bytes an id stands for; none for a control token."""
        piece = self.piece(piece_id)
        if piece_id in self.special_ids:
            return b""
        return bytes_of_piece(piece) if self.model.pieces[piece_id].type == BYTE else _spaced(piece)

    def definition(self) -> str:
        """Everything that decides how a text is encoded, as one string."""
        pieces = [(piece.piece, piece.score, piece.type) for piece in self.model.pieces]
        return json.dumps([pieces, self.model.trainer_spec.model_type, str(self.model.normalizer_spec)])


def bytes_of_piece(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `<0xE5>` is one byte, `▁ab` is " ab"."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return _spaced(piece)


def _spaced(piece: str) -> bytes:
    return piece.replace(SPACE, " ").encode()


def _without_leading_space(parts: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parsed tokenizer.json that puts no space before the text."""
    stages = {key: json.loads(json.dumps(parts[key])) for key in ("normalizer", "pre_tokenizer")}
    copy = {**parts, **stages, "post_processor": None}

    def strip(stage: dict[str, Any] | None) -> dict[str, Any] | None:
        if stage is None or stage["type"] == "Prepend":
            return None
        if stage["type"] == "Sequence":
            key = "normalizers" if "normalizers" in stage else "pretokenizers"
            stage[key] = [kept for kept in map(strip, stage[key]) if kept is not None]
        if stage["type"] == "Metaspace":
            stage["prepend_scheme"] = "never"
        if stage["type"] == "ByteLevel":
            stage["add_prefix_space"] = False
        return stage

    copy["normalizer"] = strip(copy["normalizer"])
    copy["pre_tokenizer"] = strip(copy["pre_tokenizer"])
    return copy
