"""A tokenizer as llama.cpp reads it, so that its ids are ours.

Owns what a GGUF file says of pieces, merges, scores, kinds, control ids and the chat template. Does not know tensors.

llama.cpp's own converter recognises a byte-level word pattern by hashing the ids of a probe text that holds Chinese:
every Chinese graft changes that hash. The name is found from the pattern itself here.
"""

from __future__ import annotations

import re
from typing import Any

from gguf import GGUFWriter, TokenType

from graftlm.errors import UserError
from graftlm.run import say
from graftlm.text.dialogue import Conversation, Message, Template, render_or_tell
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.tokenizer.engines import FastEngine
from graftlm.text.tokenizer.ranks import WORD_PATTERN
from graftlm.text.tokenizer.sentencepiece_bpe import model_type_name

_QWEN_PATTERN = WORD_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = "the pattern of GPT-2"
# By word pattern and by whether a word that is a piece is taken whole (`ignore_merges`).
# Source: ggml-org/llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load.
_PRE_TOKENIZERS = {
    (WORD_PATTERN, True): "llama-bpe",
    (WORD_PATTERN, False): "smaug-bpe",
    (_QWEN_PATTERN, False): "qwen2",
    (_GPT2, False): "gpt-2",
}
_SCORE_OF_ADDED = -1000.0  # as llama.cpp's converter gives to pieces a SentencePiece model lacks
_HF = "Export with --to hf: transformers reads this tokenizer as it is."


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, template: Template, ends: list[int]) -> None:
    """Write everything about tokens into a GGUF header; `ends` are the ids at which an answer ends.

    Raises UserError for a tokenizer that llama.cpp has no exact form of.
    """
    if tokenizer.is_byte_level:
        _add_byte_level(writer, tokenizer)
    else:
        _add_sentencepiece(writer, tokenizer)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    for role, piece_id in ids.items():
        if piece_id is not None:
            getattr(writer, f"add_{role}_token_id")(piece_id)
    for end in ends:
        if end != tokenizer.eos_id:
            writer.add_eot_token_id(end)
    # As the template begins: a model that never saw the token in front of a prompt must not see it now.
    asked = render_or_tell(Conversation((Message("user", "a"),)), tokenizer, template, for_reply=True)
    writer.add_add_bos_token(tokenizer.bos_id is not None and asked.ids[:1] == [tokenizer.bos_id])
    writer.add_add_eos_token(False)
    writer.add_chat_template(template.jinja)


def _add_sentencepiece(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    model = tokenizer.model
    if model is None:
        raise UserError(
            "The tokenizer has no tokenizer.model: without its scores llama.cpp cannot merge as it does.",
            f"Put the base's tokenizer.model beside its tokenizer.json and run again. {_HF}",
        )
    normalizer = model.normalizer_spec
    if model_type_name(model) != "BPE" or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(f"llama.cpp has no exact form of this {model_type_name(model)} SentencePiece model.", _HF)
    num_added = tokenizer.num_pieces - len(model.pieces)
    added = range(len(model.pieces), tokenizer.num_pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_pieces(tokenizer))
    writer.add_token_scores([*(piece.score for piece in model.pieces), *[_SCORE_OF_ADDED] * num_added])
    # SentencePiece's numbers for kinds of pieces are GGUF's.
    writer.add_token_types([*(piece.type for piece in model.pieces), *(_kind(tokenizer, i, True) for i in added)])
    writer.add_add_space_prefix(bool(normalizer.add_dummy_prefix))


def _add_byte_level(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer.engine, FastEngine)
    parts = tokenizer.engine.parts
    if parts["normalizer"] is not None:
        say(f"The tokenizer normalises text ({parts['normalizer'].get('type')}); llama.cpp takes it as it comes.")
    added = {token["id"] for token in parts["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(parts))
    writer.add_token_list(_pieces(tokenizer))
    writer.add_token_types([_kind(tokenizer, i, i in added) for i in range(tokenizer.num_pieces)])
    merges = parts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """Every id's piece; llama.cpp wants a name of its own for an id that stands for nothing, too."""
    return [tokenizer.piece(i) if tokenizer.has_piece(i) else f"[UNUSED{i}]" for i in range(tokenizer.num_pieces)]


def _kind(tokenizer: Tokenizer, piece_id: int, is_added: bool) -> TokenType:
    if not tokenizer.has_piece(piece_id):
        return TokenType.UNUSED
    if piece_id in tokenizer.special_ids:
        return TokenType.CONTROL
    return TokenType.USER_DEFINED if is_added else TokenType.NORMAL


def pre_tokenizer_name(parts: dict[str, Any]) -> str:
    """llama.cpp's name for how a parsed byte-level tokenizer.json cuts text into words. Raises UserError."""
    stages = parts["pre_tokenizer"] or {}
    stages = stages.get("pretokenizers", [stages])
    patterns = [stage["pattern"].get("Regex") for stage in stages if stage.get("type") == "Split"]
    patterns += [_GPT2 for stage in stages if stage.get("type") == "ByteLevel" and stage.get("use_regex", True)]
    key = (str(patterns[0]) if len(patterns) == 1 else "", bool(parts["model"].get("ignore_merges")))
    if key not in _PRE_TOKENIZERS:
        told = re.sub(r"\s+", " ", str(patterns))[:200]
        raise UserError(f"llama.cpp has no word pattern that is known to be this tokenizer's: {told}.", _HF)
    return _PRE_TOKENIZERS[key]
