"""What a plan knows of the rows: how many there are, how long, how much of them is answer, what they begin with alike.

Owns the micro-batch such rows fill. The figures come from tokenised rows, or are an estimate that says so (`source`).
Does not know memory or time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from graftlm.health.activations import MicroBatch, micro_batch
from graftlm.text.rows import TokenRows

SAMPLED = 256
MOST_LABELLED_SHARE = 0.9  # as `training/batches.py`: from there on the last layer is computed in full


@dataclass(frozen=True, slots=True)
class RowFacts:
    """`sample` holds (tokens, labels) of rows drawn evenly over all `num_rows`, the longest of which has `longest`
    tokens; the first `num_shared` tokens of a row are those all begin with."""

    num_rows: int
    sample: tuple[tuple[int, int], ...]
    longest: int
    num_shared: int
    source: str

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row."""
        return sum(tokens for tokens, _ in self.sample) / len(self.sample)

    @property
    def mean_labels(self) -> float:
        """Labels of a row."""
        return sum(labels for _, labels in self.sample) / len(self.sample)

    @property
    def mean_keys(self) -> float:
        """Keys a position sees, averaged over tokens: half of the row's length."""
        return sum(tokens * tokens for tokens, _ in self.sample) / (2 * sum(tokens for tokens, _ in self.sample))

    def is_last_sparse(self, spares_last: bool = True) -> bool:
        """Whether the last layer is computed at labels only: where that is worth it, on a device where it ever is."""
        return spares_last and self.mean_labels <= MOST_LABELLED_SHARE * self.mean_tokens

    def num_steps(self, batch_rows: int, epochs: float) -> int:
        """Steps of a stage, as `training/batches.py` counts them."""
        return max(1, round(epochs * math.ceil(self.num_rows / batch_rows)))

    def step_tokens(self, batch_rows: int, shares_prefix: bool, num_steps: int = 1) -> float:
        """Tokens computed in the largest of so many steps, were each one micro-batch: as often less as more.

        Rows are drawn without putting back: a step of all rows is always as large.
        """
        rows = min(batch_rows, self.num_rows)
        shared = self.num_shared if shares_prefix else 0
        mean = self.mean_tokens
        variance = sum((tokens - mean) ** 2 for tokens, _ in self.sample) / len(self.sample)
        of_sum = rows * variance * (self.num_rows - rows) / max(self.num_rows - 1, 1)
        largest = NormalDist().inv_cdf(0.5 ** (1 / num_steps)) * math.sqrt(of_sum)
        return shared + rows * (mean - shared) + largest

    def fullest(
        self, budget: int, batch_rows: int, shares_prefix: bool, num_steps: int, spares_last: bool = True
    ) -> tuple[MicroBatch, bool]:
        """The fullest micro-batch of so many steps under a budget of tokens, and whether a step may have several."""
        most = self.step_tokens(batch_rows, shares_prefix, num_steps)
        tokens = min(budget, math.ceil(most))
        shared = self.num_shared if shares_prefix else 0
        return micro_batch(self.sample, tokens, shared, self.is_last_sparse(spares_last)), most > budget


def estimated_rows(
    num_rows: int, mean_tokens: float, label_share: float, num_shared: int, longest: int, source: str
) -> RowFacts:
    """Rows whose lengths spread like those of instruction sets: log-normal, sigma 0.79.

    Source: BELLE with the 49,953-piece tokenizer has mean 177, median 130, p95 438; exp(sigma^2 / 2) = 177 / 130.
    """
    sigma = 0.79
    middle = math.log(mean_tokens) - sigma * sigma / 2
    places = [(place + 0.5) / SAMPLED for place in range(SAMPLED)]
    lengths = [math.exp(middle + sigma * NormalDist().inv_cdf(place)) for place in places]
    # Short rows are the template and little more; long ones are cut. What that takes away is given back to all.
    least = num_shared + 4
    clipped = [min(max(round(length), least), longest) for length in lengths]
    factor = mean_tokens * SAMPLED / sum(clipped)
    tokens = [min(max(round(length * factor), least), longest) for length in clipped]
    labels = [max(1, min(round(length * label_share), length - num_shared - 1)) for length in tokens]
    # Spread over the sample, so that any stretch of it is like the whole.
    order = sorted(range(SAMPLED), key=lambda place: (place * 89) % SAMPLED)
    sample = tuple((tokens[place], labels[place]) for place in order)
    return RowFacts(num_rows, sample, max(tokens), num_shared, source)


def measured_rows(rows: TokenRows, num_shared: int, source: str) -> RowFacts:
    """Rows as they were tokenised; a sample of them, evenly spaced."""
    sampled = map(rows.row, range(0, len(rows), max(1, len(rows) // SAMPLED)))
    sample = tuple((len(ids), int(is_target.sum())) for ids, is_target in sampled)
    return RowFacts(len(rows), sample, int(rows.lengths.max()), num_shared, source)
