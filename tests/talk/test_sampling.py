"""Sampling: cuts, penalty, seeds, refused values."""

import pytest
import torch

from graftlm.errors import UserError
from graftlm.talk.sampling import Draw, Sampling

LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03]).log()[None]


def drawn(sampling: Sampling, num_draws: int = 4000) -> torch.Tensor:
    """Shares of each id over many draws."""
    draw = Draw(sampling, 1)
    ids = [draw.next_ids(LOGITS.clone(), [0], [[]])[0] for _ in range(num_draws)]
    return torch.bincount(torch.tensor(ids), minlength=5) / num_draws


def test_draws_follow_the_probabilities() -> None:
    assert torch.allclose(drawn(Sampling(temperature=1.0)), LOGITS.exp()[0], atol=0.03)


def test_temperature_sharpens() -> None:
    expected = (LOGITS[0] / 0.5).softmax(-1)
    assert torch.allclose(drawn(Sampling(temperature=0.5)), expected, atol=0.03)


def test_zero_temperature_is_greedy() -> None:
    assert drawn(Sampling(temperature=0.0), 5).tolist() == [1, 0, 0, 0, 0]


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert (drawn(Sampling(temperature=1.0, top_k=3)) > 0).tolist() == [True, True, True, False, False]
    assert (drawn(Sampling(temperature=1.0, top_p=0.6)) > 0).sum() == 2
    assert drawn(Sampling(temperature=1.0, top_p=0.01), 50).tolist() == [1, 0, 0, 0, 0]


def test_penalty_pushes_down_what_was_said() -> None:
    draw = Draw(Sampling(repetition_penalty=5.0), 2)
    logits = torch.tensor([[2.0, 1.9, -1.0], [-0.1, -0.3, -0.4]])
    assert draw.next_ids(logits, [0, 1], [[0, 0], [0]]) == [1, 1]


def test_a_row_draws_the_same_in_any_batch() -> None:
    alone = Draw(Sampling(temperature=1.0, seed=5), 1)
    together = Draw(Sampling(temperature=1.0, seed=5), 3)
    for _ in range(20):
        one = alone.next_ids(LOGITS.clone(), [0], [[]])[0]
        assert together.next_ids(LOGITS.repeat(2, 1), [2, 0], [[], []]) == [one, one]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1},
              {"repetition_penalty": 0.0}, {"max_new_tokens": 0}],
)  # fmt: skip
def test_impossible_values_are_told(wrong: dict) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} is {value}"):
        Sampling(**wrong)
