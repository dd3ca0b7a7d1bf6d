"""A tiny tokenizer and model that talk in process, and a model that says what it is told to."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graftlm.model.causal import new_causal
from graftlm.talk.generate import Chatbot
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import Tokenizer, train_base_tokenizer

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: what is the capital of France? ### Response: The capital of France is Paris.",
    "你好，今天天气很好。Human: Assistant: hello there, how are you today? one two three four five",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_base_tokenizer(TEXTS, 380)


@pytest.fixture(scope="session")
def chatbot(tokenizer: Tokenizer) -> Chatbot:
    """A random model with 20 rows more than the tokenizer has pieces."""
    model = new_causal(
        num_rows=tokenizer.num_pieces + 20, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=64, max_positions=512, seed=3,
    )  # fmt: skip
    return Chatbot(model, tokenizer, CARD)


@pytest.fixture
def speaking(tokenizer: Tokenizer) -> Callable[..., Chatbot]:
    """A chatbot whose model says the given ids one after another, whatever it is asked, then ends."""

    def make(ids: Sequence[int], num_padded_rows: int = 0, max_positions: int = 512) -> Chatbot:
        model: Any = new_causal(
            num_rows=tokenizer.num_pieces + num_padded_rows, hidden_size=8, num_layers=1, num_heads=1,
            intermediate_size=8, max_positions=max_positions,
        )  # fmt: skip
        script = [*ids, tokenizer.eos_id]
        model.num_steps_taken = 0

        def forward(input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
            is_prompt = past_key_values.get_seq_length() == 0
            model.num_steps_taken += 1
            model.place = 0 if is_prompt else model.place + 1
            keys = torch.zeros(len(input_ids), 1, input_ids.shape[1], 8)
            past_key_values.update(keys, keys, 0)
            logits = torch.zeros(len(input_ids), 1, len(model.lm_head.weight))
            logits[..., script[min(model.place, len(script) - 1)]] = 9.0
            logits[..., tokenizer.num_pieces :] = 99.0
            logits[..., tokenizer.bos_id] = 98.0
            return SimpleNamespace(logits=logits)

        model.forward = forward
        return Chatbot(model, tokenizer, CARD)

    return make
