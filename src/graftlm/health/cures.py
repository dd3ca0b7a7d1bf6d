"""From a finding to lines of the run's own recipe, ready to be typed behind `graftlm run RECIPE`.

Owns which cause has which knob, and the new value, computed from what the run had. A cause that no knob cures has no
line: its cure is told in words alone. Does not judge and reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftlm.health.rates import RATE_CUT, RateCuts
from graftlm.recipe import LossScale

ONE_CUT = RateCuts(RATE_CUT)
EPS_IN_16_BITS = 1e-6
SHARE_OF_WEIGHTS = 0.1  # of their rms a step: a lot already, as preflight.py tells
REFERENCE_PUSH = 2e-4  # the rate at which alpha = rank pushes an adapter as preflight.py takes for usual

DEFAULT_SCALE = LossScale().initial
_BY_RATE = frozenset(
    {
        "weights-not-finite", "forward-not-finite", "forward-overflow", "backward-overflow", "loss-rose",
        "overflow-storm", "ratchet", "scale-at-floor", "not-finite", "loss-not-finite",
    }
)  # fmt: skip
_BY_START = frozenset({"tiny-new-rows", "huge-new-rows", "not-finite-at-start", "first-loss-high"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What a stage was asked: its section of the recipe, the keys that lead there, and how new rows started."""

    keys: str
    stage: Mapping[str, Any] = field(default_factory=dict)
    grow: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peak_lr(self) -> float | None:
        """The stage's peak rate, where the recipe tells one."""
        rate = self.stage.get("peak_lr")
        return rate if isinstance(rate, int | float) else None

    @property
    def own_rates(self) -> dict[str, float | None]:
        """Peak rates of roles that have their own."""
        return {name: group.get("peak_lr") for name, group in (self.stage.get("groups") or {}).items()}


def recipe_lines(
    cause: str,
    asked: Asked,
    *,
    where: str = "",
    is_start: bool = False,
    cuts: RateCuts = ONE_CUT,
    lora_factor: float | None = None,
    weight_rms: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """`key=value` lines that cure `cause`, none where no knob does.

    `is_start`: how rows of new pieces start is to blame, whatever the cause; `cuts` is what becomes of learning rates;
    `lora_factor` what the adapter was multiplied by; `weight_rms` the size of each role's weights.
    """
    if is_start or cause in _BY_START:
        return _starts(asked, where)
    if cause in _BY_RATE:
        return _rates(asked, cuts)
    if cause == "adapter-push-high" and lora_factor:
        return (f"{asked.keys}.groups.adapter.peak_lr={REFERENCE_PUSH / lora_factor:.3g}",)
    rms = (weight_rms or {}).get(where)
    if cause == "rate-too-high" and rms:
        knob = f"groups.{where}.peak_lr" if asked.own_rates.get(where) else "peak_lr"
        return (f"{asked.keys}.{knob}={SHARE_OF_WEIGHTS * rms:.1g}",)
    if cause == "no-forward-headroom":
        return (f"{asked.keys}.precision=fp32",)
    if cause == "scale-starts-too-high" and _initial_scale(asked) > DEFAULT_SCALE:
        return (f"{asked.keys}.loss_scale.initial={DEFAULT_SCALE:.0f}",)
    if cause == "eps-underflow":
        return (f"{asked.keys}.eps={EPS_IN_16_BITS:g}",)
    if cause == "over-fitted" and asked.stage.get("keep") == "last":
        return (f"{asked.keys}.keep=best",)
    return ()


def _initial_scale(asked: Asked) -> float:
    return (asked.stage.get("loss_scale") or {}).get("initial") or DEFAULT_SCALE


def _rates(asked: Asked, cuts: RateCuts) -> tuple[str, ...]:
    rate, own = asked.peak_lr, asked.own_rates
    if rate is None:
        return ()
    lines = [f"{asked.keys}.peak_lr={rate * cuts.of_all:.3g}"] if cuts.of_all != 1.0 else []
    changed = [(name, lr) for name, lr in own.items() if lr and cuts.of(name) != 1.0]
    return tuple(lines + [f"{asked.keys}.groups.{name}.peak_lr={lr * cuts.of(name):.3g}" for name, lr in changed])


def _starts(asked: Asked, where: str) -> tuple[str, ...]:
    """Another start for the new rows of the matrix named, or of both."""
    matrices = [name for name in ("embedding", "head") if name in where] or ["embedding", "head"]
    return tuple(f"grow.{name}={_other_start(asked.grow.get(name))}" for name in matrices if name in asked.grow)


def _other_start(had: Any) -> str:
    return "subpiece-mean-norm" if had == "subpiece-mean" else "subpiece-mean"
