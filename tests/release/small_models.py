"""Small models in folders, and files to judge them by, all made in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftlm.model.causal import new_causal, save_causal
from graftlm.text.dialogue import ALPACA, CARD
from graftlm.text.tokenizer import train_base_tokenizer

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: how are you? ### Response: hello there, fine and you one two three", "你好，今天天气很好。",
]  # fmt: skip


def write_model(folder: Path, seed: int = 0, template: Any = CARD, num_pieces: int = 340) -> Path:
    """A random model with its tokenizer and template."""
    tokenizer = train_base_tokenizer(TEXTS, num_pieces)
    model = new_causal(
        num_rows=tokenizer.num_pieces, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24,
        max_positions=256, seed=seed,
    )  # fmt: skip
    save_causal(model, folder, also=lambda scratch: tokenizer.save(scratch, chat_template=template.jinja))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dialogues(path: Path, num_rows: int = 6) -> Path:
    """One-turn rows, and one of two turns."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"how are you {n}?"}, {"role": "assistant", "content": "hello " * n}]}
        for n in range(1, num_rows + 1)
    ]
    rows[-1]["messages"] *= 2
    return write_rows(path, rows)


__all__ = ["ALPACA", "CARD", "dialogues", "write_model", "write_rows"]
