"""What will not work on a device, or not well, before anything is run there; and what to do.

Owns those findings, worded as the doctor words them. Does not compute: the plan does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from graftlm.health.activations import Learns
from graftlm.health.devices import DEVICES, Device, precision_told
from graftlm.health.finding import Finding
from graftlm.health.memory import FROZEN, GIB
from graftlm.health.plan import StagePlan, StageWish, fits_at_all, fits_with
from graftlm.health.sharding import Share
from graftlm.model.frozen import FrozenBase
from graftlm.recipe import Projection

QUANTISED: tuple[FrozenBase, ...] = ("int8", "nf4")
_PROJECTIONS = get_args(Projection)
_LESS = {
    "{kind: lora}": Learns("lora", "all", 64, _PROJECTIONS),
    "{kind: lora, rows: none}": Learns("lora", "none", 64, _PROJECTIONS),
    "{kind: new-rows}": Learns("new-rows", "new"),
}


def hazards_of(plans: list[StagePlan], device: Device, num_devices: int) -> list[Finding]:
    """Everything to know before running these stages on `device`, gravest first."""
    found = [*_device(device), *_malloc(device), *_devices(device, num_devices, plans)]
    for plan in plans:
        found += [
            *_memory(plan, device),
            *_precision(plan, device),
            *_split_master(plan, device),
            *_fp8(plan, device),
            *_recomputing(plan),
            *_dropout(plan),
            *_unsure(plan),
        ]
    found = list({(finding.cause, finding.evidence): finding for finding in found}.values())
    return sorted(found, key=lambda finding: ("fatal", "warning", "note").index(finding.severity))


def _device(device: Device) -> Iterator[Finding]:
    if device.capability is not None and device.capability < (7, 5):
        yield Finding(
            "torch-build", "warning", device.title, None,
            "Compute capability 7.0 is left only in torch's CUDA 12.6 builds from torch 2.11 on; the CUDA 12.8 and 13 "
            "builds hold no code for it.",
            "Install torch 2.11 to 2.14 in its CUDA 12.6 build (make setup TORCH=2.11.0 chooses the release).",
        )  # fmt: skip
    if not device.is_cpu and not device.has_triton:
        yield Finding(
            "no-triton", "note", device.title, None,
            "Triton and varlen attention need compute capability 8.0: no compiled kernels there.",
            "Attention over packed rows runs as SDPA by groups of rows; leave stages.NAME.compile at false.",
        )  # fmt: skip


def _malloc(device: Device) -> Iterator[Finding]:
    if device.is_cpu:
        yield Finding(
            "malloc-keeps", "note", device.title, None,
            "What is told is what is alive. malloc holds up to half as much again where tensors have less than 2 MiB, "
            "as in small models, and up to twice as much where the kernel has no huge pages (bench/memory.py).",
            "MALLOC_MMAP_THRESHOLD_=65536 in the environment makes it give back nearly all, for a third more time.",
        )  # fmt: skip


def _devices(device: Device, num_devices: int, plans: list[StagePlan]) -> Iterator[Finding]:
    if num_devices > 1 and device.is_cpu:
        yield Finding(
            "one-cpu", "note", f"{num_devices} devices", None,
            f"{num_devices} processes would share this CPU's cores and memory; the plan is for one.",
            "graftlm run --gpus N starts them where it is wanted all the same (bench/ranks.py).",
        )  # fmt: skip
    elif num_devices > 1 and plans[0].share.way.startswith("zero"):
        yield _with_zero(plans[0].share, num_devices)
    elif num_devices > 1 and not plans[0].share.is_whole:
        yield Finding(
            "sharded", "note", f"{num_devices} devices", None,
            f"Each of {num_devices} ranks takes its rows and holds one part in {plans[0].share.num_parts} of each "
            "layer, its gradients and moments, and all of embedding, head and last norm; the model lies whole in its "
            "machine's memory as a stage begins. What is told is one rank's, and no GPU has run it.",
            "Every weight crosses the wire twice a micro-batch: let them be few and large (micro_batch_tokens), and "
            "set ranks.shard=none where all stages fit one device.",
        )  # fmt: skip
    elif num_devices > 1:
        told = ", ".join(
            f"{plan.wish.name} {plan.sharded.peak_gib:.1f} GiB each" for plan in plans if plan.sharded is not None
        )
        yield Finding(
            "data-parallel", "note", f"{num_devices} devices", None,
            f"graftlm run --gpus shares a step's rows out to {num_devices} ranks; each holds what one device holds, "
            "and the fp32 model in its machine's memory as it begins. No GPU has run either.",
            f"The figures called sharded are what each needs with ranks.shard=full, predicted: {told}.",
        )  # fmt: skip


def _with_zero(share: Share, num_devices: int) -> Finding:
    kept = "The weights are cut too, and" if share.way == "zero3" else "Weights lie whole on each, and"
    return Finding(
        "sharded", "note", f"{num_devices} devices", None,
        f"DeepSpeed cuts gradients and moments over {num_devices} ranks. {kept} gradients "
        "come together where a step is replayed, so that the moments alone are counted as cut; the model lies whole in "
        "its machine's memory as a stage begins. What is told is one rank's, and no GPU has run it.",
        "ranks.shard=full cuts more; ranks.shard=none is faster where all stages fit one device.",
    )  # fmt: skip


def _memory(plan: StagePlan, device: Device) -> Iterator[Finding]:
    wish, name = plan.wish, plan.wish.name
    needed = f"{plan.peak_bytes / GIB:.1f} GiB of {device.memory_bytes / GIB:.1f}"
    if wish.micro_batch_tokens < wish.rows.longest and plan.micro_batch_tokens is not None:
        yield Finding(
            "row-longer-than-budget", "fatal", f"{wish.place}.micro_batch_tokens", None,
            f"{name}: a row may have {wish.rows.longest} tokens, a micro-batch holds {wish.micro_batch_tokens}.",
            f"{wish.place}.micro_batch_tokens={plan.micro_batch_tokens}, or a lower data.max_tokens.",
        )  # fmt: skip
    if plan.fits:
        return
    if plan.micro_batch_tokens is not None and plan.peak_bytes > device.memory_bytes:
        yield Finding(
            "does-not-fit", "warning", wish.place, None,
            f"{name} as it is needs {needed} at its peak ({plan.moment}).",
            f"It fits with {' '.join(plan.changes)}{_or_in_halves(plan, device)}",
        )  # fmt: skip
    elif plan.micro_batch_tokens is None:
        held = sum(plan.items.get(name, 0) for name in ("weights fp32", *FROZEN.values())) / GIB
        yield Finding(
            "does-not-fit", "fatal", wish.place, None,
            f"{name} needs {needed}; not even one row fits. Its weights alone take {held:.1f} GiB.",
            _elsewhere(plan, device),
        )  # fmt: skip


def _in_halves(plan: StagePlan) -> StageWish | None:
    """The stage with its learning weights held in halves, where that is another one."""
    wish = plan.wish
    can_be = wish.learns.kind == "full" and plan.precision == "bf16" and plan.share.is_whole and not wish.fp8
    return replace(wish, split_master=True) if can_be and not wish.split_master else None


def _or_in_halves(plan: StagePlan, device: Device) -> str:
    wish, other = plan.wish, _in_halves(plan)
    if other is None:
        return ""
    asked = wish.micro_batch_tokens, wish.gradient_checkpointing
    return f", or {wish.place}.split_master=true" if fits_with(other, device, plan.precision, *asked) else ""


def _elsewhere(plan: StagePlan, device: Device) -> str:
    """Where the stage would fit, from the table, and what would fit here."""
    wish = plan.wish
    there = [other.name for other in DEVICES.values() if fits_at_all(wish, other)]
    told = [f"It fits one {', '.join(there)}." if there else "It fits no single device of the table."]
    if plan.sharded is not None and plan.sharded.micro_batch_tokens is not None:
        told.append(f"It fits {plan.sharded.num_devices} of these with ranks.shard=full (predicted).")
    other = _in_halves(plan)
    if other is not None and fits_at_all(other, device):
        told.append(f"Here fits {wish.place}.split_master=true, which is the same training.")
    lighter = {
        trains: replace(wish, learns=learns)
        for trains, learns in _LESS.items()
        if learns.kind != wish.learns.kind and (learns.rows != "new" or wish.num_new_rows)
    }
    fitting = [trains for trains, other in lighter.items() if fits_at_all(other, device)]
    if fitting:
        told.append(f"Here fits {wish.place}.trains={' or '.join(fitting)}.")
    frozen = {"": wish} if wish.learns.kind != "full" else {} if fitting else lighter
    lossy = list(filter(None, (_in_fewer_bits(other, trains, device) for trains, other in frozen.items())))
    if lossy:
        told.append(f"Here fits {'; or '.join(lossy)}: lossy.")
    return " ".join([*told, "Else take a smaller base."])


def _in_fewer_bits(wish: StageWish, trains: str, device: Device) -> str:
    """The overrides that hold a stage's frozen base in fewer bits, "" where none fits; `trains`: what would train it,
    "" as it is."""
    if wish.learns.is_dora:
        return ""
    forms = [
        form for form in QUANTISED
        if fits_at_all(replace(wish, learns=replace(wish.learns, frozen_base=form)), device)
    ]  # fmt: skip
    trained = f"{wish.place}.trains={trains} " if trains else ""
    return f"{trained}{wish.place}.frozen_base={' or '.join(forms)}" if forms else ""


def _precision(plan: StagePlan, device: Device) -> Iterator[Finding]:
    wish = plan.wish
    precision, why = precision_told(device, wish.precision)
    if why:
        yield Finding(
            f"no-{wish.precision}", "warning" if plan.has_precision else "fatal", f"{wish.place}.precision", None,
            f"{wish.name} asks for {wish.precision}: {why}.", f"{wish.place}.precision={precision}",
        )  # fmt: skip
    elif precision == "fp16" and device.has_bf16:
        yield Finding(
            "bf16-instead", "note", f"{wish.place}.precision", None,
            f"{wish.name} asks for fp16, whose range is narrow; {device.title} computes bf16 as fast, without a loss "
            "scale.",
            f"{wish.place}.precision=bf16",
        )  # fmt: skip
    elif wish.precision == "auto" and precision == "fp16":
        yield Finding(
            "no-bf16", "note", f"{wish.place}.precision", None,
            f"{device.title} has no bf16 in hardware: auto takes fp16, with a loss scale.",
            "Nothing to do; graftlm preflight tells the headroom first.",
        )  # fmt: skip


def _split_master(plan: StagePlan, device: Device) -> Iterator[Finding]:
    wish = plan.wish
    if wish.split_master and plan.precision != "bf16":
        yield Finding(
            "nothing-split", "note", f"{wish.place}.split_master", None,
            f"{wish.name}: weights are split for products in bf16, and on {device.title} they are in {plan.precision}: "
            "nothing is split.",
            "Nothing to do; it is the same training.",
        )  # fmt: skip


def _fp8(plan: StagePlan, device: Device) -> Iterator[Finding]:
    wish = plan.wish
    if wish.fp8 and not plan.has_fp8:
        found = "" if device.capability is None else f" (compute capability {'.'.join(map(str, device.capability))})"
        yield Finding(
            "no-fp8", "fatal", f"{wish.place}.fp8", None,
            f"{wish.name} asks for FP8, which {device.title}{found} does not compute: it is refused there.",
            f"{wish.place}.fp8=false, or a GPU of compute capability 8.9 or more: h200, h100, l4, 4090.",
        )  # fmt: skip
    elif wish.fp8:
        yield Finding(
            "fp8-not-counted", "note", f"{wish.place}.fp8", None,
            f"{wish.name}: linear layers in FP8, which is lossy. fp8's gain is not counted: not measured.",
            f"{wish.place}.fp8=false computes in bf16.",
        )  # fmt: skip


def _recomputing(plan: StagePlan) -> Iterator[Finding]:
    if plan.fits and plan.wish.gradient_checkpointing and not plan.gradient_checkpointing:
        yield Finding(
            "recomputed-for-nothing", "note", f"{plan.wish.place}.gradient_checkpointing", None,
            f"{plan.wish.name}: activations fit without being computed twice, which takes a quarter to a third of the "
            "time.",
            " ".join(plan.changes),
        )  # fmt: skip


def _dropout(plan: StagePlan) -> Iterator[Finding]:
    dropout = plan.wish.learns.dropout
    if dropout:
        yield Finding(
            "dropout-costs", "note", f"{plan.wish.place}.trains.dropout", None,
            f"{plan.wish.name}: with dropout {dropout:g} every row computes the template's beginning itself, and each "
            "map under an adapter keeps an input of its own.",
            f"{plan.wish.place}.trains.dropout=0 takes less time and memory; it is another training, though.",
        )  # fmt: skip


def _unsure(plan: StagePlan) -> Iterator[Finding]:
    if plan.wish.learns.is_dora:
        yield Finding(
            "dora-not-counted", "note", f"{plan.wish.place}.trains.dora", None,
            "What DoRA keeps besides its adapters is not counted: it needs more memory and time than told.",
            "Leave room, or set dora: false.",
        )  # fmt: skip
