"""Devices a plan may be made for: memory, speed on paper, and what each cannot do.

Owns that table with its sources, and what was found in this machine. Does not know models or recipes. Speeds are what
the makers publish; the share of it a training step reaches is an assumption, and marked as one wherever it is shown.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graftlm.device import available_memory_bytes, fastest_precision, machine_name, num_cores
from graftlm.errors import UserError

GIB = 2**30
PRECISIONS = ("bf16", "fp16", "fp32")
CPU_GFLOPS = {"fp32": 35.0, "bf16": 150.0}
"""A core's speed in whole training steps: fp32 measured on an AMD EPYC (bench/results, cpu-recorder); bf16 assumed for
cores that compute it in hardware, from a prototype's steps."""
FP8_CAPABILITY = (8, 9)
"""The compute capability from which on CUDA devices multiply in FP8: Ada, Hopper and later."""
EMULATED_GFLOPS = 3.5  # a core without 16-bit products: a tenth of fp32, measured (docs/log.md)
CPU_BANDWIDTH = 10e9  # bytes a second of Adam's update, from a fused step of 57 million parameters in 0.17 s


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device. `flops` a second by precision, dense, with sums in fp32 (0: not computed in hardware).

    `capability` is CUDA's, None for a CPU; `share_reached` of `flops` is what a step is assumed to reach.
    """

    name: str
    title: str
    memory_bytes: int
    flops: Mapping[str, float]
    bandwidth: float
    share_reached: float
    capability: tuple[int, int] | None

    @property
    def is_cpu(self) -> bool:
        """Whether it is no GPU."""
        return self.capability is None

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 is computed in hardware."""
        return self.flops["bf16"] > 0

    @property
    def has_fp8(self) -> bool:
        """Whether FP8 is computed in hardware."""
        return self.capability is not None and self.capability >= FP8_CAPABILITY

    @property
    def fastest(self) -> str:
        """What `precision: auto` takes there."""
        if self.has_bf16:
            return "bf16"
        return "fp32" if self.is_cpu else "fp16"

    @property
    def has_triton(self) -> bool:
        """Whether compiled kernels and varlen attention run there."""
        return self.capability is not None and self.capability >= (8, 0)


def _gpu(
    name: str, title: str, mib: int, bf16: float, fp16: float, fp32: float, gigabytes: float, share: float,
    capability: tuple[int, int],
) -> Device:  # fmt: skip
    flops = {"bf16": bf16 * 1e12, "fp16": fp16 * 1e12, "fp32": fp32 * 1e12}
    return Device(name, title, mib * 2**20, flops, gigabytes * 1e9, share, capability)


# Memory as nvidia-smi tells it (MiB). Sources: NVIDIA's data sheets of each device; for GeForce the tables of the
# Turing, Ampere GA102 and Ada whitepapers, tensor rates with FP32 accumulation and without sparsity. fp32 is that of
# plain units: torch does not use TF32 for it unless told to.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("h200", "NVIDIA H200 SXM", 143_771, 989, 989, 67, 4800, 0.40, (9, 0)),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 81_559, 989, 989, 67, 3350, 0.40, (9, 0)),
        _gpu("a100-80", "NVIDIA A100 80 GB", 81_920, 312, 312, 19.5, 2039, 0.40, (8, 0)),
        _gpu("a100-40", "NVIDIA A100 40 GB", 40_960, 312, 312, 19.5, 1555, 0.40, (8, 0)),
        _gpu("v100-32", "NVIDIA V100 SXM2 32 GB", 32_510, 0, 125, 15.7, 900, 0.25, (7, 0)),
        _gpu("v100-16", "NVIDIA V100 SXM2 16 GB", 16_160, 0, 125, 15.7, 900, 0.25, (7, 0)),
        _gpu("t4", "NVIDIA T4", 15_109, 0, 65, 8.1, 320, 0.25, (7, 5)),
        _gpu("l4", "NVIDIA L4", 23_034, 121, 121, 30.3, 300, 0.35, (8, 9)),
        _gpu("4090", "NVIDIA GeForce RTX 4090", 24_564, 165, 165, 82.6, 1008, 0.35, (8, 9)),
        _gpu("3090", "NVIDIA GeForce RTX 3090", 24_576, 71, 71, 35.6, 936, 0.35, (8, 6)),
        _gpu("2080ti", "NVIDIA GeForce RTX 2080 Ti", 11_019, 0, 57, 13.4, 616, 0.25, (7, 5)),
    )
}


def find_device(name: str, here: Device) -> Device:
    """A device by name: one of the table, or `here`.

    Raises UserError listing the known ones.
    """
    wanted = name.lower()
    if wanted in DEVICES:
        return DEVICES[wanted]
    if wanted == here.name:
        return here
    near = difflib.get_close_matches(wanted, [*DEVICES, "cpu"], n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise UserError(f"No device is called {name!r}.", f"{guess}Known: {', '.join((*DEVICES, 'cpu'))}.")


def device_here(device: torch.device) -> Device:
    """A device of this machine: all of a GPU's memory, of the CPU's what is free now."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return gpu_device(facts.name, facts.total_memory, (facts.major, facts.minor))
    free = available_memory_bytes() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return cpu_device(machine_name(device), free, num_cores(), fastest_precision(device))


def cpu_device(title: str, memory_bytes: int, num_cores: int, fastest: str) -> Device:
    """The CPU of this machine. `fastest` is the precision it computes fastest."""
    has_16_bits = fastest == "bf16"
    narrow = CPU_GFLOPS["bf16"] if has_16_bits else EMULATED_GFLOPS
    flops = {"bf16": narrow if has_16_bits else 0.0, "fp16": 0.0, "fp32": CPU_GFLOPS["fp32"]}
    by_cores = {precision: rate * num_cores * 1e9 for precision, rate in flops.items()}
    return Device("cpu", title, memory_bytes, by_cores, CPU_BANDWIDTH, 1.0, None)


def gpu_device(title: str, memory_bytes: int, capability: tuple[int, int]) -> Device:
    """A GPU of this machine: the table's figures where its name is known, its own memory in any case."""
    plain = title.lower().replace(" ", "")
    for device in DEVICES.values():
        words = device.name.partition("-")[0]
        if words in plain and abs(device.memory_bytes / memory_bytes - 1) < 0.15:
            return Device(
                device.name, title, memory_bytes, device.flops, device.bandwidth, device.share_reached, capability
            )
    flops = {"bf16": 1.0 if capability >= (8, 0) else 0.0, "fp16": 1.0, "fp32": 1.0}
    return Device("gpu", title, memory_bytes, flops, 0.0, 0.0, capability)


def precision_told(device: Device, precision: str) -> tuple[str, str]:
    """What to do about a precision on a device: the one to take, and why (empty where it is right as it is)."""
    wanted = device.fastest if precision == "auto" else precision
    if device.flops[wanted] > 0:
        return wanted, ""
    better = device.fastest
    if device.is_cpu:
        return better, f"this CPU computes {wanted} only by emulation, about ten times slower than fp32"
    return better, f"{device.title} has no {wanted} in hardware"


def rate_of(device: Device, precision: str) -> float:
    """FLOPs a second a step is assumed to compute; 0 where nothing is known of the device."""
    emulated = (
        device.flops["fp32"] * (EMULATED_GFLOPS / CPU_GFLOPS["fp32"]) if device.is_cpu else device.flops["fp32"] / 4
    )
    return (device.flops[precision] or emulated) * device.share_reached
