"""Held-out losses: those of plain transformers row by row, whatever the packing; per byte of the text they predict."""

import math

import numpy as np
import pytest
import torch
from tiny_training import make_rows, tiny_model
from torch.nn.functional import cross_entropy

from graftlm.device import Precision
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed
from graftlm.training.heldout import RowLosses, heldout_losses

FP32 = Precision(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("budget_tokens", [1, 20, 10_000])
def test_each_rows_loss_is_that_of_the_row_alone(budget_tokens: int) -> None:
    """A row longer than the budget is read all the same."""
    rows, model = make_rows(), tiny_model()
    expected = []
    for number in range(len(rows)):
        ids, is_target = (torch.tensor(one.tolist()) for one in rows.row(number))
        with torch.no_grad():
            each = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:].long(), reduction="none")
        expected.append((each * is_target[1:]).sum().item())
    attend_packed(body_of(model))
    model.train()
    found = heldout_losses(model, rows, FP32, budget_tokens)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.num_targets.tolist() == [int(rows.row(n)[1][1:].sum()) for n in range(len(rows))]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_reading_is_without_dropout_and_leaves_the_mode() -> None:
    model = tiny_model()
    attend_packed(body_of(model))
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Dropout(0.5)
    model.eval()
    first, second = (heldout_losses(model, make_rows(), FP32, 64).nats for _ in range(2))
    assert np.array_equal(first, second)
    assert not model.training


def test_figures_are_by_target_and_by_byte() -> None:
    losses = RowLosses(np.array([2.0, 6.0]), np.array([2, 2]), np.array([1, 7]))
    assert losses.loss_per_target == 2.0
    assert losses.bits_per_byte == pytest.approx(1 / math.log(2))
    empty = RowLosses(np.zeros(1), np.zeros(1), np.zeros(1))
    assert (empty.loss_per_target, empty.bits_per_byte) == (0.0, 0.0)
