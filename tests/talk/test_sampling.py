"""Sampling: cuts, penalty, seeds, refused values."""

import pytest
import torch

from graftlm.errors import UserError
from graftlm.talk.sampling import Draw, Sampling, _sample, draw_ids

LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03]).log()[None]


def drawn(sampling: Sampling, num_draws: int = 4000) -> torch.Tensor:
    """Shares of each id over many draws."""
    draw = Draw(sampling)
    ids = [draw_ids(LOGITS.clone(), [draw], [[]])[0] for _ in range(num_draws)]
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
    for top_p in (0.01, 0.0):
        assert drawn(Sampling(temperature=1.0, top_p=top_p), 50).tolist() == [1, 0, 0, 0, 0]


def test_penalty_pushes_down_what_was_said() -> None:
    draws = [Draw(Sampling(repetition_penalty=5.0)) for _ in range(2)]
    logits = torch.tensor([[2.0, 1.9, -1.0], [-0.1, -0.3, -0.4]])
    assert draw_ids(logits, draws, [[0, 0], [0]]) == [1, 1]


def test_a_row_draws_the_same_in_any_batch() -> None:
    alone = Draw(Sampling(temperature=1.0, seed=5))
    others = [Draw(Sampling(temperature=1.0, seed=5)), Draw(Sampling(temperature=0.7, top_k=2)), Draw(Sampling())]
    for _ in range(20):
        one = draw_ids(LOGITS.clone(), [alone], [[]])[0]
        assert draw_ids(LOGITS.repeat(3, 1), others, [[], [], []])[::2] == [one, 0]


def test_nothing_without_probability_is_drawn_at_the_very_end() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    end = torch.tensor([1.0], dtype=torch.float64)
    assert _sample(logits, end, 1.0, 1.0, 0).tolist() == [1]
    assert _sample(logits, end, 1.0, 0.999, 0).tolist() == [0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 2.1}, {"top_p": -0.1},
              {"top_p": 1.5}, {"top_k": -1},
              {"repetition_penalty": 0.0}, {"max_tokens": 0}],
)  # fmt: skip
def test_impossible_values_are_told(wrong: dict) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} is {value}") as error:
        Sampling(**wrong)
    assert f"--{name.replace('_', '-')}, or" in error.value.fix
