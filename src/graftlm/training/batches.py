"""From rendered rows to packed micro-batches, a pure function of the step's number.

Owns the order of rows (one permutation an epoch, from the seed) and the packing of a step's rows. Holds no
state: asking for step 700 gives what the 700th step of an uninterrupted run got, which is what makes resuming
exact. Does not know models or text.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from graftlm.device import Precision, wants_few_shapes
from graftlm.errors import UserError
from graftlm.model.packed import PackedLayout, make_layout
from graftlm.text.rows import TokenRows


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed micro-batch: T tokens end to end, N labels; what all rows begin with may lie once at the front.

    `labelled_N` are flat positions whose next token is a target, `targets_N` those tokens' ids, `row_N` the place
    in `row_ids` each label belongs to. The last `num_filled` tokens are of no row and only make the number even.
    """

    ids_1T: torch.Tensor
    layout: PackedLayout
    labelled_N: torch.Tensor
    targets_N: torch.Tensor
    row_N: torch.Tensor
    row_ids: tuple[int, ...]
    num_filled: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch's rows."""
        return self.ids_1T.shape[1] - self.num_filled


def pack(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: places 0..len-1 shared out into bins of at most `budget_tokens`, deterministically."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for place in order:
        found = bisect_left(room, (lengths[place], -1))
        if found == len(room):
            bins.append([place])
            left, number = budget_tokens - lengths[place], len(bins) - 1
        else:
            left, number = room.pop(found)
            bins[number].append(place)
            left -= lengths[place]
        insort(room, (left, number))
    return bins


def shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Places 0..len-1 shared out to ranks so that tokens come out even: the longest first, each to whom has least."""
    found: list[list[int]] = [[] for _ in range(num_ranks)]
    held = [0] * num_ranks
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        rank = min(range(num_ranks), key=lambda rank: (held[rank], rank))
        found[rank].append(place)
        held[rank] += lengths[place]
    return [sorted(places) for places in found]


def common_prefix(rows: TokenRows, row_ids: Sequence[int]) -> int:
    """How many tokens all these rows begin with, short of any target: a template's opening words.

    At least one token that is no prefix is left to every row, to predict its first target from.
    """
    first = rows.row(row_ids[0])[0]
    longest = len(first)
    for row_id in row_ids:
        ids, is_target = rows.row(row_id)
        targets = np.flatnonzero(is_target[1:])
        longest = min(longest, len(ids) - 1, int(targets[0]) if len(targets) else len(ids) - 1)
        different = np.flatnonzero(ids[:longest] != first[:longest])
        longest = int(different[0]) if len(different) else longest
    return longest


@dataclass(frozen=True, slots=True)
class Sparing:
    """How work is spared that changes no result.

    `prefix`: what all rows of a micro-batch begin with is computed once. `last_layer`: it is computed at labelled
    positions only. `like_tokens`: a micro-batch is filled up to a multiple of so many tokens, or to its budget, so that
    its products are of few shapes; dropout of adapters then draws other places.
    """

    prefix: bool = True
    last_layer: bool = True
    like_tokens: int = 1


NO_SPARING = Sparing(False, False)
LIKE_TOKENS = 64
"""Where few shapes are wanted. A step takes 0.94 to 0.96 of the time with it; 32 and 128 do less (docs/log.md)."""
# A last layer needed nearly everywhere is not worth picking positions for.
MOST_LABELLED_SHARE = 0.9


def all_sparing(precision: Precision) -> Sparing:
    """All that spares time where a model computes so and drops nothing out."""
    is_mixed = precision.compute_dtype.itemsize < torch.float32.itemsize
    # Labelled positions, where the last layer's short cut is taken, are another number in each micro-batch.
    few_shapes = wants_few_shapes(precision.device.type == "cpu", is_mixed)
    return Sparing(last_layer=not few_shapes, like_tokens=LIKE_TOKENS if few_shapes else 1)


def make_batch(
    rows: TokenRows,
    row_ids: Sequence[int],
    device: torch.device,
    num_shared: int = 0,
    is_last_layer_sparse: bool = False,
    num_filled: int = 0,
) -> Batch:
    """Lay these rows end to end, the `num_shared` tokens they all begin with once at the front, and behind them
    `num_filled` tokens of no row."""
    pairs = [rows.row(row_id) for row_id in row_ids]
    own = [(ids[num_shared:], is_target[num_shared:]) for ids, is_target in pairs]
    own += _filling(max((ids for ids, _ in own), key=len), num_filled)
    lengths = [len(ids) for ids, _ in own]
    ids_T = torch.from_numpy(np.concatenate([pairs[0][0][:num_shared], *(ids for ids, _ in own)]).astype(np.int64))
    # A row's first token is never predicted: what precedes it in the pack is another row, or a prefix of many.
    is_target_T = np.concatenate([np.zeros(num_shared, bool), *(np.r_[False, is_target[1:]] for _, is_target in own)])
    labelled_N = torch.from_numpy(np.flatnonzero(is_target_T) - 1)
    row_T = torch.repeat_interleave(torch.arange(-1, len(own)), torch.tensor([num_shared, *lengths]))
    is_worth_it = is_last_layer_sparse and len(labelled_N) <= MOST_LABELLED_SHARE * len(ids_T)
    return Batch(
        ids_1T=ids_T[None].to(device),
        layout=make_layout(lengths, device, num_shared, labelled_N if is_worth_it else None),
        labelled_N=labelled_N.to(device),
        targets_N=ids_T[labelled_N + 1].to(device),
        row_N=row_T[labelled_N].to(device),
        row_ids=tuple(row_ids),
        num_filled=num_filled,
    )


def _filling(ids: np.ndarray, num_filled: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """So many tokens as rows that nothing is learned from: beginnings of a row that is there, as other tokens could
    overflow where the row's do not, and nothing times infinity is no number."""
    lengths = [min(len(ids), num_filled - start) for start in range(0, num_filled, len(ids))]
    return [(ids[:length], np.zeros(length, bool)) for length in lengths]


def idle_batch(device: torch.device) -> Batch:
    """A micro-batch of no row: one token that predicts none, so that its loss and all its gradients are zero."""
    one = TokenRows(np.zeros(1, np.uint16), np.zeros(1, bool), np.array([0, 1], np.int64), np.zeros(1, np.int64))
    return replace(make_batch(one, [0], device), row_ids=())


def _packed(
    rows: TokenRows, row_ids: Sequence[int], budget_tokens: int, sparing: Sparing
) -> tuple[int, list[list[int]]]:
    """How many tokens these rows share, and the places in `row_ids` that each micro-batch takes."""
    num_shared = common_prefix(rows, row_ids) if sparing.prefix and row_ids else 0
    lengths = [length - num_shared for length in rows.lengths_of(row_ids)]
    return num_shared, pack(lengths, budget_tokens - num_shared)


def row_batches(
    rows: TokenRows, row_ids: Sequence[int], budget_tokens: int, device: torch.device, sparing: Sparing = Sparing()
) -> list[Batch]:
    """Pack these rows into as few micro-batches as best fit finds."""
    num_shared, packs = _packed(rows, row_ids, budget_tokens, sparing)
    batches = []
    for places in packs:
        row_ids_here = [row_ids[place] for place in places]
        num_tokens = num_shared + sum(length - num_shared for length in rows.lengths_of(row_ids_here))
        num_filled = max(0, min(-num_tokens % sparing.like_tokens, budget_tokens - num_tokens))
        batches.append(make_batch(rows, row_ids_here, device, num_shared, sparing.last_layer, num_filled))
    return batches


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """An epoch's permutation of the rows, asked for several times a step: 4 bytes a row, and two are kept."""
    order = np.arange(num_rows, dtype=np.uint32 if num_rows <= 2**32 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def refuse_rows_beyond(rows: TokenRows, micro_batch_tokens: int, place: str = "stages.NAME") -> None:
    """Raises UserError where a row has more tokens than a micro-batch of the stage at `place` may have."""
    longest = int(rows.lengths.max()) if len(rows) else 0
    if longest > micro_batch_tokens:
        raise UserError(
            f"{place}.micro_batch_tokens is {micro_batch_tokens}, and the longest row has {longest} tokens.",
            f"Run it with {place}.micro_batch_tokens={longest}, or with data.max_tokens={micro_batch_tokens}.",
        )


class Steps:
    """All steps of a stage: which rows each takes, and their micro-batches.

    The rows of a step are the same whatever `num_ranks`; they are shared out by tokens, and `rank` packs its own. With
    `is_even` all ranks take equally many micro-batches: who has fewer rows takes idle ones.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        batch_rows: int,
        micro_batch_tokens: int,
        epochs: float,
        seed: int,
        sparing: Sparing = Sparing(),
        rank: int = 0,
        num_ranks: int = 1,
        is_even: bool = False,
    ) -> None:
        if not len(rows):
            raise UserError("There are no rows to train on.", "See the counts of the data step: why was each dropped?")
        refuse_rows_beyond(rows, micro_batch_tokens)
        if num_ranks > batch_rows:
            raise UserError(
                f"{num_ranks} ranks would share the {batch_rows} rows of a step (batch_rows).",
                f"Take at most {batch_rows} ranks, or set batch_rows to {num_ranks} or more.",
            )
        self.rows = rows
        self.batch_rows = batch_rows
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.sparing = sparing
        self.rank, self.num_ranks, self.is_even = rank, num_ranks, is_even
        self.steps_per_epoch = math.ceil(len(rows) / batch_rows)
        self.num_steps = max(1, round(epochs * self.steps_per_epoch))

    def row_ids(self, step: int) -> list[int]:
        """Rows of the step with this number (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.rows))
        return order[place * self.batch_rows : (place + 1) * self.batch_rows].tolist()

    def rows_of_ranks(self, step: int) -> list[list[int]]:
        """The step's rows that each rank takes, by rank; all of them where there is one."""
        row_ids = self.row_ids(step)
        if self.num_ranks == 1:
            return [row_ids]
        return [
            [row_ids[place] for place in places] for places in shares(self.rows.lengths_of(row_ids), self.num_ranks)
        ]

    def num_targets(self, step: int) -> int:
        """Tokens the whole step learns from, whoever takes them: the loss's one denominator."""
        return sum(int(np.count_nonzero(self.rows.row(row_id)[1][1:])) for row_id in self.row_ids(step))

    def micro_batches(self, step: int, device: torch.device) -> list[Batch]:
        """The step's rows that this rank takes, packed; none where there are fewer rows than ranks, or idle ones."""
        of_ranks = self.rows_of_ranks(step)
        batches = self.packed(of_ranks[self.rank], device)
        if not self.is_even:
            return batches
        # A row without a target adds nothing, and its last layer would give some weights no gradient to be summed.
        batches = [batch if len(batch.targets_N) else idle_batch(device) for batch in batches]
        most = max(len(_packed(self.rows, ids, self.micro_batch_tokens, self.sparing)[1]) for ids in of_ranks)
        return batches + [idle_batch(device)] * (most - len(batches))

    def packed(self, row_ids: Sequence[int], device: torch.device) -> list[Batch]:
        """Rows in micro-batches of this stage's size."""
        return row_batches(self.rows, row_ids, self.micro_batch_tokens, device, self.sparing) if row_ids else []
