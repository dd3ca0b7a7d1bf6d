"""SentencePiece's BPE models: reading them, and the exact `tokenizers` form of one.

Owns the protobuf and the rule by which SentencePiece merges. Does not know grafts, folders or control tokens
beyond their piece types. First stop of the road's tokenizer step: everything else works on what is read here.

SentencePiece joins any two neighbours whose concatenation is a piece, best score first, ties leftmost.
`tokenizers` joins listed pairs by rank, and ranks never tie. Listing every split of every piece by descending
score, then id, then longer left part gives the same result wherever scores do not tie (`has_tied_scores`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError, Message
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_format
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError

_format: Any = sentencepiece_format  # protobuf makes the classes of this module at run time

if TYPE_CHECKING:

    class ModelProto(Message):
        """A parsed `.model` file."""

        pieces: Any
        trainer_spec: Any
        normalizer_spec: Any

else:
    ModelProto = _format.ModelProto

SPACE = "\u2581"  # SentencePiece's visible space

_Type = _format.ModelProto.SentencePiece
NORMAL, UNKNOWN, CONTROL, BYTE = _Type.NORMAL, _Type.UNKNOWN, _Type.CONTROL, _Type.BYTE
_BPE = _format.TrainerSpec.BPE
_MODEL_TYPE_NAMES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}

ODDITY_SCORE = -1e8
"""Pieces scored below this (Llama's space runs, at -1e9) merge after every learned piece."""


def read_model(path: Path) -> ModelProto:
    """Read a SentencePiece `.model` file.

    Raises:
        UserError: the file is missing, unreadable, truncated or not a SentencePiece model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: the SentencePiece model cannot be read ({error.strerror or error}).",
            "Give the path of a tokenizer.model file, or of the folder that holds one.",
        ) from error
    return parse_model(content, str(path))


def parse_model(content: bytes, where: str) -> ModelProto:
    """Parse the bytes of a SentencePiece model; `where` names their origin in the error.

    Raises:
        UserError: the bytes are not a whole SentencePiece model.
    """
    model = ModelProto()
    try:
        model.ParseFromString(content)
        # The specifications follow the pieces: a file cut between two pieces parses and lacks them.
        has_end = model.HasField("trainer_spec") and model.HasField("normalizer_spec")
        is_whole = has_end and any(piece.type == UNKNOWN for piece in model.pieces)
    except DecodeError:
        is_whole = False
    if not is_whole:
        raise UserError(
            f"{where}: {len(content)} bytes that are not a whole SentencePiece model (foreign or cut off).",
            "Copy or download the tokenizer.model again; a Git LFS pointer file is about 130 bytes long.",
        )
    return model


def model_type_name(model: ModelProto) -> str:
    """The algorithm of a model: "BPE", "Unigram", "Word" or "Char"."""
    return _MODEL_TYPE_NAMES.get(model.trainer_spec.model_type, str(model.trainer_spec.model_type))


def why_not_exact(model: ModelProto) -> str | None:
    """Why this model has no exact `tokenizers` form, or None if it has one."""
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != _BPE:
        return f"it is a {model_type_name(model)} model, not BPE"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"it rewrites text before splitting it (normalizer {normalizer.name!r})"
    if not normalizer.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        return "it marks spaces in another way than a leading ▁"
    if any(piece.type not in (NORMAL, UNKNOWN, CONTROL, BYTE) for piece in model.pieces):
        return "it holds user-defined pieces"
    if not _space_runs_agree(model):
        return "its runs of spaces share one score, and are of lengths that the two rules put together differently"
    if has_tied_scores(model):
        return (
            "several of its pieces share one score: for XY and YX tied, SentencePiece gives XYX = XY+X and "
            "YXY = YX+Y, which no order of merges can"
        )
    return None


def has_tied_scores(model: ModelProto) -> bool:
    """Whether two mergeable pieces share a score; runs of spaces are looked at by themselves."""
    scores = [
        piece.score
        for piece in model.pieces
        if piece.type == NORMAL and len(piece.piece) > 1 and piece.piece.strip(SPACE)
    ]
    return len(set(scores)) < len(scores)


def _space_runs_agree(model: ModelProto) -> bool:
    """Whether runs of spaces, which Llama scores all alike, come out the same under both rules.

    Only their lengths matter, so both are played with numbers on every run up to twice the longest.
    """
    pieces = [piece for piece in model.pieces if piece.type == NORMAL and not piece.piece.strip(SPACE)]
    scores = {len(piece.piece): -piece.score for piece in pieces}
    ids = {length: number for number, length in enumerate(scores)}

    def joined(num_spaces: int, rank: Callable[[int, int], tuple[float, ...]]) -> list[int]:
        run = [1] * num_spaces
        while True:
            found = [(rank(a, b), place) for place, (a, b) in enumerate(pairwise(run)) if a + b in scores]
            if not found:
                return run
            _, place = min(found)
            run[place : place + 2] = [run[place] + run[place + 1]]

    return all(
        joined(number, lambda a, b: (scores[a + b],)) == joined(number, lambda a, b: (scores[a + b], ids[a + b], -a))
        for number in range(3, 2 * max(scores, default=0) + 1)
    )


def list_merges(model: ModelProto) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, in the order in which they merge."""
    normal = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    merges: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(model.pieces):
        text = piece.piece
        if piece.type != NORMAL or len(text) < 2:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((-piece.score, index, -cut, left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]


def build_fast(model: ModelProto) -> FastTokenizer:
    """The `tokenizers` form of a BPE model, control tokens and beginning-of-text rule included.

    No pre-tokenizer, and the leading space written by the normalizer: transformers' `LlamaTokenizer` class
    would rebuild a pre-tokenizer and lose that space on texts that start with one.

    Raises:
        UserError: the model has no exact form (`why_not_exact`).
    """
    reason = why_not_exact(model)
    if reason is not None:
        raise UserError(
            f"No tokenizer.json can encode as this SentencePiece model does: {reason}.",
            "Use the tokenizer.model itself, or graft with --mode continued or --mode merge.",
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    fast = FastTokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list_merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    to_visible = normalizers.Replace(" ", SPACE)
    to_space = decoders.Replace(SPACE, " ")
    if model.normalizer_spec.add_dummy_prefix:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_visible])
        fast.decoder = decoders.Sequence(
            [to_space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        fast.normalizer = to_visible
        fast.decoder = decoders.Sequence([to_space, decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in model.pieces
            if piece.type in (UNKNOWN, CONTROL)
        ]
    )
    begin = model.trainer_spec.bos_piece
    if model.trainer_spec.bos_id >= 0 and begin in vocabulary:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
        )
    return fast


def without_prefix(model: ModelProto) -> ModelProto:
    """A copy of the model that puts no space before the text."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.normalizer_spec.add_dummy_prefix = False
    return copy
