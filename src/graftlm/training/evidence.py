"""The rows of a step that went wrong, kept beside the metrics so that they can be looked at, or fed again, later.

Owns that file's form. Rows are small; weights of that moment are in the checkpoints. Does not judge.
"""

from __future__ import annotations

import json
from pathlib import Path

from graftlm.run import disk_errors
from graftlm.training.batches import Steps

BATCHES = "batches"


def keep_batch(folder: Path, steps: Steps, step: int) -> tuple[str, tuple[int, ...]]:
    """Write the rows of `step` (from 1) below a stage's `folder`; returns the file, relative to it, and the rows' ids.

    A line of the file holds of a row its id, where it came from, its token ids, and which of them are targets (0 or 1).
    Raises DiskError.
    """
    file = folder / BATCHES / f"step-{step:08d}.jsonl"
    row_ids = steps.row_ids(step - 1)
    rows = []
    for row_id in row_ids:
        ids, is_target = steps.rows.row(row_id)
        source = steps.rows.sources[row_id] if row_id < len(steps.rows.sources) else ""
        told = {"row_id": row_id, "source": source, "ids": ids.tolist(), "is_target": is_target.astype(int).tolist()}
        rows.append(json.dumps(told, ensure_ascii=False) + "\n")
    with disk_errors(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows), encoding="utf-8", errors="backslashreplace")
    return str(file.relative_to(folder)), tuple(row_ids)
