"""Training a small Llama-style base tokenizer from text.

Owns the settings that make a SentencePiece BPE model behave as Llama's does. Does not know grafts. The demo's
English base and the tests stand on it; a real road starts from a base model's own tokenizer.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from graftlm.errors import UserError
from graftlm.text.tokenizer.load import tokenizer_of_model
from graftlm.text.tokenizer.sentencepiece_bpe import parse_model
from graftlm.text.tokenizer.tokenizer import Tokenizer

LONGEST_LINE_BYTES = 100_000


def train_base_tokenizer(texts: Iterable[str], num_pieces: int, folder: str | Path | None = None) -> Tokenizer:
    """Train a tokenizer as Llama's: BPE, byte fallback, single digits, text unchanged, a space put before it.

    Ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`; the 256 bytes follow. The same texts give the same pieces. With a
    `folder`, the tokenizer is saved there too.

    Raises:
        UserError: the texts are empty, or too small or too large for `num_pieces`.
    """
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError("No text to train a tokenizer on: every line is empty.", "Give files that hold text.")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=num_pieces,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=False,
            character_coverage=1.0,
            max_sentence_length=LONGEST_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"{num_pieces} pieces cannot be learned from {len(lines)} lines: {error}",
            "Choose a smaller number of pieces (above 259 and the number of characters), or give more text.",
        ) from error
    tokenizer = tokenizer_of_model(parse_model(written.getvalue(), "the trained model"))
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer
