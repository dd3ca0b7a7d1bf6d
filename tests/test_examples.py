"""The shipped data is what its generator writes, large enough, and its held-out questions are not in training."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_same_bytes() -> None:
    found = subprocess.run([sys.executable, str(EXAMPLES / "make_data.py"), "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_there_are_enough_dialogues_and_none_is_held_out_and_trained_on() -> None:
    train, heldout = rows("dialogues.train.jsonl"), rows("dialogues.heldout.jsonl")
    assert len(train) >= 1500
    assert any(len(row["messages"]) > 2 for row in heldout)

    def questions(found: list[dict]) -> set[str]:
        return {json.dumps([m["content"] for m in row["messages"][:-1]]) for row in found}

    assert not questions(train) & questions(heldout)
