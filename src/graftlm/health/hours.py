"""How long a stage takes: its floating-point operations over what a device is assumed to compute in a second.

Owns the formulas, per token of a row, from a model's shape; nothing here was timed, and every figure that is assumed
has its name in `Hours.assumptions`. Tokenising, held-out readings, saving and judging are not in it.

Source: 2 operations for each weight and token forward, 2 for the gradient of what goes in, 2 for that of the weight
(arXiv 2001.08361); attention 4 for each key, query and number of the heads forward, twice that backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.health.activations import Learns
from graftlm.health.devices import Device, rate_of
from graftlm.health.row_facts import RowFacts
from graftlm.model.shapes import Shape

ADAM_BYTES = 28  # read and written of every parameter that learns: gradient, weight and two moments, three written


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations per token of a row: `plain` as trainers count them, `spared` less what is computed once or not at all,
    `executed` with what gradient checkpointing computes again."""

    plain: float
    spared: float
    executed: float


def flops_per_token(
    shape: Shape, learns: Learns, rows: RowFacts, *, is_checkpointing: bool = False, rows_per_batch: float = 1.0,
    shares_prefix: bool = False, spares_last: bool = True,
) -> Flops:  # fmt: skip
    """Operations for one token of a row. `shares_prefix`: what rows begin with alike is computed once in a
    micro-batch; `spares_last`: the last layer's unlabelled positions are not computed."""
    share = rows.mean_labels / rows.mean_tokens
    backward = 2.0 if learns.kind == "full" else 1.0
    adapter = 3 * 2 * shape.adapter_parameters(learns.rank, learns.targets) / shape.num_layers
    attended = 4 * rows.mean_keys * shape.query_width
    layer = 2 * shape.layer_matrices * (1 + backward) + adapter + 3 * attended
    head = share * 2 * shape.num_rows * shape.hidden_size * (2 + (learns.rows != "none"))
    plain = shape.num_layers * layer + head
    sparse = rows.is_last_sparse(spares_last)
    shared = rows.num_shared * (1 - 1 / max(rows_per_batch, 1.0)) if shares_prefix else 0
    computed = 1 - shared / rows.mean_tokens
    # Of the last layer's matrices, keys' and values' are needed everywhere.
    everywhere = 2 * shape.hidden_size * shape.kv_width / shape.layer_matrices
    last_share = everywhere * computed + (1 - everywhere) * share if sparse else computed
    layers = (shape.num_layers - 1) * computed + last_share
    again = layers - (last_share if sparse else 0)  # the short cut is not computed again
    forward = 2 * shape.layer_matrices + adapter / 3 + attended
    spared = layers * layer + head
    return Flops(plain, spared, spared + (again * forward if is_checkpointing else 0))


@dataclass(frozen=True, slots=True)
class Hours:
    """Hours of a stage, None where nothing is known of the device's speed; its steps and what is assumed."""

    hours: float | None
    num_steps: int
    num_tokens: float
    petaflops: float
    gigaflops_per_token: float
    tokens_per_second: float | None
    assumptions: tuple[str, ...]


def hours_of(
    device: Device, precision: str, rows: RowFacts, flops: Flops, *,
    epochs: float, num_steps: int, learning_parameters: int,
) -> Hours:  # fmt: skip
    """The time of a stage on one device; that of several is predicted in `cluster.py`."""
    num_tokens = epochs * rows.num_rows * rows.mean_tokens
    total = flops.executed * num_tokens
    assumptions = [f"rows: {rows.source}"]
    if device.share_reached:
        assumptions.append(_speed_told(device, precision))
    rate = rate_of(device, precision)
    seconds = None
    if rate:
        update = ADAM_BYTES * learning_parameters / device.bandwidth
        seconds = total / rate + num_steps * update
    else:
        assumptions.append(f"nothing is known of the speed of {device.title}: no hours")
    return Hours(
        hours=None if seconds is None else seconds / 3600,
        num_steps=num_steps,
        num_tokens=num_tokens,
        petaflops=total / 1e15,
        gigaflops_per_token=flops.executed / 1e9,
        tokens_per_second=None if seconds is None else num_tokens / seconds,
        assumptions=tuple(assumptions),
    )


def _speed_told(device: Device, precision: str) -> str:
    rate = rate_of(device, precision)
    if device.is_cpu:
        return f"{rate / 1e9:.0f} GFLOP/s in {precision} on this CPU: extrapolated from steps measured on one core"
    return (
        f"{rate / 1e12:.0f} TFLOP/s in {precision}, {device.share_reached:.0%} of the data sheet's: assumed, "
        "this program was not timed there"
    )
