"""What a pre-flight saw of a stage, in numbers.

Owns their names and meaning. They are taken by `training/look.py` and judged by `preflight.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.health.probe import BadTensor


@dataclass(frozen=True, slots=True)
class RoleNumbers:
    """The trained parameters of one role after one backward pass in fp32 at scale 1.

    `peak_lr` is the rate they are to learn at; `weight_rms` over all entries; `largest_gradient` of any entry; `silent`
    names those whose gradient is zero throughout; `shared` those whose memory another trained parameter has too.
    """

    num_tensors: int
    dtypes: tuple[str, ...]
    peak_lr: float
    weight_rms: float
    largest_gradient: float
    silent: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LargestRow:
    """The row of a vocabulary matrix with the largest rms: its id, the text of its piece, and whether that is new;
    `typical_rms` is the median row's."""

    row_id: int
    text: str
    is_new: bool
    rms: float
    typical_rms: float


@dataclass(frozen=True, slots=True)
class Look:
    """All that was seen: of the stage's first rows (`num_*`, `num_without_labels` of the rows), of the pass, and of the
    stage's settings.

    `frozen` names parameters that should learn by the recipe and do not; `row_rms` gives the median rms of (old, new)
    rows by matrix, whether they learn or not, `largest_rows` the one that stands out most; `bad_weight` is the first
    parameter that is not finite, with its row; `bad_row_id` a row of data with an id outside the vocabulary, -1 for
    none; `ends_right` whether any answer's last target is the end token; `uniform_loss` is what knowing nothing costs,
    ln V; `lora_factor` what the adapter is multiplied by, None without one (by alpha / sqrt(rank) where
    `is_rank_stabilized`); `loss_floor` and `loss_initial` the loss scale's lowest and first in fp16, else None,
    `is_scale_unused` whether one was given all the same; `num_steps` how many the stage takes; `norm_eps` what RMSNorm
    adds to a mean square; `are_new_rows_fixed` whether rows of new pieces stay as they are, by the recipe. Where an id
    lies outside there was no pass, and what it would have shown is empty.
    """

    precision: str
    eps: float
    peak_lr: float
    lora_factor: float | None
    is_rank_stabilized: bool
    loss_floor: float | None
    loss_initial: float | None
    is_scale_unused: bool
    num_steps: int
    norm_eps: float
    are_new_rows_fixed: bool
    num_vocab_rows: int
    uniform_loss: float
    roles: Mapping[str, RoleNumbers]
    frozen: tuple[str, ...]
    row_rms: Mapping[str, tuple[float, float]]
    largest_rows: Mapping[str, LargestRow]
    bad_weight: str
    headroom_bits: float
    headroom_where: str
    ceiling_bits: Mapping[str, float]
    first_loss: Mapping[str, float]
    first_bad: BadTensor | None
    num_targets: int
    num_tokens: int
    num_rows: int
    num_without_labels: int
    bad_row_id: int
    is_dialogue: bool
    ends_right: bool
