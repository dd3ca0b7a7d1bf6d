"""What a run's curves say by themselves: records in, findings and a verdict out.

Owns the rules by which a curve is called a storm, a ratchet, a divergence or damage. Pure functions: no model, no
files. What only a replay can tell (which layer, which row) lies in the autopsy.

The thresholds come from four published runs of the card's author (three of about 11,715 steps, one of 100; healthy): at
most 7 overflows came in a row, and a scale that fell from 65,536 to 1 in 41 steps came to rest and trained on. When a
rise is an alarm is told in `rise.py`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from itertools import pairwise

from graftlm.health.finding import Finding, Verdict, alarms
from graftlm.health.rates import RATE_CUT
from graftlm.health.records import RunLog, finite_losses
from graftlm.health.rise import quick_eye, slow_eye

WINDOW = 10
STORM_STEPS = 20  # in a row; a calibrating scale with hysteresis 2 needs at most 7 in the published logs
SETTLED_STEPS = 100  # a scale calibrates before
RATCHET_BITS = 8.0
RATCHET_WINDOWS = 4


def diagnose_curves(log: RunLog) -> tuple[list[Finding], Verdict]:
    """Findings from a log alone, in the order of their steps, and the verdict they amount to."""
    findings = [
        *_crash(log), *_storms(log), *_ratchet(log), *_not_finite(log), *_rise(log), *_over_fitted(log),
    ]  # fmt: skip
    findings.sort(key=lambda finding: (finding.step is None, finding.step or 0))
    return findings, _verdict(log, findings)


def smoothed(log: RunLog) -> list[tuple[int, float]]:
    """(step, loss): the median of each reading and the nine before it."""
    losses = list(finite_losses(log.records))
    return [
        (step, statistics.median(loss for _, loss in losses[max(0, place - WINDOW + 1) : place + 1]))
        for place, (step, _) in enumerate(losses)
    ]


# How a run's last words read, what they mean, where, and what to do.
_ENDINGS = (
    (r"nothing was learned", "scale-starts-too-high", "loss_scale.initial",
     "Lower loss_scale.initial; its default is 65536."),
    (r"already at minimum|the floor", "scale-at-floor", "loss scale",
     f"Roll back to the last good state and lower peak_lr ({RATE_CUT:g} of it), or train in bf16 where that works."),
    (r"unscale FP16 gradients", "no-fp32-master", "trained weights",
     "Train fp32 masters: load the weights in fp32 and let mixed precision choose the products' dtype."),
    (r"out of memory|OutOfMemory", "out-of-memory", "device",
     "Its numbers are not to blame: take smaller micro-batches, or compute activations twice."),
    (r"not finite|loss rose|[Oo]verflow|\bnan\b|NaN", "not-finite", "training",
     f"Roll back to the last good state and lower peak_lr ({RATE_CUT:g} of it)."),
)  # fmt: skip


def _crash(log: RunLog) -> list[Finding]:
    if not log.ending:
        return []
    for pattern, cause, where, cure in _ENDINGS:
        if re.search(pattern, log.ending):
            return [Finding(cause, "fatal", where, log.last_step, log.ending, cure)]
    cure = "Read the error itself: the numbers before it do not explain it."
    return [Finding("stopped", "fatal", "training", log.last_step, log.ending, cure)]


def _runs_of_overflows(log: RunLog) -> list[tuple[int, int]]:
    """(first step, length) of every unbroken run of skipped steps."""
    steps = sorted({step for step, _ in log.scales} | {r.step for r in log.records if r.skipped})
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and step == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((step, 1))
    return runs


def _storms(log: RunLog) -> list[Finding]:
    """Long runs of skipped steps: the end of the log, or an hour lost where training went on behind one."""
    return [
        Finding(
            "overflow-storm", "warning" if log.last_step >= first + length + STORM_STEPS else "fatal", "gradients",
            first, f"{length} steps in a row overflowed, from step {first} on{_fall(log, first, length)}; none of them "
            "touched a weight.",
            f"No scale helps when the forward pass itself overflows: roll back and lower peak_lr ({RATE_CUT:g} of it).",
        )
        for first, length in _runs_of_overflows(log)
        if length >= STORM_STEPS
    ]  # fmt: skip


def _fall(log: RunLog, first: int, length: int) -> str:
    """How the scale fell in a run of skipped steps, and the last loss before, as far as they were logged."""
    scales = [scale for step, scale in log.scales if first <= step < first + length]
    losses = [loss for step, loss in finite_losses(log.records) if step < first]
    fell = (
        f", the loss scale falling from {scales[0]:,.7g} to {scales[-1]:,.3g}"
        if scales and scales[0] > scales[-1]
        else ""
    )
    return f"{fell}, behind a loss of {losses[-1]:.2f}" if losses else fell


def _ratchet(log: RunLog) -> list[Finding]:
    """A scale that keeps falling after it should have come to rest: overflows that do not depend on it."""
    settled = [(step, math.log2(scale)) for step, scale in log.scales if step > SETTLED_STEPS and scale > 0]
    if len(settled) < RATCHET_WINDOWS * 2:
        return []
    quarter = len(settled) // RATCHET_WINDOWS
    parts = [settled[i * quarter : (i + 1) * quarter] for i in range(RATCHET_WINDOWS)]
    levels = [statistics.median(bits for _, bits in part) for part in parts]
    fell = levels[0] - levels[-1]
    if fell < RATCHET_BITS or any(later > earlier for earlier, later in pairwise(levels)):
        return []
    return [
        Finding(
            "ratchet", "fatal", "loss scale", settled[0][0],
            f"The scale fell by 2^{fell:.0f} after step {SETTLED_STEPS} and never rose: {len(settled)} overflows that "
            "a lower scale does not cure.",
            "Some rows or a layer give non-finite numbers at any scale: find them with graftlm autopsy, and drop "
            "those rows or lower peak_lr.",
        )
    ]  # fmt: skip


_FILTER = " HF Trainer prints 0.0 for such a loss (logging_nan_inf_filter)."


def _not_finite(log: RunLog) -> list[Finding]:
    bad = [r for r in log.records if r.is_bad]
    if not bad:
        return []
    is_skipped = all(r.skipped for r in bad)
    return [
        Finding(
            "loss-not-finite", "fatal" if len(bad) > 1 and not is_skipped else "warning", "forward pass", bad[0].step,
            f"The loss itself was not finite at {len(bad)} of the steps logged, first at step {bad[0].step}"
            f"{'; all of them were skipped' if is_skipped else ''}."
            f"{_FILTER if any(r.is_filtered for r in bad) else ''}",
            "A loss scale cannot help a forward pass: look at the weights before that step (autopsy), lower peak_lr, "
            "or use bf16 or fp32.",
        )
    ]  # fmt: skip


def _rise(log: RunLog) -> list[Finding]:
    """Loss far above its best, once an eye has seen enough: damage that need not crash."""
    eyes = quick_eye(), slow_eye()
    worst: tuple[float, int, float] | None = None
    for step, loss in finite_losses(log.records):
        for eye in eyes:
            if eye.see(loss) and (worst is None or eye.rise > worst[0]):
                worst = (eye.rise, step, eye.best)
    if worst is None:
        return []
    rise, step, was = worst
    came_back = all(eye.rise <= eye.limit for eye in eyes)
    is_harmless = _improved_behind(log, step)
    return [
        Finding(
            "loss-rose", "note" if is_harmless else "warning" if came_back else "fatal", "training loss", step,
            f"The smoothed loss rose by {rise:.2f} nats above its best of {was:.2f} and "
            f"{'came back' if came_back else f'ended at {eyes[1].last:.2f}'}"
            f"{'; held-out loss fell all the same: those rows were harder' if is_harmless else ''}.",
            "Nothing to do." if is_harmless else f"Lower peak_lr ({RATE_CUT:g} of it) from the last good checkpoint "
            "on; for LoRA alpha/rank counts as the rate does.",
        )
    ]  # fmt: skip


def _improved_behind(log: RunLog, step: int) -> bool:
    """Whether held-out loss is better at the end than ever before `step`: no damage was done there."""
    before = [loss for at, loss in log.heldout if at < step]
    after = [loss for at, loss in log.heldout if at >= step]
    return bool(before and after) and after[-1] <= min(before)


def _over_fitted(log: RunLog) -> list[Finding]:
    readings = [(step, loss) for step, loss in log.heldout if math.isfinite(loss)]
    if len(readings) < 3:
        return []
    best_step, best = min(readings, key=lambda reading: reading[1])
    last_step, last = readings[-1]
    if last < best * 1.02:
        return []
    return [
        Finding(
            "over-fitted", "note", "held-out loss", best_step,
            f"Held-out loss was best at step {best_step} ({best:.3f}) and ended at {last:.3f} (step {last_step}).",
            "Keep the best weights (keep: best) or train fewer epochs.",
        )
    ]  # fmt: skip


def _verdict(log: RunLog, findings: Sequence[Finding]) -> Verdict:
    grave = alarms(findings)
    if log.ending or any(f.cause in ("overflow-storm", "ratchet") and f.step for f in grave if f.severity == "fatal"):
        return "crashed"
    if any(f.severity == "fatal" for f in grave):
        curve = smoothed(log)
        if log.records and log.records[-1].is_bad:
            return "diverged"
        return "diverged" if not curve or curve[-1][1] >= curve[0][1] else "damaged"
    if log.interventions and _never_improved(log):
        return "diverged"
    return "recovered" if grave or log.interventions else "healthy"


def _never_improved(log: RunLog) -> bool:
    """Whether no held-out reading is better than the one before the first step."""
    before = [loss for step, loss in log.heldout if step == 0]
    after = [loss for step, loss in log.heldout if step > 0]
    return bool(before and after) and not min(after) < before[0]
