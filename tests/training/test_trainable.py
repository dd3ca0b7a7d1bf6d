"""What a stage trains, in parameters: counts of the card at 7B geometry, names and roles, saved weights that fit."""

import pytest
import torch
from tiny_training import FIRST_NEW_ID, NUM_ROWS, make_stage, tiny_model
from transformers import LlamaConfig

from graftlm.errors import UserError
from graftlm.model.causal import empty_causal, parameter_count
from graftlm.training.trainable import (
    copy_weights,
    learning_roles,
    prepare_model,
    restore_model,
    trainable_parameters,
)

FULL, NEW_ROWS = {"kind": "full"}, {"kind": "new-rows"}
CARD = LlamaConfig(vocab_size=49_954, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)


def lora(**knobs):
    return {"kind": "lora", "rank": 2, "alpha": 4, **knobs}


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        (FULL, 6_885_494_784),
        (lora(rank=64), 569_131_008),
        (lora(rank=8), 429_211_648),
        (NEW_ROWS, 2 * 17_954 * 4096),
    ],
    ids=["full", "r64", "r8", "new-rows"],
)
def test_parameters_that_learn_at_7b_geometry(trains, expected) -> None:
    """The card's counts through our own way of attaching: embedding and head once, nothing doubled."""
    model = prepare_model(empty_causal(CARD), make_stage(trains).trains, 32_000, seed=0)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == expected
    assert parameter_count(model) == 6_885_494_784 + sum(p.numel() for p in learning_roles(model)["adapter"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("trains", "roles"),
    [
        (FULL, {"body", "old_rows", "new_rows"}),
        (lora(), {"adapter", "old_rows", "new_rows"}),
        (lora(rows="new"), {"adapter", "new_rows"}),
        (lora(rows="none"), {"adapter"}),
        (NEW_ROWS, {"new_rows"}),
    ],
)
def test_what_learns_by_role_and_back_to_a_plain_model(trains, roles, tied) -> None:
    plain = tiny_model(tied)
    names = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    section = make_stage(trains).trains
    model = prepare_model(plain, section, FIRST_NEW_ID, seed=0)
    found = learning_roles(model)
    assert {role for role, parameters in found.items() if parameters} == roles
    num_matrices = 1 if tied else 2
    for role, num_rows in (("old_rows", FIRST_NEW_ID), ("new_rows", NUM_ROWS - FIRST_NEW_ID)):
        assert [len(p) for p in found[role]] == ([num_rows] * num_matrices if role in roles else [])
    restored = restore_model(model, section, FIRST_NEW_ID)
    assert {name: tuple(p.shape) for name, p in restored.named_parameters()} == names
    assert all(torch.equal(before[name], tensor) for name, tensor in restored.state_dict().items())
    assert not any(p.requires_grad for p in restored.parameters())


def test_without_new_pieces_everything_is_old_rows() -> None:
    model = prepare_model(tiny_model(), make_stage(FULL).trains, None, seed=0)
    assert [len(p) for p in learning_roles(model)["old_rows"]] == [NUM_ROWS, NUM_ROWS]
    for trains in (NEW_ROWS, lora(rows="new")):
        with pytest.raises(UserError, match="no new pieces"):
            prepare_model(tiny_model(), make_stage(trains).trains, None, seed=0)


def test_saved_weights_must_be_those_that_learn() -> None:
    model = prepare_model(tiny_model(), make_stage(NEW_ROWS).trains, FIRST_NEW_ID, seed=0)
    saved = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
    copy_weights(trainable_parameters(model), saved)
    assert all((p == 1).all() for p in trainable_parameters(model).values())
    name = next(iter(saved))
    with pytest.raises(UserError, match="is on one side only"):
        copy_weights(trainable_parameters(model), {**saved, "more": torch.ones(1)})
    with pytest.raises(UserError, match=r"has shape \[1, 16\], this model's \[8, 16\]"):
        copy_weights(trainable_parameters(model), {**saved, name: torch.ones(1, 16)})
