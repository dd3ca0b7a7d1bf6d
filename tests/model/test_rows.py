"""Split rows: the same model with old and new rows as parameters of their own."""

import copy

import pytest
import torch

from graftlm.model.causal import head_weight, is_tied, new_causal
from graftlm.model.rows import (
    head_rows,
    join_rows,
    joined,
    lay_rows_together,
    parameter_groups_by_role,
    split_rows,
    touch_only_rows_read,
)

NUM_OLD, NUM_ROWS = 40, 64
IDS = torch.tensor([[1, 5, 45, 63, 39, 40, 2]])


def small_model(is_tied=False):
    return new_causal(
        num_rows=NUM_ROWS, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, is_tied=is_tied
    )


def loss_of(model):
    hidden = model.get_decoder()(IDS).last_hidden_state[0, :-1]
    return torch.nn.functional.cross_entropy(hidden @ head_weight(model).T, IDS[0, 1:])


@pytest.mark.parametrize("tied", [False, True])
def test_split_changes_no_number(tied):
    model = small_model(tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(IDS).logits
    loss_of(model).backward()
    embedding_grad = model.get_input_embeddings().weight.grad.clone()
    split_rows(model, NUM_OLD)
    assert torch.equal(model(IDS).logits, logits)
    loss_of(model).backward()
    roles = {role: dict(named) for role, named in parameter_groups_by_role(model).items()}
    name = "model.embed_tokens.parametrizations.weight.original"
    assert torch.equal(roles["old_rows"][f"{name}0"].grad, embedding_grad[:NUM_OLD])
    assert torch.equal(roles["new_rows"][f"{name}1"].grad, embedding_grad[NUM_OLD:])
    join_rows(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert is_tied(model) is tied
    assert (head_weight(model) is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("learning", [("old_rows", "new_rows"), ("new_rows",)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rows_read_alone_are_touched_to_the_same_gradients(tied, learning, dtype, rtol):
    """Over several micro-batches, some ids read twice, most never; 16 bits under autocast, as a stage computes them."""
    models = []
    for is_on in (False, True):
        model = small_model(tied).to(torch.promote_types(dtype, torch.float32))
        split_rows(model, NUM_OLD)
        roles = parameter_groups_by_role(model)
        for role in {"old_rows", "new_rows"} - set(learning):
            for _, parameter in roles[role]:
                parameter.requires_grad_(False)
        touch_only_rows_read(model, is_on)
        for ids in (IDS, torch.tensor([[1, 5, 5, 44, 44, 7]]), torch.tensor([[1, 5, 6, 2]])):
            with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
                logits = model(ids).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:]).backward()
        models.append(model)
    whole, touched = ({name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models)
    assert any("embed_tokens" in name for name in whole)
    for name, expected in whole.items():
        found = touched[name]
        assert not found.is_sparse
        assert (found - expected).norm() <= rtol * expected.norm(), name
        if "embed_tokens" in name and not tied:
            assert ((found == 0) == (expected == 0)).all()


def test_a_second_micro_batch_adds_to_the_gradient_that_is_there():
    model = small_model()
    split_rows(model, NUM_OLD)
    touch_only_rows_read(model, True)
    loss_of(model).backward()
    parts = model.get_input_embeddings().parametrizations.weight
    first = [parts.original0.grad, parts.original1.grad]
    once = [grad.clone() for grad in first]
    loss_of(model).backward()
    for part, grad, before in zip((parts.original0, parts.original1), first, once, strict=True):
        assert part.grad is grad
        assert torch.allclose(grad, 2 * before, rtol=1e-6)
        assert before.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_frozen_old_rows_stay_bit_for_bit_while_new_ones_learn(tied, weight_decay):
    model = small_model(tied)
    model.requires_grad_(False)
    before = model.get_input_embeddings().weight.clone(), head_weight(model).clone()
    split_rows(model, NUM_OLD)
    new_rows = [p for _, p in parameter_groups_by_role(model)["new_rows"]]
    for parameter in new_rows:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(new_rows, lr=0.1, weight_decay=weight_decay)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    join_rows(model)
    after = model.get_input_embeddings().weight, head_weight(model)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now[:NUM_OLD], was[:NUM_OLD])
        assert not torch.equal(now[NUM_OLD:], was[NUM_OLD:])


def test_neighbours_are_joined_where_they_lie_and_others_are_copied():
    whole = torch.randn(10, 3)
    neighbours, strangers, swapped = [whole[:4], whole[4:]], [whole[:4], whole[5:]], [whole[4:], whole[:4]]
    assert joined(neighbours).data_ptr() == whole.data_ptr()
    for parts in (
        neighbours,
        strangers,
        swapped,
        [whole[:, :2], whole[:, 2:]],
        [whole[:4], whole[4:].double()],
        [whole],
    ):
        if parts[0].shape[1] == parts[-1].shape[1]:
            assert torch.equal(joined(parts), torch.cat(parts))
    assert joined(strangers).data_ptr() != whole.data_ptr()


@pytest.mark.parametrize("tied", [False, True])
def test_split_rows_lie_together_again_after_a_move(tied):
    model = small_model(tied)
    split_rows(model, NUM_OLD)
    assert torch.equal(joined(head_rows(model)), head_weight(model))
    assert joined(head_rows(model)).data_ptr() == head_rows(model)[0].data_ptr()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert joined(head_rows(model)).data_ptr() != head_rows(model)[0].data_ptr()
    lay_rows_together(model)
    assert joined(head_rows(model)).data_ptr() == head_rows(model)[0].data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    logits = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, logits)
    with torch.no_grad():
        head_rows(model)[1].add_(1.0)
    assert not torch.equal(model(IDS).logits, logits)


def test_roles_hold_every_parameter_once():
    for tied in (False, True):
        model = small_model(tied)
        whole = {role: [n for n, _ in named] for role, named in parameter_groups_by_role(model).items()}
        matrices = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
        assert whole["old_rows"] == matrices
        assert whole["new_rows"] == whole["adapter"] == []
        split_rows(model, NUM_OLD)
        roles = parameter_groups_by_role(model)
        assert len(roles["old_rows"]) == len(roles["new_rows"]) == len(matrices)
        assert {len(p) for _, p in roles["new_rows"]} == {NUM_ROWS - NUM_OLD}
        held = [id(p) for named in roles.values() for _, p in named]
        assert sorted(held) == sorted({id(p) for p in model.parameters()})


def test_rows_joined_after_freezing_are_parameters_still():
    model = small_model()
    model.requires_grad_(False)
    split_rows(model, NUM_OLD)
    join_rows(model)
    assert "model.embed_tokens.weight" in dict(model.named_parameters())
    assert "lm_head.weight" in model.state_dict()
    assert not head_weight(model).requires_grad
