"""What one forward and backward pass shows: largest numbers by module, and the first tensor that is not finite.

Owns the hooks. Does not judge (`preflight.py`, `incident.py`) and does not know batches: the pass to watch runs inside
the context. On the road it is used once before a stage's first step, and again over steps that overflowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.model.finite import bad_parameters

Phase = Literal["forward", "backward"]
FP16_MAX = 65_504.0  # IEEE 754 binary16


@dataclass(frozen=True, slots=True)
class BadTensor:
    """The first non-finite tensor of a pass in time order (forward before backward).

    `place` is the first of its `num_places` positions that holds a bad entry: of all tokens, or of the labelled ones
    in a last layer computed only there. `num_bad` counts the bad entries.
    """

    phase: Phase
    module: str
    place: int
    num_bad: int
    num_places: int


@dataclass(slots=True)
class Probe:
    """Largest absolute values by module: `products` of matrix products and what goes into them (what fp16 must hold),
    `gradients` of module outputs in the backward pass."""

    products: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    first_bad: BadTensor | None = None

    def note(self, phase: Phase, name: str, tensor: Tensor, seen: dict[str, float] | None) -> None:
        """Take in one tensor; `seen` is where its largest value is kept."""
        values = tensor.detach()
        largest = values.abs().amax().item() if values.numel() else 0.0
        if not math.isfinite(largest) and self.first_bad is None:
            self.first_bad = _bad_tensor(phase, name, values)
        if seen is not None:
            # max() would pass over nan, depending on the order of its arguments.
            before = seen.get(name, 0.0)
            seen[name] = largest if math.isnan(largest) or largest > before else before

    def largest(self, seen: dict[str, float]) -> tuple[str, float]:
        """The module with the largest value, NaN counting as larger than anything; ("", 0) when nothing was seen."""
        return max(seen.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=("", 0.0))


def _bad_tensor(phase: Phase, name: str, values: Tensor) -> BadTensor:
    bad = ~torch.isfinite(values)
    by_token = bad.reshape(-1, bad.shape[-1]).any(-1) if bad.ndim > 1 else bad
    return BadTensor(phase, name, int(by_token.nonzero()[0]), int(bad.sum()), len(by_token))


@contextmanager
def watching(model: nn.Module) -> Iterator[Probe]:
    """Hooks on every module that computes something itself; taken off at the end."""
    probe = Probe()
    hooks: list[Any] = []
    for name, module in model.named_modules():
        if _computes(module):
            hooks.append(module.register_forward_hook(_forward_hook(probe, plain_name(name), _is_product(module))))
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()


def plain_name(name: str) -> str:
    """A module's or parameter's name as the plain model has it: without the wrapping of PEFT and of split rows."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    for part, rows in (("original0", "old rows"), ("original1", "new rows")):
        name = name.replace(f".parametrizations.weight.{part}", f".weight ({rows})")
    return name.replace(".lora_A.default", ".lora_A").replace(".lora_B.default", ".lora_B")


NameOf = Callable[[int], str]


def no_name(_: int) -> str:
    """What an id is called where nobody knows its text."""
    return ""


def first_bad_weight(model: nn.Module, first_new_id: int | None, name_of: NameOf = no_name) -> str:
    """The first parameter, learning or not, with a number that is not finite; of a vocabulary matrix, its row too.

    Empty where all are finite. `name_of` tells a row's text.
    """
    for name, rows in bad_parameters(model):
        if not rows:
            return plain_name(name)
        # The second part of a split matrix begins with the first new piece.
        offset = (first_new_id or 0) if name.endswith("original1") else 0
        text = name_of(rows[0] + offset)
        return f"{plain_name(name)}, row {rows[0] + offset}" + (f" ({text!r})" if text else "")
    return ""


def bits_below(largest: float, limit: float = FP16_MAX) -> float:
    """How many times `largest` may double before it passes `limit`; negative when it has, -inf when not finite."""
    if not math.isfinite(largest):
        return -math.inf
    return math.log2(limit / largest) if largest > 0 else math.inf


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _computes(module: nn.Module) -> bool:
    is_leaf = not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))
    return _is_product(module) or isinstance(module, nn.Embedding) or is_leaf


def _forward_hook(probe: Probe, name: str, is_product: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if is_product:
            # What goes in is rounded to 16 bits too: inside an mlp it is the product of two activations.
            probe.note("forward", name, inputs[0], probe.products)
        probe.note("forward", name, output, probe.products if is_product else None)
        if output.requires_grad:
            output.register_hook(lambda gradient: probe.note("backward", name, gradient, probe.gradients))

    return hook
