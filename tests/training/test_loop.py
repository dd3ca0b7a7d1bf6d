"""The loop's laws: packing and accumulation change no gradient, no row sees another, bad steps touch nothing."""

import math

import pytest
import torch
from tiny_training import exact_norms, make_rows, tiny_model
from torch.nn.functional import cross_entropy

from graftlm.device import Precision
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed
from graftlm.text.rows import TokenRows
from graftlm.training import loop as loop_module
from graftlm.training.batches import Sparing, Steps, row_batches
from graftlm.training.loop import StepRecord, response_loss_sum, train
from graftlm.training.parts import parts_of
from graftlm.training.ranks import ALONE

CPU = torch.device("cpu")
# What the sums' order alone may change. Source: eps of each dtype times the depth of the tiny model, measured.
TOLERANCES = [
    pytest.param(torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, 2e-5, id="fp32"),
    pytest.param(torch.bfloat16, 4e-2, id="bf16"),
    pytest.param(torch.float16, 1e-2, id="fp16"),
]


def trainable_model(dtype: torch.dtype, tied: bool = False):
    model = tiny_model(tied)
    if dtype == torch.float64:
        model = exact_norms(model.double())
    attend_packed(body_of(model))
    return model.train()


def gradients(model, batches, precision: Precision) -> dict[str, torch.Tensor]:
    """Mean-loss gradients over micro-batches, as the loop accumulates them."""
    num_targets = sum(len(batch.targets_N) for batch in batches)
    factor = precision.grad_factor(num_targets)
    model.zero_grad()
    for batch in batches:
        (response_loss_sum(model, batch, precision, factor) * factor).backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - e).norm() / e.norm()).item() for name, e in expected.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_packed_accumulated_and_plain_gradients_are_one(dtype: torch.dtype, tolerance: float, tied: bool) -> None:
    """All rows in one pack, in several, each alone, and filled up; against transformers row by row in float64."""
    rows = make_rows(12)
    model, precision = trainable_model(dtype, tied), Precision(dtype, CPU)
    longest = int(rows.lengths.max())
    packed, several, alone = (
        gradients(model, row_batches(rows, range(12), budget, CPU), precision) for budget in (10_000, longest, 1)
    )
    filled = gradients(model, row_batches(rows, range(12), 10_000, CPU, Sparing(like_tokens=64)), precision)
    reference = plain_gradients(exact_norms(tiny_model(tied).double()), rows)
    assert worst_error(several, packed) <= tolerance
    assert worst_error(alone, packed) <= tolerance
    assert worst_error(filled, packed) <= tolerance
    assert worst_error(packed, reference) <= tolerance


def plain_gradients(model, rows: TokenRows) -> dict[str, torch.Tensor]:
    loss, num_targets = torch.zeros((), dtype=torch.float64), 0
    for number in range(len(rows)):
        ids, is_target = (torch.tensor(one.tolist()) for one in rows.row(number))
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        each = cross_entropy(logits, ids[1:].long(), reduction="none")
        loss = loss + (each * is_target[1:]).sum()
        num_targets += int(is_target[1:].sum())
    (loss / num_targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it() -> None:
    rows, model, precision = make_rows(12), trainable_model(torch.float32), Precision(torch.float32, CPU)
    together = sum(gradients_of_row(model, rows, [0, 5, 7], precision).values())
    apart = sum(sum(gradients_of_row(model, rows, [row], precision).values()) for row in (0, 5, 7))
    assert together == pytest.approx(apart, rel=1e-5)


def gradients_of_row(model, rows: TokenRows, row_ids: list[int], precision: Precision) -> dict[int, float]:
    with torch.no_grad():
        return {
            number: response_loss_sum(model, batch, precision).item()
            for number, batch in enumerate(row_batches(rows, row_ids, 10_000, CPU))
        }


def run_steps(rows: TokenRows, micro_batch_tokens: int = 24, **keys) -> tuple[list[StepRecord], torch.nn.Module]:
    """Three steps of AdamW, at a constant rate."""
    model = keys.pop("model", None) or trainable_model(torch.float32)
    steps = Steps(rows, batch_rows=4, micro_batch_tokens=micro_batch_tokens, epochs=1, seed=0)
    records: list[StepRecord] = []
    given = {
        "first_step": 0, "num_updates": 0, "lr_at": lambda _: 1.0,
        "optimizer": torch.optim.AdamW([{"params": list(model.parameters()), "peak_lr": 1e-2}], weight_decay=0.0),
        "parts": parts_of(model, ALONE), "precision": Precision(torch.float32, CPU),
        "max_grad_norm": 1e9, "on_step": [records.append], **keys,
    }  # fmt: skip
    train(model, steps, **given)
    return records, model


def test_accumulated_steps_are_whole_steps() -> None:
    """Loss, gradient norm and weights after three optimizer steps, in many micro-batches or one."""
    (few, one), (many, other) = run_steps(make_rows(), 10_000), run_steps(make_rows(), 12)
    for a, b in zip(few, many, strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)
        assert (a.num_rows, a.num_targets) == (b.num_rows, b.num_targets)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


def test_a_bad_batch_touches_nothing_and_does_not_move_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """N1, N5: NaN in one micro-batch of a step skips that step whole; the next goes on from the same weights."""
    real, seen, rates = loop_module.response_loss_sum, [], []
    model = trainable_model(torch.float32)

    def spoiled(model, *given, **how):
        loss = real(model, *given, **how)
        is_bad = len(seen) == 1 and not rates[1:]
        return loss + math.nan * next(model.parameters()).sum() if is_bad else loss

    def rate(num_updates: int) -> float:
        rates.append(num_updates)
        return 1.0

    monkeypatch.setattr(loop_module, "response_loss_sum", spoiled)
    records, _ = run_steps(
        make_rows(),
        model=model,
        lr_at=rate,
        on_step=[lambda r: seen.append((r, [p.clone() for p in model.parameters()]))],
    )
    assert records == []
    assert [record.skipped for record, _ in seen] == [False, True, False]
    assert [record.num_updates for record, _ in seen] == [1, 1, 2]
    assert rates == [0, 1, 1]
    after = [weights for _, weights in seen]
    assert all(torch.equal(a, b) for a, b in zip(after[0], after[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after[1], after[2], strict=True))
    assert all(torch.isfinite(p).all() for p in after[2])
    assert math.isnan(seen[1][0].loss)


def test_rows_without_a_label_cost_nothing_and_are_no_nan() -> None:
    """B3: a step whose rows have no target: loss 0, gradient 0, weights as they were."""
    rows = make_rows()
    empty = TokenRows(rows.ids, rows.is_target & False, rows.offsets, rows.target_bytes)
    before = [p.clone() for p in trainable_model(torch.float32).parameters()]
    records, model = run_steps(empty)
    assert [(record.loss, record.grad_norm, record.num_targets) for record in records] == [(0.0, 0.0, 0)] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_first_token_is_never_predicted() -> None:
    """What precedes it in a pack is another row's end."""
    rows = make_rows()
    marked = TokenRows(rows.ids, rows.is_target | True, rows.offsets, rows.target_bytes)
    (batch,) = row_batches(marked, range(12), 10_000, CPU)
    assert len(batch.targets_N) == marked.num_tokens - len(marked)


def test_records_tell_what_the_step_did() -> None:
    records, _ = run_steps(make_rows())
    assert [record.step for record in records] == [1, 2, 3]
    assert sum(record.num_rows for record in records) == 12
    assert all(record.grad_norm == pytest.approx(math.hypot(*record.grad_norms.values())) for record in records)
    assert all(record.lr == 1e-2 and record.loss_scale == 1.0 for record in records)
