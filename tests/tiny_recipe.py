"""A whole road small enough to walk in seconds: a scratch base, a graft, two stages, all text written here."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

SUBJECTS = ("cat", "dog", "bird", "horse", "fish", "child")
VERBS = ("sees", "likes", "finds", "hears")
NUMBERS = "一二三四五六七八九十"

STAGE = {
    "epochs": 1, "batch_rows": 8, "micro_batch_tokens": 512, "precision": "fp32", "peak_lr": 2e-3,
    "checkpoint_every": 2, "heldout_every": 3, "seed": 5,
}  # fmt: skip


def write_tiny_recipe(folder: Path) -> Path:
    """Write the recipe and its files into `folder`; returns the recipe's path."""
    english = [f"The {a} {v} the {b}." for a in SUBJECTS for v in VERBS for b in SUBJECTS if a != b]
    (folder / "en.txt").write_text("\n\n".join(english), encoding="utf-8")
    rows = [_dialogue(f"{a}加{b}等于多少？", f"答案是{a}和{b}。") for a in NUMBERS for b in NUMBERS]
    old = [_dialogue(f"Who {v} the {b}?", f"The dog {v} the {b}.") for v in VERBS for b in SUBJECTS]
    for name, told in (("zh.jsonl", rows[:60]), ("heldout.jsonl", rows[60:68]), ("old.jsonl", old[:6])):
        (folder / name).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told), encoding="utf-8"
        )
    questions = [{"id": f"q{n}", "kind": "sum", **row} for n, row in enumerate(rows[60:63])]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions), encoding="utf-8"
    )
    recipe = {
        "name": "tiny",
        "device": "cpu",
        "base": {
            "scratch": {
                "text": ["en.txt"], "num_pieces": 300, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1,
                "num_heads": 2, "max_positions": 256, "row_tokens": 32,
                "training": {
                    **STAGE, "name": "pretrain", "trains": {"kind": "full"}, "objective": "text", "batch_rows": 24,
                },
            }
        },
        "tokenizer": {"text": ["zh.jsonl"], "num_pieces": 20, "common_characters": "none"},
        "data": {
            "sources": [{"path": "zh.jsonl"}],
            "heldout": [{"path": "heldout.jsonl"}, {"path": "old.jsonl", "language": "old"}],
            "near_duplicates": None,
            "max_tokens": 256,
        },
        "stages": [
            {**STAGE, "name": "full", "trains": {"kind": "full"}},
            {**STAGE, "name": "lora", "trains": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.1}},
        ],
        "export": {"dtype": "fp32"},
        "report": {
            "num_samples": 1, "max_answer_tokens": 3, "exact_questions": "questions.jsonl", "questions_shown": 1,
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _dialogue(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
