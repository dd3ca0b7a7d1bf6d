"""Matrices laid out for talking hold and give the same numbers."""

import copy

import pytest
import torch

from graftlm.model.causal import new_causal
from graftlm.talk.layout import lay_out_for_talking


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_laid_out_gives_the_same_logits(is_tied: bool) -> None:
    model = new_causal(
        num_rows=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, is_tied=is_tied, seed=1
    )
    laid_out = copy.deepcopy(model)
    lay_out_for_talking(laid_out)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(laid_out(ids).logits, model(ids).logits)
    for name, parameter in model.named_parameters():
        assert torch.equal(laid_out.get_parameter(name), parameter)
    strides = {name: parameter.stride() for name, parameter in laid_out.named_parameters()}
    assert strides["model.layers.0.mlp.up_proj.weight"] == (1, 32)
    if is_tied:
        assert strides["model.embed_tokens.weight"] == (16, 1)
    else:
        assert strides["lm_head.weight"] == (1, 50)
