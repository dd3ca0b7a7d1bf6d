"""Packed micro-batches: deterministic, within the budget, and a beginning that all rows share lies in each once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from graftlm.device import Precision
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed
from graftlm.text.rows import TokenRows
from graftlm.training.batches import (
    NO_SPARING,
    Sparing,
    Steps,
    _order,
    common_prefix,
    idle_batch,
    make_batch,
    pack,
    row_batches,
)
from graftlm.training.loop import response_loss_sum
from graftlm.training.replay import _row_at
from tests.training.tiny_training import exact_norms, tiny_model

CPU = torch.device("cpu")


def rows_of(rows: list[tuple[list[int], list[int]]]) -> TokenRows:
    """Rows given as ids and mask."""
    ids = np.concatenate([row for row, _ in rows]).astype(np.uint16)
    is_target = np.concatenate([mask for _, mask in rows]).astype(bool)
    offsets = np.r_[0, np.cumsum([len(row) for row, _ in rows])].astype(np.int64)
    return TokenRows(ids, is_target, offsets, np.full(len(rows), 1, np.int64))


FRAMED = rows_of([
    ([1, 5, 6, 7, 20, 21, 2], [0, 0, 0, 0, 0, 1, 1]),
    ([1, 5, 6, 7, 22, 2], [0, 0, 0, 0, 0, 1]),
    ([1, 5, 6, 7, 9, 10, 11, 30, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]),
])  # fmt: skip
LEARNED = rows_of([([1, *range(5, 30)], [0] + [1] * 25)] * 3)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_must_take_equally_many_passes_do(num_ranks: int) -> None:
    """Every row once; whoever has fewer takes passes of no row, without a target."""
    rows = rows_of([([1] * length, [0] + [1] * (length - 1)) for length in (16, 16, 16, 5, 16, 9, 8, 7, 6)])
    given = {"batch_rows": 4, "micro_batch_tokens": 30, "epochs": 1, "seed": 1, "num_ranks": num_ranks}
    of_ranks = [Steps(rows, rank=rank, is_even=True, **given) for rank in range(num_ranks)]
    idle = 0
    for step in range(of_ranks[0].num_steps):
        batches = [steps.micro_batches(step, CPU) for steps in of_ranks]
        assert len({len(own) for own in batches}) == 1
        taken = [row for own in batches for batch in own for row in batch.row_ids]
        assert sorted(taken) == sorted(of_ranks[0].row_ids(step))
        spare = [batch for own in batches for batch in own if not batch.row_ids]
        assert all(len(batch.targets_N) == 0 for batch in spare)
        idle += len(spare)
    assert idle


def test_an_idle_pass_gives_every_weight_a_gradient_of_zero() -> None:
    """What is summed over ranks must be there on all of them."""
    model = tiny_model()
    attend_packed(body_of(model))
    loss = response_loss_sum(model.train(), idle_batch(CPU), Precision(torch.float32, CPU))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_packing_is_deterministic_and_within_the_budget() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 200)]
    bins = pack(lengths, 64)
    assert sorted(place for places in bins for place in places) == list(range(200))
    assert all(sum(lengths[place] for place in places) <= 64 for places in bins)
    assert bins == pack(lengths, 64)
    assert sum(lengths) / (64 * len(bins)) > 0.93


def test_the_order_of_rows_is_the_generators_own_permutation() -> None:
    for seed, epoch, number in ((0, 0, 1), (3, 1, 1000), (7, 2, 70_000)):
        expected = np.random.default_rng([seed, epoch]).permutation(number)
        assert np.array_equal(_order(seed, epoch, number), expected)


def test_the_common_beginning_ends_where_rows_differ() -> None:
    assert common_prefix(FRAMED, [0, 1, 2]) == 4


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([([1, 5, 6], [0, 1, 1]), ([1, 5, 6], [0, 1, 1])], 0),  # what follows the first token is learned
        ([([1, 5, 6, 7], [0, 0, 1, 1]), ([1, 5, 6, 7], [0, 0, 1, 1])], 1),  # the first target needs its own forerunner
        ([([1, 5, 6], [0, 0, 0]), ([1, 5, 6], [0, 0, 0])], 2),  # no target at all: one token stays each row's own
        ([([1], [0]), ([1, 5], [0, 1])], 0),
    ],
)
def test_the_common_beginning_never_holds_what_a_target_is_predicted_from(
    rows: list[tuple[list[int], list[int]]], expected: int
) -> None:
    assert common_prefix(rows_of(rows), range(len(rows))) == expected


def test_the_last_layer_is_whole_where_nearly_every_position_is_labelled() -> None:
    few, most = (make_batch(rows, [0, 1, 2], CPU, is_last_layer_sparse=True) for rows in (FRAMED, LEARNED))
    assert torch.equal(few.layout.ends_at_N, few.labelled_N)
    assert most.layout.ends_at_N is None


def test_a_batch_names_the_same_targets_with_and_without_sharing() -> None:
    plain, shared = (make_batch(FRAMED, [0, 1, 2], CPU, num_shared) for num_shared in (0, 4))
    assert torch.equal(plain.targets_N, shared.targets_N)
    assert torch.equal(plain.row_N, shared.row_N)
    before = [batch.ids_1T[0, batch.labelled_N] for batch in (plain, shared)]
    assert torch.equal(*before)
    assert plain.num_tokens - shared.num_tokens == 2 * 4
    positions = [batch.layout.positions_1T[0, batch.labelled_N] for batch in (plain, shared)]
    assert torch.equal(*positions)


@pytest.mark.parametrize("sparing", [Sparing(like_tokens=8), Sparing(prefix=False, like_tokens=8)])
@pytest.mark.parametrize("budget", [15, 64])
def test_a_micro_batch_is_filled_up_to_a_multiple_or_to_its_budget(budget: int, sparing: Sparing) -> None:
    """With beginnings of a row that is there, behind all rows, and without a target."""
    plain = row_batches(FRAMED, [0, 1, 2], budget, CPU, replace(sparing, like_tokens=1))
    filled = row_batches(FRAMED, [0, 1, 2], budget, CPU, sparing)
    assert any(batch.num_filled for batch in filled)
    for without, batch in zip(plain, filled, strict=True):
        in_all = batch.ids_1T.shape[1]
        assert in_all == min(budget, -(-without.num_tokens // 8) * 8)
        assert batch.num_tokens == without.num_tokens == in_all - batch.num_filled
        assert torch.equal(batch.ids_1T[:, : batch.num_tokens], without.ids_1T)
        assert torch.equal(batch.layout.positions_1T[:, : batch.num_tokens], without.layout.positions_1T)
        for name in ("labelled_N", "targets_N", "row_N"):
            assert torch.equal(getattr(batch, name), getattr(without, name))
        assert batch.row_ids == without.row_ids
        added = batch.ids_1T[0, batch.num_tokens :].tolist()
        longest = max((FRAMED.row(row_id)[0][batch.layout.num_shared :].tolist() for row_id in batch.row_ids), key=len)
        assert added == (longest * 8)[: len(added)]


@pytest.mark.parametrize("sparing", [Sparing(like_tokens=64), Sparing(prefix=False, like_tokens=64)])
def test_every_token_of_a_filled_micro_batch_is_some_rows(sparing: Sparing) -> None:
    """So that a number that is not finite is told of a row, wherever it is met first."""
    steps = Steps(FRAMED, batch_rows=3, micro_batch_tokens=64, epochs=1, seed=0, sparing=sparing)
    (batch,) = steps.micro_batches(0, CPU)
    assert batch.ids_1T.shape[1] == 64
    for place, (token, position) in enumerate(zip(batch.ids_1T[0], batch.layout.positions_1T[0], strict=True)):
        row_id, at = _row_at(steps, batch, place)
        assert (FRAMED.row(row_id)[0][at], at) == (token, position)


@pytest.mark.parametrize("budget", [9, 12, 64])
def test_work_left_out_changes_neither_loss_nor_gradients(budget: int) -> None:
    found = []
    filled = (Sparing(like_tokens=7), Sparing(prefix=False, last_layer=False, like_tokens=64))
    for sparing in (NO_SPARING, Sparing(prefix=True, last_layer=False), Sparing(), *filled):
        model = exact_norms(tiny_model().double())
        attend_packed(model.get_decoder())
        precision = Precision(torch.float64, CPU)
        losses = [response_loss_sum(model, b, precision) for b in row_batches(FRAMED, [0, 1, 2], budget, CPU, sparing)]
        sum(losses).backward()
        found.append((sum(losses).item(), [p.grad for p in model.parameters()]))
    (plain_loss, plain), *others = found
    for loss, spared in others:
        assert loss == pytest.approx(plain_loss, rel=1e-12)
        for a, b in zip(plain, spared, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * a.abs().max().item())
