"""Somebody else's pieces, filtered for a graft: of the script, closed over characters.

Owns reading an inventory in any of its forms and which of its pieces may be taken. Does not know how they are grafted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex

from graftlm.errors import UserError
from graftlm.text.texts import read_lines
from graftlm.text.tokenizer.engines import BYTE_OF_CHAR
from graftlm.text.tokenizer.learn import SPACED_SHARE, num_chars
from graftlm.text.tokenizer.script import Script
from graftlm.text.tokenizer.sentencepiece_bpe import NORMAL, SPACE, read_model
from graftlm.text.tokenizer.tokenizer import FAST_FILE, MODEL_FILE, Tokenizer

_BYTE_PIECE = regex.compile(r"<0x[0-9A-F]{2}>")


def read_inventory(path: str | Path) -> list[str]:
    """The pieces of a SentencePiece model, a tokenizer.json, a folder with either, or a list of one piece a line.

    In the file's order, best first; a space is a space however the file writes it. Control tokens, bytes and parts of
    characters are left out. Raises UserError for a missing or foreign file.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in (MODEL_FILE, FAST_FILE) if (file / name).is_file()), file / MODEL_FILE)
    if file.suffix == ".model":
        return [piece.piece.replace(SPACE, " ") for piece in read_model(file).pieces if piece.type == NORMAL]
    if file.suffix != ".json":
        return list(dict.fromkeys(line for line in read_lines(file) if line.strip()))
    try:
        parts = json.loads("\n".join(read_lines(file)))
        special = {token["content"] for token in parts.get("added_tokens") or ()}
        pieces = _pieces_in_order(parts["model"]["vocab"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not a whole tokenizer.json ({type(error).__name__}: {error}).",
            "Give a tokenizer.model, a tokenizer.json, or a text file with one piece a line.",
        ) from None
    is_byte_level = '"ByteLevel"' in json.dumps(parts.get("decoder")) + json.dumps(parts.get("pre_tokenizer"))
    kept = [piece for piece in pieces if piece not in special and not _BYTE_PIECE.fullmatch(piece)]
    texts = map(_text_of_bytes, kept) if is_byte_level else (p.removeprefix("##").replace(SPACE, " ") for p in kept)
    return [text for text in dict.fromkeys(texts) if text]


def _pieces_in_order(vocabulary: Any) -> list[str]:
    """BPE and WordPiece hold {piece: id}, Unigram [[piece, score], …]."""
    if isinstance(vocabulary, dict):
        return sorted(vocabulary, key=vocabulary.__getitem__)
    return [piece for piece, _ in vocabulary]


def _text_of_bytes(piece: str) -> str:
    try:
        return bytes(BYTE_OF_CHAR[char] for char in piece).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def filter_pieces(
    old: Tokenizer,
    pieces: Sequence[str],
    script: Script,
    max_chars: int | None,
    leading_space: str,
    dropped: dict[str, int],
) -> list[str]:
    """The pieces worth taking, new to the base, best first; the others are counted in `dropped` by reason.

    A piece holds at least one character of the script, no space but one before it where the language sets words apart
    (`leading_space`: auto, always, never), and only characters that are the script's or have a piece in the base.
    """
    known = {old.token_bytes(piece_id) for piece_id in old.piece_ids}
    of_script = [piece for piece in pieces if script.occurs_in(piece)]
    dropped["without a character of the script"] = len(pieces) - len(of_script)
    num_spaced = sum(piece.startswith(" ") for piece in of_script)
    takes_space = leading_space == "always" or (
        leading_space == "auto" and num_spaced > SPACED_SHARE * max(1, len(of_script))
    )
    kept = []
    for piece in of_script:
        if piece.encode() in known:
            reason = "already there"
        elif any(char.isspace() for char in (piece[1:] if takes_space and piece[0] == " " else piece)):
            reason = "with a space"
        elif max_chars is not None and num_chars(piece.encode()) > max_chars:
            reason = "too long"
        elif not all(script.character.match(char) or char.encode() in known for char in piece):
            reason = "with a foreign character that the base lacks"
        else:
            kept.append(piece)
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    return kept


def missing_characters(old: Tokenizer, pieces: Sequence[str]) -> list[str]:
    """Characters of the pieces, in order of first sight, that the base spells by several ids."""
    characters = list(dict.fromkeys(char for piece in pieces for char in piece))
    spelled = old.encode_continuations(characters)
    return [char for char, ids in zip(characters, spelled, strict=True) if len(ids) > 1]
