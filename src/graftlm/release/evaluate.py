"""Held-out figures: loss per answer token and bits per byte, each with a 95 % interval.

Owns how figures are made from losses by row. Bits per byte compare models whose tokenizers differ; losses per token do
not. Does not know runs or reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from graftlm.device import Precision, pick_device
from graftlm.errors import UserError
from graftlm.model.causal import body_of, check_ids, find_model, load_causal
from graftlm.model.packed import attend_packed, attend_plain
from graftlm.text.corpus import read_conversations
from graftlm.text.dialogue import Conversation, Rendered, render_many, rows_of
from graftlm.text.rows import RowsBuilder
from graftlm.text.templates import Template, find_template
from graftlm.text.tokenizer import Tokenizer, load_tokenizer
from graftlm.training.heldout import heldout_losses

BUDGET_TOKENS = 8192
NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figures:
    """One model on one set: `interval` is that of bits per byte, 95 %, by the bootstrap over rows (Efron 1979).

    `num_left_out` counts rows longer than the model's context or refused by its template.
    """

    bits_per_byte: float
    loss_per_answer_token: float
    interval: tuple[float, float]
    num_rows: int
    num_answer_tokens: int
    num_left_out: int


def evaluate_files(model: str, files: Sequence[str]) -> dict[str, Any]:
    """Figures of a model by file. Raises UserError for a broken model folder or unusable files."""
    from graftlm.talk.generate import model_of_run

    folder = find_model(model_of_run(model))
    tokenizer = load_tokenizer(folder)
    template = find_template("tokenizer" if tokenizer.chat_template else "card", tokenizer)
    read = {name: read_conversations(name) for name in files}  # before the model: a wrong name is told at once
    for name, (conversations, dropped) in read.items():
        if not any(rows_of(conversation, template) for conversation in conversations):
            lost = ", ".join(f"{reason}: {count}" for reason, count in dropped.counts.items())
            raise UserError(
                f"{name} holds no dialogue with an answer to judge by{f' ({lost})' if lost else ''}.",
                f"Look: graftlm data {name}",
            )
    device = pick_device("auto")
    loaded: Any = load_causal(folder)
    check_ids(loaded, tokenizer.num_pieces)
    loaded.to(device)
    found: dict[str, Any] = {}
    for name, (conversations, dropped) in read.items():
        figures = evaluate_conversations(loaded, tokenizer, template, conversations, device)
        found[name] = {**asdict(figures), "dropped": dropped.counts}
    return found


def evaluate_conversations(
    model: Any,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    device: torch.device,
    label: str = "held-out",
) -> Figures:
    """Figures of a model on conversations, rendered with the model's own tokenizer; answers and their ends count."""
    builder = RowsBuilder(tokenizer.num_pieces)
    rows = [row for conversation in conversations for row in rows_of(conversation, template)]
    longest = model.config.max_position_embeddings
    for rendered in render_many(rows, tokenizer, template):
        if isinstance(rendered, Rendered) and len(rendered.ids) <= longest:
            builder.add(rendered, "")
    if not len(builder):
        raise UserError(
            f"Each of the {len(rows)} rows is longer than the model's {longest} positions, or refused by its template.",
            "Give shorter dialogues; graftlm data FILE --tokenizer MODEL --show 3 shows them.",
        )
    body: Any = body_of(model)
    attend_packed(body)
    losses = heldout_losses(model, builder.rows(), Precision(torch.float32, device, None), BUDGET_TOKENS, label)
    attend_plain(model)
    return Figures(
        losses.bits_per_byte,
        losses.loss_per_target,
        _bootstrap(losses.nats / math.log(2), losses.num_bytes),
        len(builder),
        int(losses.num_targets.sum()),
        len(rows) - len(builder),
    )


def _bootstrap(bits: np.ndarray, num_bytes: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the ratio of sums over resampled rows."""
    dice = np.random.default_rng(0)
    picks = dice.integers(0, len(bits), (NUM_RESAMPLES, len(bits)))
    ratios = bits[picks].sum(1) / np.maximum(num_bytes[picks].sum(1), 1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
