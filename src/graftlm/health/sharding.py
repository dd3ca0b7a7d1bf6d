"""How much memory a rank needs where a stage is shared out over several: what is cut, and what stays whole.

Owns the ways of sharing, and the way from one device's moments (`memory.py`) to a rank's. Where the decoder layers are
cut, whole on every rank are embedding, head and last norm with their gradients and moments, the activations of its own
rows, and while they are computed two layers: the one at work and the next, already on its way. What the buffers of
FSDP2 take is read from its code, not measured on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from graftlm.health.activations import WIDE
from graftlm.health.memory import FROZEN, Moment, StageSize, head_gradient_bytes, moments, peak

COPIES = "copies of weights in 16 bits"
FULL_PASSES = ("forward", "held-out reading")
"""Moments at which autocast would remember copies of every layer; it is told not to."""
PASSES = (*FULL_PASSES, "loss", "backward", "look before the first step")


@dataclass(frozen=True, slots=True)
class Share:
    """How a stage lies on several ranks: `whole` on each; its decoder layers in `num_parts` (`layers`: ranks.shard full
    or hybrid); or as the second or third stage of DeepSpeed's ZeRO cuts it into as many."""

    way: Literal["whole", "layers", "zero2", "zero3"] = "whole"
    num_parts: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all."""
        return self.way == "whole"


WHOLE = Share()


def peak_of(size: StageSize, share: Share) -> Moment:
    """The moment at which a rank holds most."""
    if share.is_whole:
        return peak(size)
    if share.way == "layers":
        return peak_of_rank(size, share.num_parts)
    return peak_with_zero(size, share.num_parts, share.way == "zero3")


def peak_of_rank(size: StageSize, num_parts: int) -> Moment:
    """The moment at which a rank holds most, its layers cut into `num_parts`. Of several micro-batches a step, as one
    whose gradients lie there already; rank 0's, which on a CPU holds more than the others."""
    found = moments_of_rank(replace(size, is_accumulating=True), num_parts)
    return max(found, key=lambda moment: moment.num_bytes)


def peak_with_zero(size: StageSize, num_ranks: int, are_weights_cut: bool) -> Moment:
    """The same where DeepSpeed cuts moments, gradients and, in its third stage, weights: of those only the moments are
    counted as cut, for held-out readings and replays put the others together on every rank (`training/zero.py`).

    What it keeps beside them is read from its code, not measured.
    """
    found = moments_with_zero(replace(size, is_accumulating=True), num_ranks, are_weights_cut)
    return max(found, key=lambda moment: moment.num_bytes)


def moments_with_zero(size: StageSize, num_ranks: int, are_weights_cut: bool) -> Iterator[Moment]:
    """Every moment that may be the worst there."""
    own = -(-size.learning_parameters * WIDE // num_ranks)
    for moment in moments(size):
        items = dict(moment.items)
        items["Adam's moments fp32"] = -(-items.get("Adam's moments fp32", 0) // num_ranks)
        if are_weights_cut:
            items["weights fp32"] = size.shape.num_parameters * WIDE
            items.pop(FROZEN["exact"], None)  # not held in 16 bits
            items["weights fp32, cut"] = -(-size.shape.num_parameters * WIDE // num_ranks)
        items["DeepSpeed's own weights, and gradients twice"] = 3 * own
        if moment.name == "loss":  # no gradient of an earlier micro-batch lies at the head
            items["head and loss"] += head_gradient_bytes(size)
        yield Moment(moment.name, items)


def moments_of_rank(size: StageSize, num_parts: int) -> Iterator[Moment]:
    """Every moment that may be the worst."""
    for moment in moments(size):
        items = _of_rank(size, moment, num_parts)
        yield Moment(moment.name, items)
        if size.compute.is_cpu and moment.name == "optimizer's step":
            yield Moment("saving a checkpoint", items | {"checkpoint": size.checkpoint_bytes})


def _of_rank(size: StageSize, moment: Moment, num_parts: int) -> dict[str, int]:
    """A rank's bytes by item."""
    items, cut, num_layers = dict(moment.items), _cut_bytes(size), size.shape.num_layers
    if size.compute.is_cpu:
        items["weights fp32"] -= size.narrow_parameters * WIDE  # rank 0 alone keeps what they were made of
    for name, num_bytes in cut.items():
        part = min(items.get(name, 0), num_bytes)
        if part:
            items[name] += -(-part // num_parts) - part
    if moment.name in FULL_PASSES and COPIES in items:
        items[COPIES] //= num_layers
    if moment.name in PASSES:
        items["gathered layers"] = 2 * layer_bytes(size) // num_layers
    if moment.name == "backward":
        items["gradients on their way"] = cut["gradients fp32"] // num_layers
    return items | _kept_by_first(size)


def layer_bytes(size: StageSize) -> int:
    """All decoder layers' weights and adapters, as they are held and sent."""
    cut = _cut_bytes(size)
    return sum(cut[name] for name in ("weights fp32", FROZEN[size.learns.frozen_base], "adapter fp32"))


def _cut_bytes(size: StageSize) -> dict[str, int]:
    """By item, what of it lies in the decoder layers."""
    shape = size.shape
    layers = shape.num_layers * (shape.layer_matrices + shape.layer_vectors)
    head_narrow = shape.num_rows * shape.hidden_size if size.is_head_narrow else 0
    learning = (layers if size.learns.kind == "full" else 0) + size.adapter_parameters
    return {
        "weights fp32": (layers - (size.narrow_parameters - head_narrow)) * WIDE,
        FROZEN[size.learns.frozen_base]: size.narrow_bytes - head_narrow * size.compute.num_bytes,
        "adapter fp32": size.adapter_parameters * WIDE,
        "gradients fp32": learning * WIDE,
        "Adam's moments fp32": 2 * learning * WIDE,
    }


def _kept_by_first(size: StageSize) -> dict[str, int]:
    """The weights that do not learn, which rank 0 keeps whole: beside a GPU, but in the same memory as a CPU."""
    if not size.compute.is_cpu or size.learns.kind == "full":
        return {}
    learning_rows = size.shape.row_matrices * size.learning_rows * size.shape.hidden_size
    return {"frozen weights fp32, whole on rank 0": (size.shape.num_parameters - learning_rows) * WIDE}
