"""Who is in the batch: the rows under way, the slots they lie in, and the memory they take.

Owns the order of rows (speaking before reading, without a gap), what one step reads of whose prompt, and what a row
takes over from others that have read the same words. Does not know threads, queues or how a token is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graftlm.talk.sampling import Draw
from graftlm.talk.serving.slots import Slots, rounded_places
from graftlm.talk.serving.speech import Ask, Piece, Speech

# Tokens of prompts read between two steps of those who speak, padding included.
READ_TOKENS = 512
# Fewer tokens in common are sooner computed than copied.
LEAST_SHARED = 16

Sink = Callable[[Piece | None], None]


@dataclass(slots=True)
class Ticket:
    """The answers of one request; cancelled, they end within a step."""

    is_cancelled: bool = False


@dataclass(slots=True)
class Counts:
    """What the engine has done so far."""

    prompt_tokens: int = 0
    prompt_tokens_shared: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    preempted: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """One answer under way: its tokens, and how it draws and shows them."""

    ask: Ask
    index: int
    ticket: Ticket
    sink: Sink
    draw: Draw
    speech: Speech
    ids: list[int]
    said: list[int] = field(default_factory=list)
    started: float = 0.0
    is_reading: bool = True
    order: int = 0


class Batch:
    """The rows in the slots of one model: `rows` in the order of their slots, those who speak first."""

    def __init__(self, slots: Slots, max_rows: int, budget_tokens: int, counts: Counts) -> None:
        self.rows: list[Row] = []
        self._slots, self._counts = slots, counts
        self._max_rows, self._budget_tokens = max_rows, budget_tokens
        self._num_joined = 0

    @property
    def num_speaking(self) -> int:
        """How many rows have read their prompts."""
        return sum(not row.is_reading for row in self.rows)

    def has_room_for(self, row: Row) -> bool:
        """Whether `row` may join. One always may, or nothing could ever be answered."""
        if not self.rows:
            return True
        return len(self.rows) < self._max_rows and self._tokens_of([*self.rows, row]) <= self._budget_tokens

    def join(self, row: Row) -> None:
        """Take a row in, behind all others: it begins to read, again if it was put out before."""
        row.is_reading = True
        self._num_joined += 1
        row.order = self._num_joined
        self._slots.join()
        self.rows.append(row)

    def _tokens_of(self, rows: Sequence[Row]) -> int:
        """Tokens of memory these rows take together: each as much as the longest, one more token included."""
        return len(rows) * rounded_places(max(len(row.ids) for row in rows) + 1)

    def leave(self, row: Row) -> None:
        """Take a row out; others move so that speaking rows stay before reading ones, without a gap."""
        hole, num_speaking = self.rows.index(row), self.num_speaking
        moves = [num_speaking - 1, len(self.rows) - 1] if hole < num_speaking else [len(self.rows) - 1]
        for source in moves:
            if source != hole:
                self._slots.move(source, hole)
                self.rows[hole] = self.rows[source]
            hole = source
        self._slots.drop_last()
        self.rows.pop()

    def put_out(self) -> list[Row]:
        """Take the latest rows out until the rest fits into memory; those taken out, the latest first."""
        taken_out = []
        while len(self.rows) > 1 and self._tokens_of(self.rows) > self._budget_tokens:
            row = max(self.rows, key=lambda row: row.order)
            self.leave(row)
            self._counts.preempted += 1
            taken_out.append(row)
        return taken_out

    def reserve(self) -> None:
        """Take the memory of the step to come. Raises whatever the system does that promised it."""
        if self.rows:
            longest = max(len(row.ids) for row in self.rows)
            self._slots.reserve(len(self.rows), longest, self._budget_tokens)

    def readers(self) -> list[Row]:
        """Who reads in this step: one with a long prompt, a part of it, or several with short ones, all of them."""
        chosen: list[Row] = []
        most = max((len(row.ids) for row in self.rows), default=0)  # places that are there
        longest = last_start = 0
        for slot, row in enumerate(self.rows[self.num_speaking :], start=self.num_speaking):
            if self._slots.length(slot) == 0 and not self._begin(slot, row, chosen):
                break
            start = self._slots.length(slot)
            longest, last_start = max(longest, len(row.ids) - start), max(last_start, start)
            if chosen and (longest * (len(chosen) + 1) > READ_TOKENS or last_start + longest > most):
                break
            chosen.append(row)
            if longest > READ_TOKENS:
                break
        return chosen

    def _begin(self, slot: int, row: Row, chosen: list[Row]) -> bool:
        """Take over what others have read of the same words: a template's frame, a prompt of several choices.

        False: more of it is about to be read in this very step; better wait for that.
        """
        most = len(row.ids) - 1  # the last token must be read, for what follows it
        soon = max((num_shared(row.ids, other.ids, most) for other in chosen), default=0)
        now, source = 0, slot
        for place, other in enumerate(self.rows):
            shared = num_shared(row.ids, other.ids, min(most, self._slots.length(place)))
            if shared > now:
                now, source = shared, place
        if soon >= now + LEAST_SHARED:
            return False
        if now >= LEAST_SHARED:
            self._slots.begin_like(slot, source, now)
            self._counts.prompt_tokens_shared += now
        return True

    def unread(self, rows: Sequence[Row], first: int) -> tuple[list[list[int]], bool]:
        """What rows of neighbouring slots read in this step, and whether nothing is then left to read of any."""
        starts = [self._slots.length(slot) for slot in range(first, first + len(rows))]
        parts = [row.ids[start : start + READ_TOKENS] for row, start in zip(rows, starts, strict=True)]
        # A prompt read in parts is alone, or the last.
        return parts, starts[-1] + len(parts[-1]) == len(rows[-1].ids)


def num_shared(ids: list[int], others: list[int], most: int) -> int:
    """How many of the first `most` tokens are the same, found by halving."""
    low, high = 0, min(most, len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
