"""Counting what becomes of rows: how many for each reason, and where the first of them stand."""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_EXAMPLES = 3


@dataclass(slots=True)
class Tally:
    """Number of rows by reason, with up to three examples (`file:line`) of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < NUM_EXAMPLES:
            shown.append(where)

    def merge(self, other: Tally) -> None:
        """Count what `other` counted too."""
        for reason, number in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + number
            shown = self.examples.setdefault(reason, [])
            shown += other.examples[reason][: NUM_EXAMPLES - len(shown)]

    @property
    def told(self) -> str:
        """The counts in words."""
        return ", ".join(f"{reason} ({number:,})" for reason, number in self.counts.items())

    @property
    def total(self) -> int:
        """Rows counted, whatever the reason."""
        return sum(self.counts.values())
