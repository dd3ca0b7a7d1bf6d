"""The fused head and loss equal the plain ones."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from graftlm.model import loss as loss_module
from graftlm.model.loss import chunk_rows, chunks_of, linear_cross_entropy_sum, target_losses

TOLERANCE = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCE)
def test_equals_plain_cross_entropy(dtype: torch.dtype, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 16 * 4 * 50)
    monkeypatch.setitem(loss_module.BLOCK_BYTES, "cpu", 5 * 4 * 50)
    torch.manual_seed(0)
    hidden = torch.randn(70, 12, dtype=torch.float64)
    weight = torch.randn(50, 12, dtype=torch.float64)
    targets = torch.randint(0, 50, (70,))
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum")
    (expected * 0.37).backward()
    master = torch.float64 if dtype == torch.float64 else torch.float32
    ours = [hidden.to(master).requires_grad_(), weight.to(master).requires_grad_()]
    found = linear_cross_entropy_sum(ours[0], [ours[1]], targets, dtype, expected_grad=0.37)
    (found * 0.37).backward()
    assert found.item() == pytest.approx(expected.item(), rel=rtol)
    for mine, reference in zip(ours, plain, strict=True):
        error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error <= rtol
    each = target_losses(ours[0], ours[1], targets, dtype)
    assert each.sum().item() == pytest.approx(expected.item(), rel=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCE)
@pytest.mark.parametrize("learns", [(False, True), (True, False), (True, True), (False, True, False, True)])
def test_a_head_in_parts_gives_each_learning_part_its_gradient(
    dtype: torch.dtype, rtol: float, learns: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 16 * 4 * 50)
    monkeypatch.setitem(loss_module.BLOCK_BYTES, "cpu", 5 * 4 * 50)
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    targets = torch.randint(0, 50, (70,))
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum").backward()
    master = torch.float64 if dtype == torch.float64 else torch.float32
    mine, whole = hidden.to(master).requires_grad_(), weight.to(master)
    sizes = (13, 37) if len(learns) == 2 else (13, 20, 7, 10)
    parts = [rows.requires_grad_(is_learning) for rows, is_learning in zip(whole.split(sizes), learns, strict=True)]
    linear_cross_entropy_sum(mine, parts, targets, dtype).backward()
    found = [mine.grad, *(part.grad for part in parts)]
    for grad, reference, is_learning in zip(
        found, [plain[0].grad, *plain[1].grad.split(sizes)], (True, *learns), strict=True
    ):
        if not is_learning:
            assert grad is None
        else:
            assert (grad.double() - reference).norm() <= rtol * reference.norm()


def test_another_backward_factor_than_expected_is_still_right() -> None:
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 4])
    linear_cross_entropy_sum(hidden, [weight], targets, torch.float64, expected_grad=0.5).backward()
    fused, hidden.grad = hidden.grad, None
    cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert torch.allclose(fused, hidden.grad, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCE)
@pytest.mark.parametrize("learns", [(True, True), (False, True)])
def test_a_second_micro_batch_adds_to_the_gradient_that_lies_there(
    dtype: torch.dtype, rtol: float, learns: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as much memory would be a second matrix of the head's size."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 16 * 4 * 50)
    torch.manual_seed(0)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    micro_batches = [(torch.randn(count, 12, dtype=master), torch.randint(0, 50, (count,))) for count in (40, 0, 23)]
    whole = torch.randn(50, 12, dtype=master)

    def gradients(adds_to_grads: bool) -> list[torch.Tensor | None]:
        parts = [rows.clone().requires_grad_(own) for rows, own in zip(whole.split((13, 37)), learns, strict=True)]
        places = []
        for hidden, targets in micro_batches:
            loss = linear_cross_entropy_sum(hidden, parts, targets, dtype, 0.5, adds_to_grads=adds_to_grads)
            (loss * 0.5).backward()
            places.append([None if part.grad is None else part.grad.data_ptr() for part in parts])
        assert not adds_to_grads or places[0] == places[1] == places[2]
        return [part.grad for part in parts]

    for found, plain, is_learning in zip(gradients(True), gradients(False), learns, strict=True):
        assert (found is not None) == is_learning
        if found is not None:
            assert found.dtype == plain.dtype
            assert (found - plain).norm() <= rtol * plain.norm()


def test_another_factor_than_that_of_a_gradient_added_to_is_refused() -> None:
    hidden, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4])
    weight = torch.randn(7, 4, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    loss = linear_cross_entropy_sum(hidden, [weight], targets, torch.float32, adds_to_grads=True)
    with pytest.raises(RuntimeError, match="factor"):
        (loss * 0.5).backward()


def test_where_no_backward_can_follow_no_gradient_is_touched() -> None:
    weight = torch.randn(7, 4, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        linear_cross_entropy_sum(torch.randn(5, 4), [weight], torch.arange(5), torch.float32, adds_to_grads=True)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_no_label_gives_zero_not_nan() -> None:
    """B3: a batch without labels."""
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, [torch.randn(7, 4)], torch.zeros(0, dtype=torch.long), torch.float32)
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 500, 607, 1300])
def test_chunks_hold_all_labels_and_in_16_bits_on_a_cpu_are_of_few_sizes(count: int) -> None:
    for logit_bytes, device in ((2, "cpu"), (4, "cpu"), (2, "cuda")):
        size, filled = chunks_of(count, 55_296, logit_bytes, device)
        assert count <= filled < count + max(size, 1)
        assert size == 0 or filled % size == 0
        assert size <= chunk_rows(55_296, logit_bytes, device) + 31
        if (logit_bytes, device) == (2, "cpu"):
            assert size % 32 == 0
