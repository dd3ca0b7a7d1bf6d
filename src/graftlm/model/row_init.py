"""How the rows of new pieces start, computed from the rows of old pieces.

Owns the initialisations as functions of tensors. Does not know models, tokenizers or files of weights. On the
road it stands inside `2-base`, under `grow`.

Shapes: V old rows, N new rows, H hidden size, K neighbours, D length of an auxiliary vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.errors import UserError
from graftlm.model.weights import read_header

Init = Literal["normal", "mean", "subpiece-mean", "subpiece-mean-norm", "similarity"]
INITS: tuple[str, ...] = get_args(Init)

_CHUNK_ROWS = 2048  # new rows gathered at a time: 100 MB at hidden size 4,096 and three sub-pieces each
_NUM_NEIGHBOURS, _TEMPERATURE = 10, 0.1  # Source: WECHSEL, arXiv 2112.06598, section 3.3


@dataclass(frozen=True, slots=True)
class Neighbours:
    """For each new row the old rows most alike.

    Ids_NK, weights_NK (they sum to 1), and which rows have any.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    is_known_N: Tensor


def start_rows(
    init: str,
    old_VH: Tensor,
    expansions: Sequence[Sequence[int]],
    *,
    std: float,
    generator: torch.Generator,
    neighbours: Neighbours | None = None,
) -> Tensor:
    """First values of N new rows, (N, H) float32 on the CPU; `expansions[n]` are the old ids of new row n.

    `normal`: N(0, std). `mean`: the mean of all old rows. `subpiece-mean`: the mean of the rows of its
    expansion. `subpiece-mean-norm`: that, its distance from the mean row brought to that of a typical
    (median) old row, since a mean of k rows lies nearer. From the mean row, not from zero: all rows of a
    trained head share a large part, and stretching that would shift every new logit at once. `similarity`:
    the rows of its neighbours, weighted; without a vector of its own, as `subpiece-mean`. A row without
    expansion (a control piece such as [PAD]) starts as the mean of all old rows: a zero row would have rms 0,
    by which the backward of RMSNorm divides.
    """
    if init == "normal":
        return torch.randn(len(expansions), old_VH.shape[1], generator=generator) * std
    mean_H = _mean_row(old_VH)
    if init == "mean":
        return mean_H.repeat(len(expansions), 1)
    rows_NH = _subpiece_means(old_VH, expansions, mean_H)
    if init == "subpiece-mean":
        return rows_NH
    if init == "subpiece-mean-norm":
        from_mean_NH = rows_NH - mean_H
        typical_rms = row_rms(old_VH, mean_H).median()
        scale_N = typical_rms / row_rms(from_mean_NH).clamp_min(torch.finfo(torch.float32).tiny)
        return mean_H + from_mean_NH * scale_N[:, None]
    assert init == "similarity", init
    assert neighbours is not None, "similarity needs neighbours"
    for start in range(0, len(rows_NH), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        near_NKH = old_VH[neighbours.ids_NK[part]].float()
        weighted_NH = (neighbours.weights_NK[part, :, None] * near_NKH).sum(1)
        is_known_N = neighbours.is_known_N[part, None]
        rows_NH[part] = torch.where(is_known_N, weighted_NH, rows_NH[part])
    return rows_NH


def row_rms(rows_VH: Tensor, center_H: Tensor | float = 0.0) -> Tensor:
    """Root of the mean square of each row, measured from `center_H`, (V,) float32."""
    parts = [(part.float() - center_H).square().mean(1).sqrt() for part in rows_VH.split(_CHUNK_ROWS)]
    return torch.cat(parts) if parts else torch.zeros(0)


def find_neighbours(vectors: Mapping[str, Tensor], old_pieces: Sequence[str], new_pieces: Sequence[str]) -> Neighbours:
    """The old pieces whose auxiliary vectors point most alike, weighted by soft-max of cosine over
    temperature.

    Source: WECHSEL, arXiv 2112.06598, section 3.3 (10 neighbours, temperature 0.1). Raises: UserError when no
    old piece, or no new one, has a vector.
    """
    known_old = [i for i, piece in enumerate(old_pieces) if piece in vectors]
    known_new = [i for i, piece in enumerate(new_pieces) if piece in vectors]
    for known, kind in ((known_old, "an old"), (known_new, "a new")):
        if not known:
            raise UserError(
                f"Of {len(vectors):,} auxiliary vectors none belongs to {kind} piece.",
                "Name the vectors by pieces as the vocabulary spells them, for example ▁the.",
            )
    old_VD = torch.nn.functional.normalize(torch.stack([vectors[old_pieces[i]].float() for i in known_old]))
    num_near = min(_NUM_NEIGHBOURS, len(known_old))
    ids_NK = torch.zeros(len(new_pieces), num_near, dtype=torch.long)
    weights_NK = torch.zeros(len(new_pieces), num_near)
    is_known_N = torch.zeros(len(new_pieces), dtype=torch.bool)
    known_old_ids = torch.tensor(known_old)
    for start in range(0, len(known_new), _CHUNK_ROWS):
        places = known_new[start : start + _CHUNK_ROWS]
        new_ND = torch.nn.functional.normalize(torch.stack([vectors[new_pieces[i]].float() for i in places]))
        near = (new_ND @ old_VD.T).topk(num_near)
        ids_NK[places] = known_old_ids[near.indices]
        weights_NK[places] = torch.softmax(near.values / _TEMPERATURE, dim=1)
        is_known_N[places] = True
    return Neighbours(ids_NK, weights_NK, is_known_N)


def read_vectors(path: str | Path) -> dict[str, Tensor]:
    """Auxiliary vectors by piece from a safetensors file, all (D,). Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file of auxiliary vectors {path}.", "Give a safetensors file: piece → vector.")
    shapes = {name: tensor.shape for name, tensor in read_header(path).items()}
    odd = next(
        (name for name, shape in shapes.items() if len(shape) != 1 or shape != next(iter(shapes.values()))), None
    )
    if not shapes or odd is not None:
        found = f"{odd!r} has the shape {list(shapes[odd])}" if odd is not None else "it is empty"
        raise UserError(f"{path} must hold one vector of equal length for each piece; {found}.", "Write it again.")
    return load_file(path)


def _mean_row(rows_VH: Tensor) -> Tensor:
    total_H = torch.zeros(rows_VH.shape[1], dtype=torch.float64)
    for part in rows_VH.split(_CHUNK_ROWS):
        total_H += part.double().sum(0)
    return (total_H / len(rows_VH)).float()


def _subpiece_means(old_VH: Tensor, expansions: Sequence[Sequence[int]], mean_H: Tensor) -> Tensor:
    rows_NH = mean_H.repeat(len(expansions), 1)
    for start in range(0, len(expansions), _CHUNK_ROWS):
        part = [(n, old_ids) for n, old_ids in enumerate(expansions[start : start + _CHUNK_ROWS], start) if old_ids]
        if not part:
            continue
        counts = torch.tensor([len(old_ids) for _, old_ids in part])
        owners = torch.repeat_interleave(torch.arange(len(part)), counts)
        gathered = old_VH[torch.tensor([old_id for _, old_ids in part for old_id in old_ids])].float()
        sums = torch.zeros(len(part), old_VH.shape[1]).index_add_(0, owners, gathered)
        rows_NH[[n for n, _ in part]] = sums / counts[:, None]
    return rows_NH
