"""Held-out loss in nats and in bits per byte.

Owns one forward pass over held-out rows and the sums per row. Per byte, because a graft changes the tokens: two
tokenizers can only be compared by the text they predict. Does not know intervals or reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from graftlm.device import Precision
from graftlm.model.body import labelled_hidden_states
from graftlm.model.causal import head_weight
from graftlm.model.loss import target_losses
from graftlm.run import progress
from graftlm.text.rows import TokenRows
from graftlm.training.batches import all_sparing, idle_batch, row_batches
from graftlm.training.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class RowLosses:
    """For each row: summed loss of its targets (nats), number of targets, bytes of the target text."""

    nats: np.ndarray
    num_targets: np.ndarray
    num_bytes: np.ndarray

    @property
    def loss_per_target(self) -> float:
        """Nats per target token over all rows."""
        return float(self.nats.sum() / max(self.num_targets.sum(), 1))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of target text over all rows."""
        return float(self.nats.sum() / math.log(2) / max(self.num_bytes.sum(), 1))


@torch.no_grad()
def heldout_losses(
    model: torch.nn.Module,
    rows: TokenRows,
    precision: Precision,
    budget_tokens: int,
    label: str = "held-out",
    ranks: Ranks = ALONE,
) -> RowLosses:
    """Losses of every row of `rows`. The model is put in evaluation mode and back.

    The micro-batches are those of one rank, shared out: every row's loss is the same bits for any number of ranks.
    """
    was_training = model.training
    model.eval()
    nats = np.zeros(len(rows))
    num_targets = np.zeros(len(rows), dtype=np.int64)
    budget_tokens = max(budget_tokens, int(rows.lengths.max()))
    all_batches = row_batches(rows, range(len(rows)), budget_tokens, precision.device, all_sparing(precision))
    batches = all_batches[ranks.rank :: ranks.count]
    if ranks.mesh is not None:  # weights come from all ranks, so all take equally many passes
        batches += [idle_batch(precision.device)] * (-(-len(all_batches) // ranks.count) - len(batches))
    for batch in progress(batches, len(batches), label):
        with precision.autocast():
            hidden_NH = labelled_hidden_states(model, batch.ids_1T, batch.layout, batch.labelled_N)
        losses_N = target_losses(hidden_NH, head_weight(model), batch.targets_N, precision.compute_dtype)
        places_N = batch.row_N.cpu().numpy()
        row_ids = np.asarray(batch.row_ids, dtype=np.int64)
        np.add.at(nats, row_ids[places_N], losses_N.double().cpu().numpy())
        np.add.at(num_targets, row_ids[places_N], 1)
    model.train(was_training)
    ranks.add_up(nats)
    ranks.add_up(num_targets)
    return RowLosses(nats, num_targets, np.asarray(rows.target_bytes, dtype=np.int64))
