"""Grow a model's vocabulary matrices to a grafted tokenizer, and prove that nothing old changed.

Owns which row stands where, the report, and the verb `expand`. How a new row's values are found is
`row_init`. Does not know how the tokenizer was grafted: it needs pieces, ids and expansions. Second step of
the road, `2-base`.

Shapes: T tokens, V rows of a matrix, H hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.model.causal import (
    body_of,
    check_ids,
    empty_causal,
    find_model,
    head_weight,
    is_tied,
    load_causal,
    save_causal,
    vocabulary_modules,
)
from graftlm.model.finite import refuse_bad_weights
from graftlm.model.row_init import INITS, Neighbours, find_neighbours, read_vectors, row_rms, start_rows
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

PROOF_TEXTS = (
    "The river rises in the mountains and reaches the sea after four hundred miles.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    'In 1969, "Apollo 11" landed on the Moon; 3.14159 is close to pi, and 12 + 30 = 42.',
    "Question: why is the sky blue?\n\nAnswer: because air scatters short waves more than long ones.",
)
NUM_NEW_TEXTS = 16
"""Texts of the new language that suffice to tell the first loss on new pieces by."""
_NUM_RANDOM_IDS = 128
_MAX_TEXT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class GrowReport:
    """What growing did, and the proof that it changed nothing for old text.

    `row_rms`: mean rms of a row by matrix and by old and new. `first_loss`: nats per target before any
    training, on old text and, where new text was given, over its targets by class; `uniform` is ln of the
    number of rows, what a model that knows nothing pays. `max_old_logit_difference`: through the whole grown
    head, a wider matrix product. What is not finite is left out of both.
    """

    num_rows_old: int
    num_rows_new: int
    num_ids_old: int
    num_ids_new: int
    num_without_expansion: int
    num_without_vector: int
    embedding_init: str
    head_init: str
    is_tied: bool
    dtype: str
    row_rms: dict[str, dict[str, float | None]]
    first_loss: dict[str, float]
    num_proof_tokens: int
    hidden_states_identical: bool
    old_logits_identical: bool
    max_old_logit_difference: float
    old_logit_tolerance: float


@dataclass(frozen=True, slots=True)
class _Proof:
    """What the model said about old tokens before it grew: ids, hidden states TH, logits over old ids TV."""

    ids: list[list[int]]
    hidden: list[Tensor]
    logits: list[Tensor]


def expand_model(
    model: str | Path,
    tokenizer: str | Path,
    init: str,
    out: str | Path,
    *,
    head_init: str | None = None,
    vectors: str | Path | None = None,
    seed: int = 0,
    new_texts: Sequence[str] = (),
    max_shard: str = "5GB",
) -> GrowReport:
    """Grow the model in folder `model` to the grafted `tokenizer` and write both, with grow.json, into `out`.

    The model keeps its dtype. `new_texts` of the new language tell its first loss. Raises UserError when the tokenizer
    does not extend the model's own, or the model's weights are not finite.
    """
    folder = find_model(model)
    old_tokenizer, new_tokenizer = load_tokenizer(folder), load_tokenizer(tokenizer)
    check_ids(empty_causal(folder), old_tokenizer.num_pieces)
    check_extension(old_tokenizer, new_tokenizer)
    grown = load_causal(folder, dtype=None)
    refuse_bad_weights(grown, folder, old_tokenizer)
    report = grow_embeddings(
        grown, old_tokenizer, new_tokenizer, init, head_init or init, seed, vectors, new_texts=new_texts
    )

    def carry(scratch: Path) -> None:
        new_tokenizer.save(scratch)
        (scratch / "grow.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")

    save_causal(grown, out, max_shard, also=carry)
    return report


def check_extension(old_tokenizer: Tokenizer, new_tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer in which an id of the old one is missing or means something else.

    Raises UserError.
    """
    graft = "Graft onto this base's own tokenizer: graftlm tokenizer graft --base BASE ... --out DIR."
    num_old, num_new = old_tokenizer.num_pieces, new_tokenizer.num_pieces
    if num_new < num_old:
        raise UserError(f"The tokenizer has {num_new:,} ids, the model's own {num_old:,}: it is no extension.", graft)
    for piece_id in range(num_old):
        old, new = old_tokenizer.piece(piece_id), new_tokenizer.piece(piece_id)
        if old != new:
            raise UserError(
                f"Id {piece_id} is {old!r} in the model's own tokenizer and {new!r} in the given one: "
                "it is no extension of it.",
                graft,
            )
    if old_tokenizer.eos_id != new_tokenizer.eos_id:
        raise UserError(
            f"The end token is id {old_tokenizer.eos_id} for the model, id {new_tokenizer.eos_id} for the tokenizer.",
            "Give the tokenizer the model's end token in its tokenizer_config.json.",
        )


def grow_embeddings(
    model: PreTrainedModel,
    old_tokenizer: Tokenizer,
    new_tokenizer: Tokenizer,
    embedding_init: str,
    head_init: str,
    seed: int,
    vectors: str | Path | None = None,
    *,
    old_texts: Sequence[str] = PROOF_TEXTS,
    new_texts: Sequence[str] = (),
) -> GrowReport:
    """Give every id of `new_tokenizer` a row in embedding and head, in place; old rows stay bit for bit.

    Rows are placed by id: a base padded beyond its vocabulary has its padding rows taken by the first new
    pieces, and keeps what is left of them. Matrices grow one after the other. Raises UserError.
    """
    _check_inits(model, embedding_init, head_init, vectors)
    num_old, num_new = old_tokenizer.num_pieces, new_tokenizer.num_pieces
    expansions = [_expansion(i, old_tokenizer, new_tokenizer) for i in range(num_old, num_new)]
    neighbours = _neighbours(vectors, old_tokenizer, new_tokenizer) if vectors else None
    proof = _take_proof(model, old_tokenizer, old_texts, seed)
    embedding, head = vocabulary_modules(model)
    num_rows_old = len(embedding.weight)
    num_rows_new = max(num_rows_old, num_new)
    tied = is_tied(model)
    matrices = {"embedding": (embedding, embedding_init)}
    if not tied:
        matrices["head"] = (head, head_init)
    rms = {}
    for number, (name, (module, init)) in enumerate(matrices.items()):
        generator = torch.Generator().manual_seed(seed * 2 + number)
        std = model.config.initializer_range
        old_VH = module.weight.detach()
        rows = start_rows(init, old_VH[:num_old], expansions, std=std, generator=generator, neighbours=neighbours)
        module.weight = Parameter(_with_rows(old_VH, num_old, rows, num_rows_new), module.weight.requires_grad)
        del old_VH
        rms[name] = _rms_by_class(module.weight.detach(), num_old, num_new)
    _tell_the_model(model, new_tokenizer, num_rows_new, tied)
    return GrowReport(
        num_rows_old=num_rows_old,
        num_rows_new=num_rows_new,
        num_ids_old=num_old,
        num_ids_new=num_new,
        num_without_expansion=sum(not expansion for expansion in expansions),
        num_without_vector=0 if neighbours is None else int((~neighbours.is_known_N).sum()),
        embedding_init=embedding_init,
        head_init=embedding_init if tied else head_init,
        is_tied=tied,
        dtype=str(model.dtype).removeprefix("torch."),
        row_rms=rms,
        first_loss=_first_losses(model, new_tokenizer, num_old, old_texts, new_texts),
        **_compare(model, proof, num_old),
    )


def _check_inits(model: PreTrainedModel, embedding_init: str, head_init: str, vectors: str | Path | None) -> None:
    for init in (embedding_init, head_init):
        if init not in INITS:
            raise UserError(f"No initialisation is called {init!r}.", f"Choose one of {', '.join(INITS)}.")
        if init == "similarity" and vectors is None:
            raise UserError(
                "The initialisation similarity needs auxiliary vectors, and none were given.",
                "Give --vectors, a safetensors file of vectors by piece; or choose subpiece-mean.",
            )
    if is_tied(model) and embedding_init != head_init:
        raise UserError(
            f"Embedding and head of this model are one matrix; it cannot start as {embedding_init} and {head_init}.",
            f"Choose {embedding_init} for both: --head-init, or grow.head in a recipe.",
        )


def _expansion(new_id: int, old_tokenizer: Tokenizer, new_tokenizer: Tokenizer) -> tuple[int, ...]:
    """Old ids of a new piece.

    A tokenizer merged elsewhere brings none, then the old one's encoding of its text.
    """
    if new_id in new_tokenizer.special_ids:
        return ()
    known = new_tokenizer.expansions.get(new_id)
    if known:
        return tuple(known)
    text = new_tokenizer.token_bytes(new_id).decode("utf-8", errors="ignore")
    return tuple(old_tokenizer.encode_continuation(text))


def _neighbours(path: str | Path, old_tokenizer: Tokenizer, new_tokenizer: Tokenizer) -> Neighbours:
    num_old, num_new = old_tokenizer.num_pieces, new_tokenizer.num_pieces
    old_pieces = [old_tokenizer.piece(i) for i in range(num_old)]
    return find_neighbours(read_vectors(path), old_pieces, [new_tokenizer.piece(i) for i in range(num_old, num_new)])


def _with_rows(old_VH: Tensor, num_old: int, rows: Tensor, num_rows: int) -> Tensor:
    """The grown matrix: old ids' rows, then the new ones, then what is left of the base's padding."""
    num_ids = num_old + len(rows)
    grown = old_VH.new_empty(num_rows, old_VH.shape[1])
    grown[:num_old] = old_VH[:num_old]
    grown[num_old:num_ids] = rows.to(old_VH)
    grown[num_ids:] = old_VH[num_ids:]
    assert torch.equal(grown[:num_old], old_VH[:num_old])
    return grown


def _tell_the_model(model: Any, tokenizer: Tokenizer, num_rows: int, tied: bool) -> None:
    """Bring everything that names the number of rows, or an id, up to date."""
    embedding, head = vocabulary_modules(model)
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = num_rows
    model.config.vocab_size = num_rows
    if hasattr(model, "vocab_size"):
        model.vocab_size = num_rows
    for holder in (model.config, model.generation_config):
        holder.bos_token_id, holder.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        holder.pad_token_id = tokenizer.pad_id


def _rms_by_class(weight_VH: Tensor, num_old: int, num_ids: int) -> dict[str, float | None]:
    rms = row_rms(weight_VH[:num_ids])
    return {
        "old": rms[:num_old].mean().item(),
        "new": rms[num_old:].mean().item() if num_ids > num_old else None,
    }


@torch.no_grad()
def _hidden_TH(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return body_of(model)(torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[0]


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return (start + tokenizer.encode(text))[:_MAX_TEXT_TOKENS]


def _old_logits(model: PreTrainedModel, hidden_TH: Tensor, num_old: int) -> Tensor:
    # A copy: a weight mapped from a file may lie unaligned, which alone can change the order of a product's sums.
    return linear(hidden_TH, head_weight(model).detach()[:num_old].clone())


def _take_proof(model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> _Proof:
    """Hidden states and old logits on old texts, and on ids drawn from the whole old vocabulary."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(tokenizer.num_pieces, (_NUM_RANDOM_IDS,), generator=generator).tolist()
    ids = [row for row in (*(_text_ids(tokenizer, text) for text in texts), drawn) if row]
    hidden = [_hidden_TH(model, row) for row in ids]
    return _Proof(ids, hidden, [_old_logits(model, h, tokenizer.num_pieces) for h in hidden])


def _compare(model: PreTrainedModel, proof: _Proof, num_old: int) -> dict[str, Any]:
    """The proof, taken again after growing. A failure is our own fault, not the user's: asserted.

    A base whose activations are not finite grows too, and proves that by what is: pre-flight tells of it, by layer.
    """
    hidden = [_hidden_TH(model, row) for row in proof.ids]
    same_hidden = all(map(_is_same, hidden, proof.hidden))
    old_logits = [_old_logits(model, h, num_old) for h in hidden]
    same_logits = all(map(_is_same, old_logits, proof.logits))
    head = head_weight(model).detach()
    differences = [
        _largest(linear(h, head)[:, :num_old].float() - was.float())
        for h, was in zip(hidden, proof.logits, strict=True)
    ]
    largest = max(_largest(was.float()) for was in proof.logits)
    # Products sum in fp32 and round once at the end: 1 ulp in 16 bits; in fp32 the sum's own order, about sqrt(H) ulp.
    ulps = 1.0 if head.dtype.itemsize == 2 else math.sqrt(head.shape[1])
    tolerance = ulps * torch.finfo(head.dtype).eps * max(largest, 1.0)
    assert same_hidden, "growing changed hidden states of old text"
    assert same_logits, "growing changed old logits"
    assert max(differences) <= tolerance, f"old logits moved by {max(differences)}, beyond {tolerance}"
    return {
        "num_proof_tokens": sum(map(len, proof.ids)),
        "hidden_states_identical": same_hidden,
        "old_logits_identical": same_logits,
        "max_old_logit_difference": max(differences),
        "old_logit_tolerance": tolerance,
    }


def _is_same(now: Tensor, was: Tensor) -> bool:
    return bool(((now == was) | (now.isnan() & was.isnan())).all())


def _largest(values: Tensor) -> float:
    """The largest absolute value of those that are finite."""
    return values.abs().masked_fill(~torch.isfinite(values), 0.0).max().item()


def _first_losses(
    model: PreTrainedModel, tokenizer: Tokenizer, num_old: int, old_texts: Sequence[str], new_texts: Sequence[str]
) -> dict[str, float]:
    head = head_weight(model).detach()
    losses: dict[str, list[Tensor]] = {}
    for language, texts in (("old_text", old_texts), ("new_text", new_texts)):
        for text in texts:
            ids = _text_ids(tokenizer, text)
            if len(ids) < 2:
                continue
            targets = torch.tensor(ids[1:], device=head.device)
            logits_TV = linear(_hidden_TH(model, ids[:-1]), head).float()
            losses_T = cross_entropy(logits_TV, targets, reduction="none")
            losses.setdefault(language, []).append(losses_T)
            if language == "new_text":
                losses.setdefault("new_text_old_targets", []).append(losses_T[targets < num_old])
                losses.setdefault("new_text_new_targets", []).append(losses_T[targets >= num_old])
    means = {name: torch.cat(parts) for name, parts in losses.items()}
    found = {name: x.mean().item() for name, x in means.items() if len(x)}
    return {"uniform": math.log(len(head)), **{name: loss for name, loss in found.items() if math.isfinite(loss)}}
