"""How sure a figure is: 95 % intervals by the bootstrap, and Wilson's for shares.

Owns the maths of intervals and of paired differences. Does not know models or files; `evaluate`, `compare` and `sweep`
hand it sums by dialogue. The same dialogues always give the same interval: the draws have one seed.

Shapes: D dialogues, C columns that are summed, R resamples.
"""

from __future__ import annotations

import math

import numpy as np

NUM_RESAMPLES = 1000
QUANTILES = (0.025, 0.975)
_Z = 1.959964  # the normal distribution's 97.5 % quantile

Interval = tuple[float, float]


def resampled_sums(values_DC: np.ndarray) -> np.ndarray:
    """Sums (R, C) of the columns over D dialogues drawn with replacement, all columns by the same draws.

    Source: the bootstrap, Efron 1979. Drawn as counts, so that memory stays at one resample's.
    """
    dice = np.random.default_rng(0)
    num = len(values_DC)
    return np.stack([
        np.bincount(dice.integers(0, num, num), minlength=num) @ values_DC for _ in range(NUM_RESAMPLES)
    ])  # fmt: skip


def interval_of(found_R: np.ndarray) -> Interval:
    """The 2.5 % and 97.5 % quantiles of what resamples gave."""
    low, high = np.quantile(found_R, QUANTILES)
    return float(low), float(high)


def ratio_interval(above_D: np.ndarray, below_D: np.ndarray) -> Interval:
    """Interval of a ratio of sums, for example bits over bytes."""
    sums_RC = resampled_sums(np.stack([above_D, below_D], axis=1).astype(float))
    return interval_of(sums_RC[:, 0] / np.maximum(sums_RC[:, 1], 1))


def difference_interval(
    one_D: np.ndarray, below_one_D: np.ndarray, other_D: np.ndarray, below_other_D: np.ndarray
) -> Interval:
    """Interval of `one / below_one - other / below_other`, ratios of sums over the same dialogues: what the dialogues
    are hard or easy for both by cancels out."""
    sums_RC = resampled_sums(np.stack([one_D, below_one_D, other_D, below_other_D], axis=1).astype(float))
    sums_RC[:, 1::2] = np.maximum(sums_RC[:, 1::2], 1)
    return interval_of(sums_RC[:, 0] / sums_RC[:, 1] - sums_RC[:, 2] / sums_RC[:, 3])


def share_interval(num_hits: int, num_asked: int) -> Interval:
    """Wilson's interval of a share, sound also at 0 and 1. Source: Wilson 1927."""
    if not num_asked:
        return 0.0, 1.0
    share = num_hits / num_asked
    middle = (share + _Z**2 / (2 * num_asked)) / (1 + _Z**2 / num_asked)
    spread = _Z * math.sqrt(share * (1 - share) / num_asked + _Z**2 / (4 * num_asked**2)) / (1 + _Z**2 / num_asked)
    return max(0.0, middle - spread), min(1.0, middle + spread)
