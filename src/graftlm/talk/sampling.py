"""How the next token is chosen from a model's logits.

Owns the sampling knobs and the draw itself, row by row: every row has its own random numbers, so an answer does
not depend on which others share its batch. Does not know models, text or caches; `generate` and the server's engine
call it each step.

Shapes: B rows, V rows of the output head, G tokens of an answer so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftlm.errors import UserError

HOTTEST = 2.0
"""The highest temperature, as in OpenAI's API: terminal, files of prompts, server and page all end there."""

LEAST_TOP_P = 1e-12
"""What a `top_p` of 0 stands for: below every likeliest token's probability, so that it stays, and it alone."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the likeliest token every time (greedy).

    `top_k` 0 and `top_p` 1 switch those cuts off, `top_p` 0 leaves the likeliest token alone; `repetition_penalty`
    divides the logits of tokens already in the answer (not in the question: its words may be needed). The same seed
    gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (0 <= self.temperature <= HOTTEST, f"from 0 (always the likeliest) to {HOTTEST:g}"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1 (1 switches it off)"),
            "top_k": (self.top_k >= 0, "0 (off) or a count"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 switches it off)"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
        }
        for name, (is_good, expected) in wanted.items():
            if not is_good:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected {expected}.",
                    f"Give another {flag}, or in a talk /params {name}=….",
                )


GREEDY = Sampling()


class Draw:
    """How one answer is drawn, with random numbers of its own: they begin from the sampling's seed."""

    __slots__ = ("_generator", "sampling")

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def point(self) -> torch.Tensor:
        """The next random number, in 0..1 (shape (1,), double)."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)


@torch.inference_mode()
def draw_ids(logits_BV: torch.Tensor, draws: Sequence[Draw], answers: Sequence[Sequence[int]]) -> list[int]:
    """One id for each of B rows, each drawn its own way; `answers` holds the tokens each has said so far."""
    logits_BV = logits_BV.float()
    groups: dict[tuple[float, float, int], list[int]] = {}
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        if sampling.repetition_penalty != 1.0:
            _penalise(logits_BV[row], answers[row], sampling.repetition_penalty)
        how = (sampling.temperature, sampling.top_p, sampling.top_k) if sampling.temperature else (0.0, 1.0, 0)
        groups.setdefault(how, []).append(row)
    ids = [0] * len(draws)
    for (temperature, top_p, top_k), rows in groups.items():
        own_BV = logits_BV if len(rows) == len(draws) else logits_BV[rows]
        if temperature == 0:
            drawn = own_BV.argmax(-1)
        else:
            points_B = torch.cat([draws[row].point() for row in rows]).to(own_BV.device)
            drawn = _sample(own_BV, points_B, temperature, top_p, top_k)
        for row, token_id in zip(rows, drawn.tolist(), strict=True):
            ids[row] = token_id
    return ids


def _penalise(logits_V: torch.Tensor, said: Sequence[int], penalty: float) -> None:
    """Push down, in place, what was already said. Source: CTRL, arXiv 1909.05858, section 4.1."""
    ids_G = torch.tensor(sorted(set(said)), dtype=torch.long, device=logits_V.device)
    scores_G = logits_V[ids_G]
    logits_V[ids_G] = torch.where(scores_G > 0, scores_G / penalty, scores_G * penalty)


def _sample(
    logits_BV: torch.Tensor, points_B: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """Ids (B,) at the points (0..1) of each row's cumulative probability, after top-k and nucleus cuts.

    Source: nucleus sampling, arXiv 1904.09751. The likeliest token always survives the cuts.
    """
    kept = min(top_k or logits_BV.shape[1], logits_BV.shape[1])
    if kept == logits_BV.shape[1] and top_p == 1.0:
        # Nothing is cut, so nothing needs sorting, which would take most of the time of a step.
        ids_BK = None
        probabilities_BK = (logits_BV.double() / temperature).softmax(-1)
    else:
        sorted_BK, ids_BK = logits_BV.topk(kept)
        # double: at 100,000 rows of the head a float32 running sum loses the tail
        probabilities_BK = (sorted_BK.double() / temperature).softmax(-1)
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        probabilities_BK = probabilities_BK.masked_fill(before_BK >= max(top_p, LEAST_TOP_P), 0.0)
    cumulative_BK = probabilities_BK.cumsum(-1)
    targets_B1 = (points_B * cumulative_BK[:, -1])[:, None]
    places_B1 = torch.searchsorted(cumulative_BK, targets_B1, right=True)
    if ids_BK is None:
        # A point at the very end must not land on a row of no probability (padding, control tokens).
        last_B1 = logits_BV.shape[1] - 1 - (probabilities_BK.flip(-1) > 0).int().argmax(-1, keepdim=True)
        return places_B1.minimum(last_B1)[:, 0]
    last_B1 = (probabilities_BK > 0).sum(-1, keepdim=True) - 1
    return ids_BK.gather(1, places_B1.minimum(last_B1))[:, 0]
