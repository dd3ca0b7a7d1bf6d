"""How much memory a stage needs: everything alive at each moment of a step, and the worst of them.

Owns the moments of a stage (loss, backward, optimizer's step, held-out reading, what is done before and after) and
their sums. What autograd keeps is counted in `activations.py`; here it is placed beside weights, gradients and Adam's
moments. Plain numbers in, plain numbers out: no model is built. `bench/memory.py` compares it with real stages.

Shapes: T tokens of a micro-batch, V rows and H numbers of a vocabulary matrix, b bytes of a computed number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graftlm.health.activations import (
    WIDE,
    Compute,
    Learns,
    MicroBatch,
    kept_by_layer,
    kept_of_head,
    kept_once,
)
from graftlm.model.halves import BLOCK
from graftlm.model.loss import block_rows, chunks_of
from graftlm.model.quantised import BYTES_A_NUMBER
from graftlm.model.shapes import Shape

GIB = 2**30
DOUBLE = 8  # bytes of a float64
FROZEN = {
    "exact": "frozen weights in 16 bits",
    "int8": "frozen weights in 8 bits",
    "nf4": "frozen weights in 4 bits",
}
KERNELS = "kernels of products in 16 bits"
KERNEL_BYTES = {"full": 32 * 2**20, "lora": 48 * 2**20, "new-rows": 8 * 2**20}
"""What oneDNN keeps of them on a CPU, measured (docs/log.md): adapters have most shapes, frozen layers fewest."""
HELD = ("weights fp32", *FROZEN.values(), "adapter fp32", "gradients fp32", "Adam's moments fp32", KERNELS)
"""Items that lie there between passes too."""


@dataclass(frozen=True, slots=True)
class StageSize:
    """What decides a stage's memory. `num_new_rows` rows of the vocabulary are new ones (0: the matrices stay whole).

    `is_accumulating`: a step has several micro-batches, so that gradients lie there during the next forward pass.
    `keeps_best`: the best weights are read back at the end. `look` is the micro-batch looked at before the first step.
    """

    shape: Shape
    learns: Learns
    compute: Compute
    num_new_rows: int
    batch: MicroBatch
    look: MicroBatch
    is_checkpointing: bool
    is_accumulating: bool
    keeps_best: bool

    @property
    def matrix_bytes(self) -> int:
        """A vocabulary matrix in float32."""
        return self.shape.num_rows * self.shape.hidden_size * WIDE

    @property
    def learning_rows(self) -> int:
        """How many rows of a vocabulary matrix learn."""
        return {"all": self.shape.num_rows, "new": self.num_new_rows, "none": 0}[self.learns.rows]

    @property
    def adapter_parameters(self) -> int:
        """Parameters of LoRA; DoRA's sizes with them."""
        if self.learns.kind != "lora":
            return 0
        known = self.shape.projections
        sizes = sum(known[name][1] for name in self.learns.targets if name in known) if self.learns.is_dora else 0
        low_rank = self.shape.adapter_parameters(self.learns.rank, self.learns.targets)
        return low_rank + self.shape.num_layers * sizes

    @property
    def learning_parameters(self) -> int:
        """How many parameters learn."""
        body = self.shape.body_parameters if self.learns.kind == "full" else 0
        rows = self.shape.row_matrices * self.learning_rows
        return body + self.adapter_parameters + rows * self.shape.hidden_size

    @property
    def gradient_bytes(self) -> int:
        """Gradients in float32. An embedding's is made for all its rows: where only new ones learn, all of it stays."""
        body = self.shape.body_parameters if self.learns.kind == "full" else 0
        rows = self.learning_rows
        if rows and not self.shape.is_tied:
            rows += self.shape.num_rows
        return (body + self.adapter_parameters + rows * self.shape.hidden_size) * WIDE

    @property
    def is_held_narrow(self) -> bool:
        """Whether frozen matrices are held in the 16 bits they are multiplied in, or in fewer."""
        return self.learns.kind != "full" and (self.compute.is_mixed or self.is_quantised)

    @property
    def is_quantised(self) -> bool:
        """Whether the layers' frozen matrices are held in 8 or 4 bits."""
        return self.learns.frozen_base != "exact"

    @property
    def narrow_parameters(self) -> int:
        """Parameters of the frozen matrices held so: the layers', and a head whose rows do not learn."""
        return self._narrow_of_layers + (self.matrix_bytes // WIDE if self.is_head_narrow else 0)

    @property
    def narrow_bytes(self) -> int:
        """What those take as they are held; the head always in 16 bits."""
        layers, form = self._narrow_of_layers, self.learns.frozen_base
        a_number = self.compute.num_bytes if form == "exact" else BYTES_A_NUMBER[form]
        return int(layers * a_number) + (self.narrow_parameters - layers) * self.compute.num_bytes

    @property
    def wide_again_bytes(self) -> int:
        """The largest matrix made wide for a product: where it is held in 8 or 4 bits, or in halves for a product in
        float32."""
        largest = max(inner * outer for inner, outer in self.shape.projections.values())
        is_narrow = self.is_quantised or (self.compute.in_halves and not self.compute.is_mixed)
        return largest * self.compute.num_bytes if is_narrow else 0

    @property
    def _narrow_of_layers(self) -> int:
        if not self.is_held_narrow:
            return 0
        known, exact = self.shape.projections, self.learns.targets if self.learns.is_dora else ()
        layer = sum(inner * outer for name, (inner, outer) in known.items() if name not in exact)
        return self.shape.num_layers * layer

    @property
    def is_head_narrow(self) -> bool:
        """Whether the head is one of them: its rows do not learn and no embedding shares it."""
        is_frozen = self.learns.kind != "full" and self.learns.rows == "none"
        return self.compute.is_mixed and is_frozen and not self.shape.is_tied

    @property
    def checkpoint_bytes(self) -> int:
        """Weights that learn and Adam's two moments of each, on disk."""
        return 3 * WIDE * self.learning_parameters


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes by item at one moment of a stage."""

    name: str
    items: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return sum(self.items.values())


def peak(size: StageSize) -> Moment:
    """The moment at which most is alive."""
    return max(moments(size), key=lambda moment: moment.num_bytes)


def moments(size: StageSize) -> Iterator[Moment]:
    """Every moment that may be the worst."""
    yield from _look(size)
    yield from _pass(size)
    yield Moment("optimizer's step", _held(size, size.gradient_bytes) | _put_together(size))
    yield _heldout(size)
    if size.keeps_best and size.compute.is_cpu:
        best = WIDE * size.learning_parameters
        yield Moment("keeping the best weights", _held(size, size.gradient_bytes) | {"best weights read back": best})


def _put_together(size: StageSize) -> dict[str, int]:
    """A block of a weight that is held in halves."""
    if not size.compute.in_halves:
        return {}
    largest = max(size.shape.num_rows * size.shape.hidden_size, *(i * o for i, o in size.shape.projections.values()))
    return {"workspace": min(BLOCK["cpu" if size.compute.is_cpu else "cuda"], largest) * WIDE}


def _held(size: StageSize, gradients: int, has_moments: bool = True) -> dict[str, int]:
    """What is there whatever is computed."""
    narrow = size.narrow_parameters
    # The fp32 originals wait on the CPU: beside a GPU, but in the same memory where the CPU computes.
    wide = size.shape.num_parameters - (0 if size.compute.is_cpu else narrow)
    items = {
        "weights fp32": wide * WIDE,
        FROZEN[size.learns.frozen_base]: size.narrow_bytes,
        "adapter fp32": size.adapter_parameters * WIDE,
        "gradients fp32": gradients,
        "Adam's moments fp32": 2 * WIDE * size.learning_parameters if has_moments else 0,
        KERNELS: KERNEL_BYTES[size.learns.kind] if size.compute.is_cpu and size.compute.is_mixed else 0,
    }
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def _pass(size: StageSize) -> Iterator[Moment]:
    """Forward, loss, and backward layer by layer, of a micro-batch that is not the first of its step (or the only)."""
    shape, learns, batch, compute = size.shape, size.learns, size.batch, size.compute
    last = shape.num_layers - 1
    inner, end = (kept_by_layer(shape, learns, batch, compute, is_last=is_last) for is_last in (False, True))
    whole = [inner] * last + [end]
    kept = [_kept(size, layer, number) for number, layer in enumerate(whole)]
    once = kept_once(shape, learns, batch, compute)
    prior = size.gradient_bytes if size.is_accumulating else 0
    layer_gradients = _layer_gradients(size)
    if size.is_checkpointing and compute.is_mixed and learns.kind == "full":
        # Autocast remembers the copy of every learning weight until the forward pass is over.
        copies = sum(layer["copies"] for layer in whole)
        yield _moment(size, "forward", prior, kept, once, copies=copies, workspace=_forward_workspace(size))
    yield _moment(size, "loss", prior, kept, once, head=_loss_bytes(size))
    made = kept_of_head(shape, learns, size.num_new_rows)
    for number in reversed(range(last + 1)):
        gradients = prior if prior else made + layer_gradients
        again = sum(whole[number].values()) - sum(kept[number].values())
        workspace = _backward_workspace(size, number) + (layer_gradients if prior else 0)
        yield _moment(size, "backward", gradients, kept[: number + 1], once, workspace=workspace + again)
        made += layer_gradients
    # On a CPU rows that were read are added to a split embedding's gradient where it lies (`model/rows.py`).
    is_added_whole = prior and not (compute.is_cpu and size.num_new_rows)
    added = size.matrix_bytes if learns.rows != "none" and (is_added_whole or shape.is_tied) else 0
    workspace = added + 2 * batch.num_tokens * shape.hidden_size * WIDE
    yield _moment(size, "gradient of the embedding", size.gradient_bytes, [], 0, workspace=workspace)


def _kept(size: StageSize, layer: dict[str, int], number: int) -> dict[str, int]:
    """What a layer keeps until its backward: its input alone where it is computed again then."""
    is_last = number == size.shape.num_layers - 1
    if not size.is_checkpointing or (is_last and size.batch.is_last_sparse):  # the short cut is not computed again
        return layer
    return {"activations": size.batch.num_tokens * size.shape.hidden_size * WIDE, "copies": 0}


def _moment(
    size: StageSize, name: str, gradients: int, kept: list[dict[str, int]], once: int, *,
    copies: int = 0, head: int = 0, workspace: int = 0,
) -> Moment:  # fmt: skip
    items = _held(size, gradients) | {
        "copies of weights in 16 bits": copies or sum(layer["copies"] for layer in kept),
        "activations": sum(layer["activations"] for layer in kept) + once,
        "head and loss": head,
        "workspace": workspace,
    }
    return Moment(name, {item: num_bytes for item, num_bytes in items.items() if num_bytes})


def _layer_gradients(size: StageSize) -> int:
    if size.learns.kind == "full":
        return (size.shape.layer_matrices + size.shape.layer_vectors) * WIDE
    return size.adapter_parameters // size.shape.num_layers * WIDE


def _loss_bytes(size: StageSize) -> int:
    """The head while the loss is taken: its matrix in 16 bits, its gradient where none lies there to add it to, a chunk
    of logits, hidden states."""
    narrow = size.compute.num_bytes if size.compute.is_mixed else 0
    gradient = 0 if size.is_accumulating else head_gradient_bytes(size)
    hidden = size.batch.num_labels * size.shape.hidden_size * (WIDE + narrow)
    return _head_bytes(size) + gradient + hidden + _chunk_bytes(size)


def head_gradient_bytes(size: StageSize) -> int:
    """The gradient of the head's learning rows in float32."""
    return size.learning_rows * size.shape.hidden_size * WIDE


def _head_bytes(size: StageSize) -> int:
    """The head's matrix in 16 bits, where it is not held so."""
    is_narrow = size.is_head_narrow or (size.compute.in_halves and not size.shape.is_tied)
    is_copied = size.compute.is_mixed and not is_narrow
    return size.shape.num_rows * size.shape.hidden_size * size.compute.num_bytes if is_copied else 0


def _chunk_bytes(size: StageSize) -> int:
    """A chunk of logits, which become their gradient; where they are of 16 bits, a block of them in float32."""
    device, labels = "cpu" if size.compute.is_cpu else "cuda", max(size.batch.num_labels, 1)
    num_rows, num_bytes = size.shape.num_rows, size.compute.num_bytes
    chunk, _ = chunks_of(labels, num_rows, num_bytes, device)
    block = min(labels, block_rows(num_rows, device)) if size.compute.is_mixed else 0
    return num_rows * (chunk * num_bytes + block * WIDE)


def _backward_workspace(size: StageSize, number: int) -> int:
    """Gradients on their way through a layer: three of the MLP's width less the one freed by then, or the norm's; the
    stream's; and a weight's gradient in 16 bits before it is one in float32."""
    shape, b = size.shape, size.compute.num_bytes
    is_sparse = size.batch.is_last_sparse and number == shape.num_layers - 1
    positions = size.batch.num_labels if is_sparse else size.batch.num_tokens
    width = (2 if size.learns.needs_input("down_proj") else 3) * shape.intermediate_size * b
    stream = shape.hidden_size * WIDE
    in_transit = max(i * o for i, o in shape.projections.values()) * b if size.compute.is_mixed else 0
    in_transit = max(in_transit, size.wide_again_bytes) if size.learns.kind == "full" else size.wide_again_bytes
    return positions * (max(width, 5 * stream) + 2 * stream) + in_transit


def _forward_workspace(size: StageSize) -> int:
    """What a layer makes on its way forward where nothing of it is kept."""
    shape = size.shape
    width = 3 * shape.intermediate_size * size.compute.num_bytes
    stream = shape.hidden_size * WIDE
    return size.batch.num_tokens * (max(width, 4 * stream) + 2 * stream) + size.wide_again_bytes


def _heldout(size: StageSize) -> Moment:
    """A reading between steps: gradients and moments lie there, nothing is kept, autocast remembers its copies."""
    layers = size.shape.num_layers * size.shape.layer_matrices if size.learns.kind == "full" else 0
    is_copied = size.compute.is_mixed and not size.compute.in_halves
    copies = (layers + size.adapter_parameters) * size.compute.num_bytes if is_copied else 0
    items = {
        "copies of weights in 16 bits": copies,
        "head and loss": _head_bytes(size) + _chunk_bytes(size),
        "workspace": _forward_workspace(size),
    }
    return Moment("held-out reading", _held(size, size.gradient_bytes) | items)


def _look(size: StageSize) -> Iterator[Moment]:
    """Before the first step: a pass in float32 over a few rows, then sizes of rows and weights summed in float64."""
    wide = replace(size, compute=replace(size.compute, num_bytes=WIDE), batch=size.look, is_accumulating=False)
    held = _held(size, size.gradient_bytes, has_moments=False)
    for moment in _pass(wide):
        passing = {name: num_bytes for name, num_bytes in moment.items.items() if name not in HELD}
        gradients = {"gradients fp32": moment.items.get("gradients fp32", 0)}
        yield Moment("look before the first step", held | gradients | passing)
    old_rows = (size.shape.num_rows - size.num_new_rows) * size.shape.hidden_size
    doubles = 2 * DOUBLE * old_rows if size.num_new_rows or size.learns.rows == "all" else 0
    yield Moment("look before the first step", held | {"workspace": doubles})
