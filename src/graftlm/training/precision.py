"""The dtype policy of a stage: which precision its products run in, and the loss scale's rule.

Owns the way from a recipe's words to `device.Precision`, and what a device cannot compute.
"""

from __future__ import annotations

import torch

from graftlm.device import DTYPES, LossScaler, Precision, fastest_precision
from graftlm.errors import UserError
from graftlm.health.devices import FP8_CAPABILITY
from graftlm.model.fp8 import require_torchao
from graftlm.recipe import Stage


def make_precision(
    stage: Stage, device: torch.device, begun_in: str | None = None, keeps_copies: bool = True
) -> Precision:
    """The stage's dtype policy; `begun_in` is the precision of the checkpoint it continues, if any.

    `keeps_copies` is of no use where a layer's weights are gone when its turn is over: its copies should be too.

    Raises UserError for bf16 on a GPU without it.
    """
    name = begun_in or (fastest_precision(device) if stage.precision == "auto" else stage.precision)
    refuse_bf16_where_it_cannot_be(name, f"stages.{stage.name}", device)
    rule = stage.loss_scale
    scaler = None
    if name == "fp16":
        scaler = LossScaler(rule.initial, rule.growth_interval, rule.hysteresis, rule.floor)
    return Precision(DTYPES[name], device, scaler, keeps_copies=keeps_copies)


def refuse_bf16_where_it_cannot_be(precision: str, place: str, device: torch.device) -> None:
    """Raises UserError where a stage, at `place` in the recipe, asks for bf16 and this GPU does not compute it."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"{place}.precision is bf16, which {torch.cuda.get_device_name(device)} does not compute.",
            f"Run it with {place}.precision=fp16 (weights stay fp32, the loss is scaled) or {place}.precision=fp32.",
        )


def refuse_fp8_where_it_cannot_be(stage: Stage, place: str, device: torch.device) -> None:
    """Raises UserError where a stage, found at `place` in the recipe, asks for FP8 and this machine cannot do it.

    What the recipe alone shows to be wrong is told by the recipe.
    """
    if not stage.fp8:
        return
    found = "this is a CPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        found = "" if capability >= FP8_CAPABILITY else found
    if found:
        raise UserError(
            f"{place}.fp8 is true, which needs a GPU of compute capability 8.9 or more (Ada, Hopper, later); {found}.",
            f"Set {place}.fp8=false, or run it on such a GPU: graftlm plan RECIPE --on h100.",
        )
    require_torchao()
