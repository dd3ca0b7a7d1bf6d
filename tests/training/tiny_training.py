"""A 2-layer model, rows of random tokens, and stages over them: small enough to train in a blink."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.model.causal import new_causal
from graftlm.model.sharded import own_part
from graftlm.recipe import Stage
from graftlm.run import read_metrics
from graftlm.text.rows import TokenRows

NUM_ROWS, FIRST_NEW_ID, EOS = 48, 40, 2
FULL = {"kind": "full"}
LORA_ALL = {"kind": "lora", "rank": 4, "alpha": 4, "rows": "all"}


def tiny_model(tied: bool = False, seed: int = 0) -> Any:
    return new_causal(
        num_rows=NUM_ROWS, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24,
        is_tied=tied, seed=seed,
    )  # fmt: skip


def exact_norms(model: Any) -> Any:
    """The model with RMSNorm in its own dtype: that of transformers rounds to float32 inside, also in float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=child.weight.dtype)
                setattr(module, name, norm)
    return model


def make_rows(count: int = 12, seed: int = 0) -> TokenRows:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 12, count)
    ids = random.integers(3, NUM_ROWS, lengths.sum()).astype(np.uint16)
    is_target = random.random(lengths.sum()) < 0.6
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    return TokenRows(ids, is_target, offsets, np.full(count, 10, np.int64))


def make_stage(trains: dict[str, Any], **knobs: Any) -> Stage:
    given = {
        "name": "sft", "epochs": 2, "batch_rows": 4, "micro_batch_tokens": 24, "precision": "fp32", "peak_lr": 1e-2,
        "keep": "last", "warmup_steps": 1, "heldout_every": 2, "checkpoint_every": 2, "seed": 3, **knobs,
    }  # fmt: skip
    return Stage.model_validate({**given, "trains": trains})


def weights_sha256(model: torch.nn.Module) -> str:
    """Of layers shared out, this rank's parts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + own_part(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def course_of(folder: Path) -> list[dict[str, Any]]:
    """A stage's metrics but for what is its process's: times, and which saves there were."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] != "saved"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def spoken_rows(count: int = 60, rare: int | None = None, rare_row: int = -1) -> TokenRows:
    """Questions of random ids and answers that repeat them, ended by the end token; a rare id in one row."""
    random = np.random.default_rng(7)
    ids, mask, offsets = [], [], [0]
    for row in range(count):
        question = random.integers(4, NUM_ROWS, random.integers(3, 6)).tolist()
        if row == rare_row:
            question[1] = rare
        answer = [*question[:3], EOS]
        ids += [1, *question, 3, *answer]
        mask += [False] * (len(question) + 2) + [True] * len(answer)
        offsets.append(len(ids))
    arrays = np.array(ids, np.uint16), np.array(mask), np.array(offsets, np.int64)
    return TokenRows(*arrays, np.full(count, 9, np.int64))


def stage_of(trains: dict[str, Any] = FULL, **knobs: Any) -> Stage:
    given = {"heldout_every": None, "checkpoint_every": 5, "peak_lr": 1e-3, "micro_batch_tokens": 64, **knobs}
    return make_stage(trains, **given)
