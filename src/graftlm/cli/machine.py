"""The verb that tells what this machine has and can do."""

from __future__ import annotations

from typing import Any

from graftlm.cli.options import AsJson
from graftlm.cli.show import show


def doctor(as_json: AsJson = False) -> None:
    """Versions, devices and what each can and cannot do, free room.

    Example: graftlm doctor
    """
    import shutil

    import torch

    from graftlm.device import available_memory_bytes, fastest_precision, num_cores
    from graftlm.run import versions

    devices: dict[str, Any] = {
        "cpu": {"cores": num_cores(), **_precisions(fastest_precision(torch.device("cpu")))},
        **{f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())},
    }
    memory_bytes = available_memory_bytes()
    free = {
        "disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "memory_gib": None if memory_bytes is None else round(memory_bytes / 2**30, 1),
    }
    show({"versions": versions(), "devices": devices, "free": free}, as_json)


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from graftlm.device import fastest_precision

    facts = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        fastest = fastest_precision(torch.device("cuda", index))
    return {"name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1), **_precisions(fastest)}


def _precisions(fastest: str) -> dict[str, Any]:
    """What `precision: auto` takes on a device, and what it only emulates or lacks."""
    slow = {"fp32": ["bf16 (emulated, slow)", "fp16 (emulated, slow)"], "fp16": ["bf16"], "bf16": []}
    return {"precision_auto": fastest, "cannot": slow[fastest]}
