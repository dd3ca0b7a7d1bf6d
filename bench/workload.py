"""What all arms of the benches train: a random Llama as a model folder, and rows rendered once by our renderer.

Rows are real Chinese instructions where their folder lies beside the project, else the dialogues shipped with it. The
rows of a step are 16 in the seed's order; steps are kept whose rows fill the same number of packs at every budget a
peer packs to, so that "a step" is 16 rows in every arm, packed or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import BATCH_ROWS, PACKS

from graftlm.model.causal import load_causal, new_causal, save_causal
from graftlm.recipe import Tokenizer as TokenizerSection
from graftlm.text.corpus import read_conversations
from graftlm.text.dialogue import CARD, Rendered, render_many
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer import Tokenizer, graft_tokenizer, load_tokenizer
from graftlm.text.tokenizer.base import train_base_tokenizer
from graftlm.training.batches import pack

ROOT = Path(__file__).parents[1]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, dict[str, Any]] = {
    "57m": {"num_rows": 55_296, "hidden_size": 384, "num_layers": 8, "num_heads": 6, "intermediate_size": 1024},
    "15m": {"num_rows": 55_296, "hidden_size": 128, "num_layers": 6, "num_heads": 4, "intermediate_size": 344},
}


@dataclass(frozen=True, slots=True)
class Workload:
    """A model folder and a file of rows, and what a job must know of them."""

    model: Path
    rows: Path
    first_id: int
    pad_id: int
    first_new_id: int | None
    num_tokens: tuple[int, ...]
    num_targets: tuple[int, ...]
    data: str


def make_workload(folder: Path, size: str, num_steps: int, real: Path | None) -> Workload:
    """Write model and rows below `folder`; `num_tokens` and `num_targets` are counts by step."""
    tokenizer, source, words = _text(folder, real)
    model = folder / f"model-{size}-{tokenizer.fingerprint[:8]}"
    if not (model / "config.json").is_file():
        made = new_causal(**SIZES[size], seed=0, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        save_causal(made, model, also=tokenizer.save)
        load_causal(model)
    steps = chosen_steps(_rendered(source, tokenizer), num_steps)
    rows = folder / f"rows-{num_steps}.json"
    rows.write_text(json.dumps([{"ids": r.ids, "is_target": [int(t) for t in r.is_target]} for s in steps for r in s]))
    assert tokenizer.bos_id is not None
    return Workload(
        model, rows, tokenizer.bos_id, tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
        tokenizer.first_new_id, tuple(sum(len(r.ids) for r in step) for step in steps),
        tuple(sum(sum(r.is_target) for r in step) for step in steps), words,
    )  # fmt: skip


def chosen_steps(rows: list[Rendered], num_steps: int) -> list[list[Rendered]]:
    """The first `num_steps` groups of 16 rows, in the seed's order, that fill `PACKS` packs at every budget."""
    random, steps = np.random.default_rng(0), []
    for _ in range(100 * num_steps):
        step = [rows[place] for place in random.choice(len(rows), BATCH_ROWS, replace=len(rows) < BATCH_ROWS)]
        lengths = [len(row.ids) for row in step]
        if max(lengths) > min(PACKS):
            continue
        # A little room is left: packers differ, and the fullest packs one finds another may miss.
        if all(
            len(pack(lengths, int(0.96 * budget))) == count and sum(lengths) > (count - 1) * budget
            for budget, count in PACKS.items()
            if max(lengths) <= 0.96 * budget
        ):
            steps.append(step)
        if len(steps) == num_steps:
            return steps
    raise SystemExit(f"Of 100 groups of {BATCH_ROWS} rows for each step, too few fill {PACKS} packs: other rows?")


def _text(folder: Path, real: Path | None) -> tuple[Tokenizer, Path, str]:
    """The tokenizer, the file of dialogues, and where they come from in words."""
    if real is not None and (real / "alpaca_zh.parquet").is_file():
        words = "Chinese Alpaca, the pieces of a public Chinese model merged into Llama-2's"
        base, pieces = (str(real / "tokenizers" / f"{name}.model") for name in ("llama2", "chinese_sp"))
        grafted = folder / "tokenizer"
        if not (grafted / "tokenizer.json").is_file():
            graft_tokenizer(base, TokenizerSection(mode="merge", pieces=pieces), grafted)
        return load_tokenizer(grafted), real / "alpaca_zh.parquet", words
    data = ROOT / "examples" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    source = data / "dialogues.train.jsonl"
    texts = [message.content for said in read_conversations(source)[0] for message in said.messages]
    texts += read_texts(data / "chinese.txt")
    words = "dialogues shipped with the project, a tokenizer of 4,000 pieces learned from their text"
    return train_base_tokenizer(texts, 4_000), source, words


def _rendered(source: Path, tokenizer: Tokenizer, most: int = 10_000) -> list[Rendered]:
    conversations = read_conversations(source)[0][:most]
    return [row for row in render_many(conversations, tokenizer, CARD) if isinstance(row, Rendered)]


def job_of(workload: Workload, arm: Any, trains: str, precision: str, num_steps: int, threads: int) -> dict[str, Any]:
    """What an arm's process is told, all but where to write."""
    return {
        "arm": arm.name, "model": str(workload.model), "rows": str(workload.rows), "trains": trains,
        "precision": precision, "batch_rows": BATCH_ROWS, "num_steps": num_steps, "threads": threads,
        "targets": list(TARGETS), "settings": dict(arm.settings), "packs": arm.packs,
        "first_id": workload.first_id, "pad_id": workload.pad_id, "first_new_id": workload.first_new_id,
        "peak_lr": 2e-5 if trains == "full" else 2e-4, "weight_decay": 0.01, "max_grad_norm": 1.0,
    }  # fmt: skip
