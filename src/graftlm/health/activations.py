"""What autograd keeps of one micro-batch between forward and backward, tensor by tensor.

Owns that ledger, and nothing else of memory: where the forward pass changes (`model/grouped.py`, `model/body.py`,
`model/loss.py`, PEFT's LoRA), this file changes. `tests/health/test_plan.py` compares it with what
`torch.autograd.graph.saved_tensors_hooks` sees, to the byte. Masters are fp32, and so is the stream between the layers;
under autocast every linear map makes its own 16-bit copy of its input.

Shapes: T tokens, P of them the shared prefix, N labelled positions; b bytes of a computed number (4 or 2).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from graftlm.model.adapted import num_drawn
from graftlm.model.frozen import FrozenBase
from graftlm.model.loss import chunks_of
from graftlm.model.packed import PackedLayout, make_layout
from graftlm.model.shapes import Shape

WIDE = 4  # bytes of a float32
INDEX = 8  # bytes of an index


@dataclass(frozen=True, slots=True)
class Learns:
    """What of a model learns. `rows`: which rows of embedding and head; the LoRA fields count for `lora` only.
    `frozen_base`: how matrices that do not learn are held."""

    kind: Literal["full", "lora", "new-rows"]
    rows: Literal["all", "new", "none"]
    rank: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    is_dora: bool = False
    frozen_base: FrozenBase = "exact"

    def needs_input(self, projection: str) -> bool:
        """Whether the gradient of a projection's weights, or of its adapter's, needs what went in."""
        return self.kind == "full" or projection in self.targets


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Counts of a packed micro-batch; padding exists inside groups of rows, in attention only.

    `padded`, `keys`, `seen` are positions, keys and mask entries over all groups; `queries`, `asked` labelled positions
    and mask entries of a last layer computed there only (0 where it is computed in full).
    """

    num_tokens: int
    num_shared: int
    num_labels: int
    padded: int
    keys: int
    seen: int
    queries: int = 0
    asked: int = 0
    is_last_sparse: bool = False


@dataclass(frozen=True, slots=True)
class Compute:
    """How it is computed: bytes of a computed number (4, or 2 under autocast), whether on a CPU, and whether matrices
    that learn are held in halves (`model/halves.py`), so that nothing is rounded anew."""

    num_bytes: int
    is_cpu: bool
    in_halves: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether linear maps run in 16 bits."""
        return self.num_bytes < WIDE


def counts_of(layout: PackedLayout, num_labels: int) -> MicroBatch:
    """Count a layout."""
    shared = layout.num_shared
    shapes = [tuple(group.keys.gather_BL.shape) for group in layout.groups]
    asked = layout.labelled.each
    return MicroBatch(
        num_tokens=layout.positions_1T.shape[1],
        num_shared=shared,
        num_labels=num_labels,
        padded=sum(rows * longest for rows, longest in shapes),
        keys=sum(rows * (shared + longest) for rows, longest in shapes),
        seen=sum(longest * (shared + longest) for _, longest in shapes) if shared else 0,
        queries=sum(piece.queries.gather_BL.numel() for piece in asked),
        asked=sum(piece.seen.numel() for piece in asked if piece.seen is not None),
        is_last_sparse=layout.ends_at_N is not None,
    )


@functools.lru_cache(maxsize=256)
def micro_batch(rows: tuple[tuple[int, int], ...], budget: int, num_shared: int, is_last_sparse: bool) -> MicroBatch:
    """The counts of `budget` tokens of rows like these (tokens, labels), repeated as often as needed.

    The last row is cut so that the budget is full: a plan must hold for the fullest micro-batch.
    """
    own: list[int] = []
    labelled: list[int] = []
    at, left = num_shared, budget - num_shared
    while left > 0:
        length, labels = rows[len(own) % len(rows)]
        own.append(min(max(length - num_shared, 1), left))
        labels = min(labels, own[-1])
        labelled += range(at + own[-1] - labels, at + own[-1])
        at, left = at + own[-1], left - own[-1]
    ends_at = torch.tensor(labelled) if is_last_sparse else None
    return counts_of(make_layout(own, torch.device("cpu"), num_shared, ends_at), len(labelled))


def kept_by_layer(
    shape: Shape, learns: Learns, batch: MicroBatch, compute: Compute, *, is_last: bool
) -> dict[str, int]:
    """Bytes a decoder layer keeps: `activations` by tensor, `copies` of weights in 16 bits."""
    tokens = batch.num_tokens
    is_sparse = is_last and batch.is_last_sparse
    ends = batch.num_labels if is_sparse else tokens
    ledger = _Ledger(shape, learns, compute)
    ledger.norm(tokens, shape.hidden_size)
    if is_sparse:
        ledger.inputs(ends, shape.hidden_size, "q_proj")
        ledger.inputs(tokens, shape.hidden_size, "k_proj", "v_proj")
        ledger.add(2 * ends * shape.head_size * WIDE)  # the labelled positions' rotation
    else:
        ledger.inputs(tokens, shape.hidden_size, "q_proj", "k_proj", "v_proj")
    if shape.has_head_norms:
        ledger.norm(ends * shape.num_heads, shape.head_size, compute.num_bytes)
        ledger.norm(tokens * shape.num_kv_heads, shape.head_size, compute.num_bytes)
    if is_sparse:
        ledger.labelled_attention(batch)
    else:
        ledger.attention(batch)
    ledger.inputs(ends, shape.query_width, "o_proj")
    ledger.norm(ends, shape.hidden_size)
    ledger.inputs(ends, shape.hidden_size, "gate_proj", "up_proj")
    ledger.add(2 * ends * shape.intermediate_size * compute.num_bytes)  # gate and up (`model/lean.py`)
    ledger.inputs(ends, shape.intermediate_size, "down_proj")
    for name in shape.projections:
        ledger.adapter(tokens if name in ("k_proj", "v_proj") else ends, name)
    return {"activations": ledger.num_bytes, "copies": ledger.copies(shape.projections)}


def kept_once(shape: Shape, learns: Learns, batch: MicroBatch, compute: Compute) -> int:
    """Bytes kept besides the layers: ids, places, rotations, the last norm, the loss's gradients by hidden state."""
    ends = batch.num_labels if batch.is_last_sparse else batch.num_tokens
    ledger = _Ledger(shape, learns, compute)
    ledger.add(INDEX * (batch.num_tokens + batch.num_labels))
    if not compute.is_cpu:
        ledger.add((INDEX + 1) * (batch.padded + batch.queries))
    ledger.add(2 * batch.num_tokens * shape.head_size * WIDE)
    ledger.norm(ends, shape.hidden_size)
    device = "cpu" if compute.is_cpu else "cuda"
    _, filled = chunks_of(batch.num_labels, shape.num_rows, compute.num_bytes, device)
    ledger.add(filled * shape.hidden_size * compute.num_bytes)
    return ledger.num_bytes


def kept_of_head(shape: Shape, learns: Learns, num_new_rows: int) -> int:
    """Bytes of the gradient of the head's rows that learn, which the loss computes in the forward pass."""
    rows = {"all": shape.num_rows, "new": num_new_rows, "none": 0}[learns.rows]
    return rows * shape.hidden_size * WIDE


class _Ledger:
    """Adds up tensors; each method says which."""

    def __init__(self, shape: Shape, learns: Learns, compute: Compute) -> None:
        self.shape, self.learns, self.compute = shape, learns, compute
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count a tensor."""
        self.num_bytes += num_bytes

    def norm(self, positions: int, width: int, input_bytes: int = WIDE) -> None:
        """RMSNorm (`model/lean.py`): its input, and 1/rms in float32."""
        self.add(positions * (width * input_bytes + WIDE))

    def inputs(self, positions: int, width: int, *names: str) -> None:
        """What went into linear maps with one input: one tensor in float32; under autocast one copy that they share, or
        one for each where any is under DoRA (`model/rounded.py`).

        LoRA's dropout makes one for each in any case, and what tells where: on a GPU a byte an entry, on a CPU the
        places of zeros (`model/adapted.py`), under DoRA there a float32 an entry.
        """
        needing = sum(map(self.learns.needs_input, names))
        if not self._copies_inputs(*names):
            needing = min(needing, 1)
        self.add(positions * width * self.compute.num_bytes * needing)
        if self._is_dropping:
            self.add(needing * self._told_of_zeros(positions * width))

    def _told_of_zeros(self, count: int) -> int:
        if not self.compute.is_cpu:
            return count
        return WIDE * count if self.learns.is_dora else INDEX * num_drawn(count, self.learns.dropout)

    def adapter(self, positions: int, name: str) -> None:
        """The low-rank numbers between A and B."""
        if self._is_adapted(name):
            self.add(positions * self.learns.rank * self.compute.num_bytes)

    def _is_adapted(self, name: str) -> bool:
        return self.learns.kind == "lora" and name in self.learns.targets

    @property
    def _is_dropping(self) -> bool:
        return self.learns.kind == "lora" and self.learns.dropout > 0

    def _copies_inputs(self, *names: str) -> bool:
        """Whether each of these that keeps its input keeps a copy of its own: what was dropped, or PEFT's cast."""
        is_dora = self.learns.is_dora and any(self._is_adapted(name) for name in names)
        return self._is_dropping or (is_dora and self.compute.is_mixed)

    def attention(self, batch: MicroBatch) -> None:
        """Of all positions. On a GPU: SDPA by group of rows, and over the shared prefix, which is a slice; what it is
        cut from stays, but where a cast copies the slice."""
        if self.compute.is_cpu:
            self._grouped(batch.num_tokens, batch.padded + batch.num_shared, batch.num_tokens)
            return
        shape, b = self.shape, self.compute.num_bytes
        queries, keys = shape.query_width, shape.kv_width
        self._attended(batch.padded, batch.keys)
        self.add(batch.seen * b)
        if batch.num_shared:
            rotated = batch.num_shared if self.compute.is_mixed else batch.num_tokens
            self.add((rotated * (queries + keys) + batch.num_tokens * keys) * b)
            self.add(batch.num_shared * (queries * b + shape.num_heads * WIDE))
        self.add(batch.num_tokens * (INDEX + queries * b))

    def labelled_attention(self, batch: MicroBatch) -> None:
        """The same for labelled positions' queries alone; keys and values of all."""
        if self.compute.is_cpu:
            self._grouped(batch.num_labels, batch.queries, batch.num_tokens)
            return
        self._attended(batch.queries, batch.keys)
        self.add(batch.asked * self.compute.num_bytes)
        self.add(batch.num_labels * (INDEX + self.shape.query_width * WIDE))

    def _grouped(self, queries: int, padded: int, keys: int) -> None:
        """`model/grouped.py`: queries, keys and values as projected, log-sums, and the output (which is the output
        projection's input, where that keeps no copy)."""
        shape = self.shape
        self.add((queries * shape.query_width + 2 * keys * shape.kv_width) * self.compute.num_bytes)
        self.add(padded * shape.num_heads * WIDE)
        if not self.learns.needs_input("o_proj") or self._copies_inputs("o_proj"):
            self.add(queries * shape.query_width * self.compute.num_bytes)

    def _attended(self, queries: int, keys: int) -> None:
        b, shape = self.compute.num_bytes, self.shape
        self.add((2 * queries * shape.query_width + 2 * keys * shape.kv_width) * b)
        self.add(queries * shape.num_heads * WIDE)

    def copies(self, projections: dict[str, tuple[int, int]]) -> int:
        """Autocast's copies of learning weights in 16 bits, kept for the gradient of what goes in.

        Frozen ones are held in 16 bits (`model/frozen.py`), but under DoRA.
        """
        if not self.compute.is_mixed or self.compute.in_halves:
            return 0
        learns = self.learns
        copied = (
            projections if learns.kind == "full" else [n for n in projections if learns.is_dora and n in learns.targets]
        )
        matrices = sum(inner * outer for inner, outer in (projections[name] for name in copied))
        if learns.kind == "lora":
            matrices += sum(learns.rank * sum(projections[name]) for name in learns.targets if name in projections)
        return matrices * self.compute.num_bytes
