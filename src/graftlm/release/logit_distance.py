"""How far a written model's logits lie from the trained one's.

Owns the three figures an export tells. Does not know models or files.

Shapes: T tokens, V rows of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitDistance:
    """Over all places of the samples: the largest distance of two logits, the mean Kullback-Leibler divergence of the
    next piece's distributions (nats, from the trained one), and at how many places another piece is the likeliest."""

    largest: float
    mean_divergence: float
    num_likeliest_changed: int


def distance_of(expected: Sequence[Tensor], found: Sequence[Tensor]) -> LogitDistance:
    """The distance of two models' logits, rows of (T, V)."""
    largest = divergence = 0.0
    num_changed = num_places = 0
    for expected_TV, found_TV in zip(expected, found, strict=True):
        trained_TV, written_TV = expected_TV.double().log_softmax(-1), found_TV.double().log_softmax(-1)
        largest = max(largest, (expected_TV - found_TV).abs().max().item())
        divergence += (trained_TV.exp() * (trained_TV - written_TV)).sum().item()
        num_changed += int((expected_TV.argmax(-1) != found_TV.argmax(-1)).sum())
        num_places += len(expected_TV)
    assert math.isfinite(largest), "the exported model gives logits that are not finite"
    return LogitDistance(largest, max(0.0, divergence / max(1, num_places)), num_changed)
