"""Pre-flight: what one look at a model and its first rows says before the first step is taken.

Owns the rules on headroom, scale, rates, first loss, dtypes and on what does not learn; those on rows of embedding and
head lie in `preflight_rows.py`. Gets numbers (`look.py`), not models; `training/look.py` takes them. A finding here
costs a second; the same fault found by the training run costs hours.

Sources of thresholds: IEEE 754 for fp16's range; the others lie between the planted faults and the healthy runs of
`tests/training/test_catalogue.py`.
"""

from __future__ import annotations

import math

import torch

from graftlm.device import MAX_SKIPS_IN_A_ROW
from graftlm.health.cures import SHARE_OF_WEIGHTS
from graftlm.health.finding import Finding
from graftlm.health.look import Look
from graftlm.health.preflight_rows import rows_findings

LOW_HEADROOM_BITS = 2.0  # of the forward pass; activations of healthy runs grow by less than that
LOSS_ABOVE_UNIFORM = 3.0  # nats above ln V
ADAPTER_PUSH = 32.0  # times the push of alpha = rank at 2e-4
# Of rank-stabilized LoRA, which multiplies by alpha / sqrt(rank) and so has the same push at a lower rate. Measured on
# the real base, rank 64, alpha 64: 40 times trains well, at 160 the loss rises (as plain LoRA's does at 40).
STABILIZED_PUSH = 80.0
# Adam moves each entry by about the rate: times the rms of the weights it moves. Healthy runs lie at 1 or below.
RATE_RATIO = 10.0
FLOOR_BITS = 4.0  # a loss scale's floor above the ceiling of gradients seen by this much never fits


def preflight(look: Look) -> list[Finding]:
    """The findings, gravest first. Empty is green."""
    findings = [
        *_rows_of_data(look), *_dtypes(look), *_learns(look), *_not_finite(look), *_headroom(look),
        *rows_findings(look), *_first_loss(look), *_adapter(look), *_rates(look), *_scale(look),
    ]  # fmt: skip
    return sorted(findings, key=lambda finding: ("fatal", "warning", "note").index(finding.severity))


def _rows_of_data(look: Look) -> list[Finding]:
    show = "Look at the rows with graftlm data FILE --show 5"
    if look.bad_row_id >= 0:
        return [
            Finding("label-outside-vocabulary", "fatal", f"row {look.bad_row_id}", None,
                    f"Row {look.bad_row_id} holds an id that the model's {look.num_vocab_rows:,} rows do not reach.",
                    "Tokenizer and model must belong together: grow the model with graftlm expand.")
        ]  # fmt: skip
    if not look.num_targets:
        return [
            Finding("no-labels", "fatal", "data", None, "The first step's rows hold no answer to learn from.",
                    f"{show}: empty answers, or a template without them.")
        ]  # fmt: skip
    if not look.is_dialogue:
        return []
    if look.num_targets >= 0.98 * (look.num_tokens - look.num_rows):  # a row's first token is never a label
        return [
            Finding("prompt-is-scored", "warning", "data.template", None,
                    f"{look.num_targets} of the first step's {look.num_tokens} tokens are labels: prompts too.",
                    f"{show}: only answers and their ends should be marked.")
        ]  # fmt: skip
    if not look.ends_right:
        return [
            Finding("answers-without-end", "warning", "data.template", None,
                    "None of the first step's answers ends with the end token: the model would never stop talking.",
                    f"{show}; template and tokenizer must agree on the end token.")
        ]  # fmt: skip
    return []


def _dtypes(look: Look) -> list[Finding]:
    findings = []
    for role, numbers in look.roles.items():
        narrow = [dtype for dtype in numbers.dtypes if dtype in ("float16", "bfloat16")]
        if narrow:
            findings.append(
                Finding("no-fp32-master", "fatal", role, None,
                        f"Weights of {role} are trained in {narrow[0]} itself: updates of a rate of {look.peak_lr:g} "
                        "are rounded away or blow up.",
                        "Train fp32 masters: load the weights in fp32 and let precision choose the products' dtype.")
            )  # fmt: skip
    dtypes = sorted({name for numbers in look.roles.values() for name in numbers.dtypes})
    zero = [name for name in dtypes if torch.tensor(look.eps, dtype=getattr(torch, name)).item() == 0.0]
    if zero:
        findings.append(
            Finding("eps-underflow", "fatal", "eps", None,
                    f"Adam's eps {look.eps:g} is 0 in {zero[0]}: a parameter without gradient becomes 0/0 = NaN.",
                    "Raise eps (1e-8 in fp32, 1e-6 or more in 16 bits), or train fp32 masters.")
        )  # fmt: skip
    return findings


def _learns(look: Look) -> list[Finding]:
    findings = [
        Finding("frozen", "fatal", name, None, f"The recipe trains {name}, and it is frozen.",
                "Something froze it after the stage was prepared: requires_grad must stay as the stage set it.")
        for name in look.frozen[:1]
    ]  # fmt: skip
    for role, numbers in look.roles.items():
        if numbers.shared:
            findings.append(
                Finding("counted-twice", "fatal", numbers.shared[0], None,
                        f"{numbers.shared[0]} shares its memory with another trained parameter: each step moves it "
                        "twice.",
                        "Tie the two (one parameter), or give each memory of its own.")
            )  # fmt: skip
        # An adapter's A gets no gradient while B is zero: that is how it starts.
        silent = [name for name in numbers.silent if ".lora_A" not in name]
        if silent:
            findings.append(
                Finding("no-gradient", "warning", silent[0], None,
                        f"{len(silent)} of {numbers.num_tensors} trained tensors of {role} get no gradient at all, "
                        f"first {silent[0]}.",
                        "They are cut off from the loss, or no row of the first step reaches them.")
            )  # fmt: skip
    return findings


def _not_finite(look: Look) -> list[Finding]:
    if look.bad_weight:
        return [
            Finding("weights-not-finite", "fatal", look.bad_weight, None,
                    f"{look.bad_weight} holds numbers that are not finite, before any step was taken.",
                    "Take another copy of the base; for new rows another grow.embedding or grow.head.")
        ]  # fmt: skip
    bad = look.first_bad
    if bad is None:
        return []
    return [
        Finding("not-finite-at-start", "fatal", bad.module, None,
                f"The {bad.phase} pass in fp32 is not finite before any step was taken, first in {bad.module} "
                f"({bad.num_bad} numbers).",
                "The weights are finite and too large: take another copy of the base, or another grow.embedding.")
    ]  # fmt: skip


def _headroom(look: Look) -> list[Finding]:
    bits = look.headroom_bits
    if bits >= LOW_HEADROOM_BITS or not math.isfinite(bits):
        return []
    severity = "note" if look.precision != "fp16" else "fatal" if bits <= 0 else "warning"
    return [
        Finding("no-forward-headroom", severity, look.headroom_where, None,
                f"The largest activation lies {abs(bits):.1f} bits {'above' if bits < 0 else 'below'} fp16's largest "
                "number, 65,504; no loss scale changes that.",
                "Set precision: bf16 where the hardware has it, else fp32." if look.precision == "fp16"
                else f"Nothing to do: {look.precision} reaches far beyond; fp16 would not do here.")
    ]  # fmt: skip


def _first_loss(look: Look) -> list[Finding]:
    kind, loss = max(look.first_loss.items(), key=lambda item: item[1], default=("", 0.0))
    if not math.isfinite(loss) or loss <= look.uniform_loss + LOSS_ABOVE_UNIFORM:
        return []
    return [
        Finding("first-loss-high", "warning", f"{kind} pieces", None,
                f"The first loss on {kind} pieces is {loss:.2f} nats; knowing nothing costs ln V = "
                f"{look.uniform_loss:.2f}.",
                "Something is confidently wrong: the template, the tokenizer, or how new rows start (grow.embedding).")
    ]  # fmt: skip


def _adapter(look: Look) -> list[Finding]:
    if look.lora_factor is None:
        return []
    push = look.lora_factor * look.peak_lr / 2e-4
    if push <= (STABILIZED_PUSH if look.is_rank_stabilized else ADAPTER_PUSH):
        return []
    return [
        Finding("adapter-push-high", "warning", "trains.alpha, trains.rank, peak_lr", None,
                f"The adapter is multiplied by {look.lora_factor:.3g} and learns at {look.peak_lr:g}: {push:.3g} times "
                "the push of alpha = rank at 2e-4.",
                "Lower peak_lr or alpha/rank.")
    ]  # fmt: skip


def _rates(look: Look) -> list[Finding]:
    findings = []
    for role, numbers in look.roles.items():
        # An adapter's side begins at zero: its push is judged instead.
        if role == "adapter" or not numbers.weight_rms or not numbers.peak_lr > RATE_RATIO * numbers.weight_rms:
            continue
        findings.append(
            Finding("rate-too-high", "warning", role, None,
                    f"Weights of {role} have rms {numbers.weight_rms:.2g} and are to learn at {numbers.peak_lr:g}: a "
                    f"step may move them by {numbers.peak_lr / numbers.weight_rms:.2g} times their size.",
                    f"Lower peak_lr (groups.{role}.peak_lr): {SHARE_OF_WEIGHTS * numbers.weight_rms:.1g} is a lot "
                    "already.")
        )  # fmt: skip
    return findings


def _scale(look: Look) -> list[Finding]:
    if look.is_scale_unused:
        return [
            Finding("loss-scale-unused", "note", "loss_scale", None,
                    f"loss_scale is given and the stage computes in {look.precision}: only fp16 has a loss scale.",
                    "Nothing to do; leave it out, or set precision: fp16.")
        ]  # fmt: skip
    role, bits = min(look.ceiling_bits.items(), key=lambda item: item[1], default=("", math.inf))
    if look.loss_floor is None or look.loss_initial is None:
        return []
    beyond = f"gradients of {role} leave fp16's range above 2^{bits:.0f}"
    num_halvings = math.log2(look.loss_initial) - bits
    if math.log2(look.loss_floor) > bits + FLOOR_BITS:
        return [
            Finding("scale-floor-too-high", "fatal", "loss_scale.floor", None,
                    f"The loss scale may not fall below {look.loss_floor:g}, and {beyond}: every step would overflow.",
                    "Lower loss_scale.floor; its default is 1e-4.")
        ]  # fmt: skip
    if num_halvings >= min(MAX_SKIPS_IN_A_ROW, look.num_steps):
        ends = (
            f"after {MAX_SKIPS_IN_A_ROW} in a row the run stops"
            if look.num_steps > MAX_SKIPS_IN_A_ROW
            else f"the stage has {look.num_steps}"
        )
        return [
            Finding("scale-starts-too-high", "fatal", "loss_scale.initial", None,
                    f"The loss scale begins at {look.loss_initial:.3g}, and {beyond}: {num_halvings:.0f} steps would "
                    f"be skipped, and {ends}.",
                    "Lower loss_scale.initial; its default is 65536.")
        ]  # fmt: skip
    return []
