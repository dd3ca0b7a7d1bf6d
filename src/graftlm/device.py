"""Device, dtype policy and randomness of a run.

Owns the choice of device, what each precision means (autocast and loss scale), seeds, random-number states and
memory read-outs. Does not know models, batches or recipes. The training stage hands a `Precision` to the loop.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from graftlm.errors import NumericalStop, UserError

MAX_SKIPS_IN_A_ROW = 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def wants_few_shapes(is_cpu: bool, is_mixed: bool) -> bool:
    """Whether a product of a new shape costs more than one of a known shape and some rows more.

    It does in 16 bits on a CPU: oneDNN makes a kernel for every shape it meets, 4 to 20 ms each, and keeps few
    (`malloc.py`; measured: docs/log.md).
    """
    return is_cpu and is_mixed


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one. Raises UserError when `cuda` is asked for and missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"The recipe asks for device cuda, but torch {torch.__version__} sees none.",
            "Set device=auto, or install a CUDA build of torch (`graftlm doctor` shows what it sees).",
        )
    return torch.device(name)


def fastest_precision(device: torch.device) -> str:
    """What `precision: auto` means on `device`: bf16 where it is computed in hardware, else fp16 (GPU) or fp32 (CPU).

    A CPU without AMX or AVX512-BF16 emulates 16-bit products: about ten times slower there than fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in torch 2.11
    return "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "fp32"


def machine_name(device: torch.device) -> str:
    """What computes, in words: the GPU's name, or the processor's and its cores."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} GPU"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return f"{value.strip()}, {num_cores()} CPU cores"
    return f"{platform.machine()}, {num_cores()} CPU cores"


def num_cores() -> int:
    """Cores this process may use (affinity and cgroup aware where the system tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """Let torch compute on every core this process may use, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cores())


def available_memory_bytes() -> int | None:
    """Memory the system can give without swapping, caches it would let go of counted in; None where it does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return None


def memory_here_bytes(device: torch.device, num_sharing: int = 1) -> int | None:
    """What this process may hold in all: what it holds now, and what is free; None where the system does not say.

    `num_sharing` processes have one CPU's free memory among them; a GPU is one process's own.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        free = available_memory_bytes()
        return None if free is None else free // num_sharing + pages * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held since `forget_peak_memory`: by torch on a GPU, by this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure anew, where the system lets a process do so (Linux, CUDA); elsewhere the peak is that of all."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        # Source: proc(5), clear_refs: 5 resets the peak resident set size.
        Path("/proc/self/clear_refs").write_text("5")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, torch.Tensor]:
    """Every random-number state a training step may draw from, as byte tensors ready to be saved."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@dataclass(slots=True)
class LossScaler:
    """A dynamic loss scale whose rule reads as a table.

    | step | effect |
    |---|---|
    | overflow, hysteresis used up | scale / 2, never below `floor` |
    | overflow, hysteresis left | one unit of hysteresis is used |
    | `growth_interval` good steps since the last overflow | scale x 2, hysteresis restored |
    | overflow at the floor | NumericalStop |

    Source: torch.amp.GradScaler (hysteresis 1) and DeepSpeed's DynamicLossScaler (hysteresis 2, interval 100).
    """

    scale: float
    growth_interval: int
    hysteresis: int
    floor: float
    good_steps: int = 0
    hysteresis_left: int = -1

    def __post_init__(self) -> None:
        if self.hysteresis_left < 0:
            self.hysteresis_left = self.hysteresis

    def update(self, overflowed: bool) -> None:
        """Move the scale after one optimizer step. Raises NumericalStop on an overflow at the floor."""
        if not overflowed:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2
                self.hysteresis_left = self.hysteresis
            return
        self.good_steps = 0
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
            return
        if self.scale <= self.floor:
            raise NumericalStop(
                f"Gradients overflow at loss scale {self.scale:g}, the floor: no scale can save this run.",
                "Lower peak_lr or alpha/rank, or use precision bf16 where the hardware has it.",
            )
        self.scale = max(self.scale / 2, self.floor)

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold to go on exactly."""
        return {"scale": self.scale, "good_steps": self.good_steps, "hysteresis_left": self.hysteresis_left}

    def restore(self, state: dict[str, float]) -> None:
        """Put back what `state` returned."""
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
        self.hysteresis_left = int(state["hysteresis_left"])


@dataclass(slots=True)
class Precision:
    """How numbers are held in a step: trained weights are fp32 masters, matrix products run in `compute_dtype`.

    Under fp16 the loss is scaled before backward and gradients are unscaled before clipping; a step whose
    gradients are not finite is skipped in every precision, so no such step ever touches a weight. `keeps_copies`: a
    weight's copy in 16 bits is kept until the forward pass is over.
    """

    compute_dtype: torch.dtype
    device: torch.device
    scaler: LossScaler | None = None
    max_skips_in_a_row: int = MAX_SKIPS_IN_A_ROW
    skips_in_a_row: int = 0
    keeps_copies: bool = True

    @property
    def name(self) -> str:
        """The recipe's word for it: fp32, bf16 or fp16."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.compute_dtype)

    @property
    def loss_scale(self) -> float:
        """The factor the loss is multiplied by before backward; 1 outside fp16."""
        return self.scaler.scale if self.scaler else 1.0

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the forward pass runs."""
        if self.compute_dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=self.keeps_copies)

    def grad_factor(self, num_targets: int) -> float:
        """What a summed loss is multiplied by before backward: loss scale over the step's number of targets."""
        return self.loss_scale / max(num_targets, 1)

    def unscale_and_clip(
        self,
        groups: dict[str, list[torch.nn.Parameter]],
        max_norm: float,
        norms_of: Callable[[dict[str, list[torch.nn.Parameter]]], dict[str, float]] | None = None,
    ) -> tuple[float, dict[str, float]]:
        """Divide the scale out, clip the global norm; returns it and the norm by group, both before clipping.

        `norms_of` takes the norms where a gradient's other parts lie elsewhere.
        """
        gradients = [p.grad for group in groups.values() for p in group if p.grad is not None]
        if gradients and self.loss_scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale)
        norms = (norms_of or gradient_norms)(groups)
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        if math.isfinite(total) and total > max_norm:
            torch._foreach_mul_(gradients, max_norm / total)
        return total, norms

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: float) -> bool:
        """Update the weights unless `grad_norm` is not finite; returns whether they were updated.

        Raises NumericalStop when too many steps in a row were skipped, or the scale has reached its floor.
        """
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            optimizer.step()
        self.skips_in_a_row = 0 if is_finite else self.skips_in_a_row + 1
        if self.scaler:
            self.scaler.update(overflowed=not is_finite)
        if self.skips_in_a_row >= self.max_skips_in_a_row:
            raise NumericalStop(
                f"{self.skips_in_a_row} steps in a row had gradients that are not finite; none touched a weight.",
                "Lower peak_lr, use precision bf16 or fp32, or look for broken rows in the data.",
            )
        return is_finite


def gradient_norms(groups: Mapping[str, Sequence[torch.nn.Parameter]]) -> dict[str, float]:
    """The 2-norm of each group's gradients."""
    return {name: _norm(p.grad for p in group if p.grad is not None) for name, group in groups.items()}


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """The 2-norm over all `tensors`, summed in float64 so that a large model does not lose digits."""
    present = list(tensors)
    return torch.stack(torch._foreach_norm(present)).double().norm().item() if present else 0.0
