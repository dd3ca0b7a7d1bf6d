"""The exact `tokenizers` form of SentencePiece models, and the reasons why some have none."""

from pathlib import Path

import pytest
import sentencepiece

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer.samples import ODD_TEXTS, OLD_TEXTS
from graftlm.text.tokenizer.sentencepiece_bpe import ModelProto, build_fast, list_merges, read_model, why_not_exact

TEXTS = [*ODD_TEXTS, *OLD_TEXTS]


@pytest.fixture
def model(llama_like: Path) -> ModelProto:
    return read_model(llama_like / "tokenizer.model")


def test_merges_are_every_split_in_order_of_score(model: ModelProto) -> None:
    scores = {piece.piece: piece.score for piece in model.pieces}
    merges = list_merges(model)
    assert [scores[a + b] for a, b in merges] == sorted((scores[a + b] for a, b in merges), reverse=True)
    whole = next(piece.piece for piece in model.pieces if len(piece.piece) > 4 and piece.score > -100)
    splits = {(whole[:k], whole[k:]) for k in range(1, len(whole)) if {whole[:k], whole[k:]} <= set(scores)}
    assert splits == {(a, b) for a, b in merges if a + b == whole}


def test_fast_form_encodes_as_sentencepiece(model: ModelProto) -> None:
    """T5: on odd texts too."""
    fast = build_fast(model)
    fast.encode_special_tokens = True
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in TEXTS:
        assert fast.encode(text, add_special_tokens=False).ids == reference.encode(text), text


def test_reasons_for_no_exact_form(model: ModelProto) -> None:
    assert why_not_exact(model) is None
    tied, unigram, rewriting, spaces = ModelProto(), ModelProto(), ModelProto(), ModelProto()
    for copy in (tied, unigram, rewriting, spaces):
        copy.CopyFrom(model)
    tied.pieces[-1].score = tied.pieces[300].score = 0.0
    tied.pieces[-1].piece, tied.pieces[300].piece = "ab", "ba"
    unigram.trainer_spec.model_type = 1
    rewriting.normalizer_spec.remove_extra_whitespaces = True
    spaces.pieces[-1].piece, spaces.pieces[-2].piece = spaces.pieces[-2].piece, spaces.pieces[-1].piece
    for copy, reason in (
        (tied, "share one score"),
        (unigram, "Unigram"),
        (rewriting, "rewrites text"),
        (spaces, "runs of spaces"),
    ):
        assert reason in (why_not_exact(copy) or "")
        with pytest.raises(UserError, match=reason):
            build_fast(copy)


def test_bare_llama_encodes_as_sentencepiece(shared_real: Path) -> None:
    """T5: Llama's own model, whose space runs carry -1e9, from the bare file."""
    path = shared_real / "tokenizers" / "llama2.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    code = ["if x:\n" + " " * n + "return y" + " " * (20 - n) + "z" for n in range(20)]
    assert tokenizer.encode_batch(code + TEXTS) == [reference.encode(text) for text in code + TEXTS]


def test_unigram_model_is_encoded_by_sentencepiece(shared_real: Path) -> None:
    path = shared_real / "tokenizers" / "chinese_sp.model"
    tokenizer = load_tokenizer(path)
    assert not tokenizer.has_fast_form
    assert tokenizer.num_pieces == 20_000
    assert tokenizer.encode("中文") == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("中文")
