"""A step whose gradients were not finite, replayed: what it was, where it began, who is to blame.

Owns the classification of a replay and the words and cure of each class. Pure: the passes themselves are run by
`training/replay.py`, which hands over what it saw. An incident is one line of `metrics.jsonl`, so that a run that was
killed, and a run still going, can be read alike.

| seen in the replay | class |
|---|---|
| a weight is not finite before the pass | weights-not-finite |
| no label in the batch | empty-labels |
| forward not finite, and in fp32 neither | forward-not-finite |
| forward not finite in 16 bits, finite in fp32 | forward-overflow |
| backward not finite at scale 1 | backward-overflow |
| finite at scale 1 | scale-too-high (benign) |
| finite at the very same scale | not-reproduced |

Damage that does not crash is an incident too: `loss-rose`, a smoothed loss far above its best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftlm.health.finding import Finding, Severity
from graftlm.health.rates import RATE_CUT

Class = Literal[
    "weights-not-finite", "empty-labels", "forward-not-finite", "forward-overflow", "backward-overflow",
    "scale-too-high", "not-reproduced", "loss-rose",
]  # fmt: skip
# Classes that no lower loss scale cures: skipping such a step leads nowhere if the next ones are like it.
HOPELESS: frozenset[Class] = frozenset(
    {"weights-not-finite", "forward-not-finite", "forward-overflow", "backward-overflow"}
)
HOPELESS_IN_A_ROW = 3  # such steps in a row are no bad batch any more


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the passes of a replay showed. `bad_weight` names the first parameter that is not finite, "" for none.

    `is_forward_finite`, `is_finite` are of the step's own precision at scale 1; `is_finite_as_scaled` at the scale the
    step had; `is_forward_finite_in_fp32` of a pass without any 16-bit product.
    """

    num_targets: int
    bad_weight: str
    is_forward_finite: bool
    is_forward_finite_in_fp32: bool
    is_finite: bool
    is_finite_as_scaled: bool


@dataclass(frozen=True, slots=True)
class Incident:
    """One replayed step. `step` counts from 1; ids are -1 where there is no such place.

    `module` is the first with a non-finite tensor in time order; `culprits` are the roles (adapter, new_rows,
    old_rows, body) each of which alone, put back to its last good state, cures the step: what was learned is to blame.
    `bad_from_start` are roles cured only by a neutral start (an adapter's is nothing, new rows' the mean old row);
    `has_good` tells whether there was a last good state to try. `bad_rows` are ids of rows that are not finite by
    themselves, of `num_rows` tried; `loss` and `best` (nats) are of a loss that rose. `batch_rows` are ids of all rows
    of the step, kept in `batch_file` of the stage's folder; of a note neither is. `rank` is the process whose rows they
    are, where several train together.
    """

    step: int
    cause: Class
    loss_scale: float
    phase: str = ""
    module: str = ""
    row_id: int = -1
    token_id: int = -1
    is_new_token: bool = False
    is_answer: bool = False
    culprits: tuple[str, ...] = ()
    bad_from_start: tuple[str, ...] = ()
    has_good: bool = True
    bad_rows: tuple[int, ...] = ()
    num_rows: int = 0
    bad_weight: str = ""
    loss: float = 0.0
    best: float = 0.0
    batch_rows: tuple[int, ...] = ()
    batch_file: str = ""
    rank: int = -1

    @property
    def lora_side(self) -> str:
        """A or B where the module is one side of an adapter, else empty."""
        return next((side for side in "AB" if f".lora_{side}" in f"{self.module} {self.bad_weight}"), "")


def classify(seen: Replayed) -> Class:
    """The class of a replayed step, by the table above."""
    if seen.bad_weight:
        return "weights-not-finite"
    if not seen.num_targets:
        return "empty-labels"
    if not seen.is_forward_finite:
        return "forward-overflow" if seen.is_forward_finite_in_fp32 else "forward-not-finite"
    if not seen.is_finite:
        return "backward-overflow"
    return "not-reproduced" if seen.is_finite_as_scaled else "scale-too-high"


def is_bad_start(incident: Incident) -> bool:
    """Whether new rows were bad before anything was learned: a good state from before has them so, too."""
    return not incident.culprits and incident.has_good and "new_rows" in incident.bad_from_start


_EVIDENCE: dict[Class, str] = {
    "weights-not-finite": "{bad_weight} holds numbers that are not finite before the step begins.",
    "empty-labels": "None of the step's rows holds an answer to learn from.",
    "forward-not-finite": "The forward pass is not finite even in fp32, first in {module}.",
    "forward-overflow": "The forward pass leaves the range of 16 bits first in {module}; in fp32 it is finite.",
    "backward-overflow": "The backward pass is not finite even at loss scale 1, first in {module}.",
    "scale-too-high": "Finite at loss scale 1: only the scale ({loss_scale:g}) was too high. The step was skipped.",
    "loss-rose": "The loss rose to {loss:.2f} nats a token from a best of {best:.2f}.",
    "not-reproduced": "The same batch gave finite gradients when replayed: nothing in rows or weights explains it.",
}
_ROLE_KEYS = {
    "adapter": "the adapter",
    "new_rows": "the new rows of embedding and head",
    "old_rows": "the old rows of embedding and head",
    "body": "the transformer body",
}


def finding_of(incident: Incident, token: str = "") -> Finding:
    """The incident as a finding; `token` is the text of the token where it began, where one is known."""
    severity: Severity = "fatal" if incident.cause in HOPELESS or incident.cause == "loss-rose" else "note"
    if incident.cause in ("empty-labels", "not-reproduced"):
        severity = "warning"
    evidence = _EVIDENCE[incident.cause].format(
        bad_weight=incident.bad_weight, module=incident.module or "the loss", loss_scale=incident.loss_scale,
        loss=incident.loss, best=incident.best,
    )  # fmt: skip
    where = incident.bad_weight or incident.module or "loss"
    told = [evidence, _place(incident, token), _blame(incident), _rows(incident)]
    return Finding(incident.cause, severity, where, incident.step, " ".join(filter(None, told)), _cure(incident))


def _place(incident: Incident, token: str) -> str:
    if incident.row_id < 0 or incident.cause in ("scale-too-high", "not-reproduced", "empty-labels"):
        return ""
    kind = f"{'new' if incident.is_new_token else 'old'} piece, {'answer' if incident.is_answer else 'prompt'}"
    named = f" {token!r}" if token else ""
    on_rank = f" on rank {incident.rank}" if incident.rank >= 0 else ""
    return f"It begins{on_rank} at row {incident.row_id}, token {incident.token_id}{named} ({kind})."


def _blame(incident: Incident) -> str:
    undone = "undoes most of it" if incident.cause == "loss-rose" else "makes the step finite"
    if incident.culprits:
        roles = " or ".join(_ROLE_KEYS[role] for role in incident.culprits)
        return f"Putting {roles} alone back to the last good state {undone}."
    if incident.bad_from_start:
        roles = " or ".join(_ROLE_KEYS[role] for role in incident.bad_from_start)
        good = "the last good state does not" if incident.has_good else "no state from before is kept to try"
        return f"Starting {roles} anew {undone}; {good}."
    return ""


def _rows(incident: Incident) -> str:
    if not incident.bad_rows or len(incident.bad_rows) == incident.num_rows:
        return ""
    rows = ", ".join(str(row) for row in incident.bad_rows[:5])
    return f"{len(incident.bad_rows)} of the step's {incident.num_rows} rows are bad by themselves (row {rows})."


def _cure(incident: Incident) -> str:
    if incident.cause == "scale-too-high":
        return "Nothing to do where other steps learn: the loss scale finds its level."
    if incident.cause == "not-reproduced":
        return "Watch whether it comes again; if it does, suspect the device (memory errors)."
    if incident.cause == "empty-labels":
        return "Look at the rows with graftlm data FILE --show 5: empty answers, or a template without them."
    if not incident.culprits and 0 < len(incident.bad_rows) < incident.num_rows:
        return "Drop or mend the rows named, or start the rows of their pieces anew (grow.embedding: subpiece-mean)."
    if is_bad_start(incident):
        return "They were bad before this stage learned anything: choose another grow.embedding and grow.head."
    if incident.cause == "weights-not-finite":
        before = "Take the weights before it (roll back, or another copy of the base)"
        return f"{before} and lower peak_lr to {RATE_CUT:g} of it."
    rate = {
        "adapter": f"Lower peak_lr (groups.adapter.peak_lr; alpha/rank counts as the rate does) to {RATE_CUT:g} of it",
        "new_rows": _lower("new_rows"),
        "old_rows": _lower("old_rows"),
        "body": _lower("body"),
    }
    blamed = incident.culprits or incident.bad_from_start
    first = rate.get(blamed[0] if blamed else "", f"Lower peak_lr to {RATE_CUT:g} of it")
    if incident.cause == "forward-overflow":
        return f"{first} from the last good state on; bf16 or fp32 have the range, but not the cure if loss climbs."
    return f"{first} from the last good state on."


def _lower(role: str) -> str:
    return f"Lower peak_lr (groups.{role}.peak_lr where it has a rate of its own) to {RATE_CUT:g} of it"
