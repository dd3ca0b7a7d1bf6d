"""The data step's account: what became of every row of every file.

Owns the numbers a person reads before training, in `data.json`, in the run's report and from `graftlm data`. Does not
decide anything about a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftlm.text.dialogue import Conversation, Rendered
from graftlm.text.fit import Fitted
from graftlm.text.readers import Reading
from graftlm.text.tally import Tally

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


@dataclass(slots=True)
class DataReport:
    """What became of every row of the sources: `rows_read` = `rows_kept` + all of `heldout_rows` + all of `dropped`.

    A row is a dialogue of a file; `token_rows` is what they became for training (one for each answer under the card's
    template). `dropped` (left out), `cut` (kept without a part; `answers_left_out` in all) and `cleaned` count by
    reason, `examples` names rows. `tokens`, `labels` and `length_quantiles` are of the training rows.
    """

    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    format: str = ""
    tokens: int = 0
    labels: int = 0
    token_rows: int = 0
    heldout_rows: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    answers_left_out: int = 0
    cleaned: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_language: dict[str, int] = field(default_factory=dict)
    length_quantiles: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Counting:
    """The tallies of one data step, on their way into its report."""

    rows_read: int = 0
    dropped: Tally = field(default_factory=Tally)
    cut: Tally = field(default_factory=Tally)
    cleaned: Tally = field(default_factory=Tally)
    answers_left_out: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_language: Counter[str] = field(default_factory=Counter)
    by_length: Counter[int] = field(default_factory=Counter)
    labels: int = 0

    @property
    def rows_kept(self) -> int:
        """Dialogues that are learned."""
        return self.by_language.total()

    def add(self, reading: Reading) -> None:
        """Count what was read of one source."""
        self.rows_read += reading.num_rows
        self.files |= reading.files
        for own, found in ((self.dropped, reading.dropped), (self.cut, reading.cut), (self.cleaned, reading.cleaned)):
            own.merge(found)

    @classmethod
    def after_reading(cls, account: Mapping[str, Any]) -> Counting:
        """What `asdict` made of one to which no dialogue had been counted yet that is learned."""
        dropped, cut, cleaned = (Tally(**account[name]) for name in ("dropped", "cut", "cleaned"))
        return cls(account["rows_read"], dropped, cut, cleaned, files=account["files"])

    def is_kept(self, fitted: Fitted) -> bool:
        """Count what became of one dialogue; whether it has rows."""
        if not fitted.rows:
            self.dropped.add(fitted.problem, fitted.conversation.source)
            return False
        if fitted.is_cut:
            self.cut.add("longer than the limit: cut at a turn", fitted.conversation.source)
        self.answers_left_out += fitted.num_left_out
        return True

    def learn(self, conversation: Conversation, rows: Sequence[Rendered]) -> None:
        """Count a dialogue that is kept for training, and its token rows."""
        self.by_language[conversation.language] += 1
        for row in rows:
            self.by_length[len(row.ids)] += 1
            self.labels += row.is_target.count(True)

    def report(self) -> DataReport:
        """The report on all that was counted."""
        tallies = (self.dropped, self.cut, self.cleaned)
        return DataReport(
            rows_read=self.rows_read,
            rows_kept=self.rows_kept,
            dropped=self.dropped.counts,
            format=", ".join(dict.fromkeys(facts["format"] for facts in self.files.values() if facts["rows"])),
            tokens=sum(length * number for length, number in self.by_length.items()),
            labels=self.labels,
            token_rows=self.by_length.total(),
            cut=self.cut.counts,
            answers_left_out=self.answers_left_out,
            cleaned=self.cleaned.counts,
            examples={reason: where for tally in tallies for reason, where in tally.examples.items()},
            files=self.files,
            by_language=dict(self.by_language),
            length_quantiles={name: quantile(self.by_length, share) for name, share in QUANTILES.items()}
            if self.by_length
            else {},
        )


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The number below which so large a share of the counted ones lies, as np.quantile draws a line between two."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    place, part = divmod(share * (int(ends[-1]) - 1), 1)
    low, high = (values[int(np.searchsorted(ends, at, side="right"))] for at in (place, place + (part > 0)))
    return int(low + (high - low) * part)
