"""The verb that tells what this machine has and can do."""

from __future__ import annotations

from typing import Any

from graftlm.cli.options import AsJson
from graftlm.cli.show import show


def doctor(as_json: AsJson = False) -> None:
    """Versions, devices and what each can do, free room.

    Example: graftlm doctor
    """
    import os
    import shutil

    import torch

    from graftlm.device import num_cores
    from graftlm.run import versions

    devices: dict[str, Any] = {"cpu": {"cores": num_cores(), "precisions": ["fp32", "bf16", "fp16"]}}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        has_bf16 = facts.major >= 8
        devices[f"cuda:{index}"] = {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "precisions": ["fp32", *(["bf16"] if has_bf16 else []), "fp16"],
        }
    memory_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = {"disk_gib": round(shutil.disk_usage(".").free / 2**30, 1), "memory_gib": round(memory_bytes / 2**30, 1)}
    show({"versions": versions(), "devices": devices, "free": free}, as_json)
