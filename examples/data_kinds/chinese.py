"""Running Chinese text for learning pieces: hand-written prose, dialogues, and facts told as sentences.

Owns: how dialogues become plain text. Does not know: which script or pieces are learned from it.
Place on the road: the tokenizer step reads it. No held-out row is ever in it.
"""

import random
from collections.abc import Sequence

from data_kinds.schema import Candidate

# few rows of each generated kind: more would turn whole question frames into pieces
NUM_ROWS_PER_KIND = 4


def running_text(
    prose: Sequence[str], dialogues: Sequence[Sequence[str]], train: dict[str, list[Candidate]], seed: int
) -> str:
    """Paragraphs, one a line, in an order fixed by the seed."""
    dice = random.Random(f"{seed}:chinese")
    result = list(prose)
    result += ["".join(turns) for turns in dialogues]
    for rows in train.values():
        result += ["".join(row.turns) for row in dice.sample(rows, min(NUM_ROWS_PER_KIND, len(rows)))]
    dice.shuffle(result)
    return "\n".join(result) + "\n"
