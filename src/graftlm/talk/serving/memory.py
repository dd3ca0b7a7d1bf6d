"""How much memory the keys and values of running answers may take.

Owns that one figure. Does not know who uses it.
"""

from __future__ import annotations

import torch

from graftlm.device import available_memory_bytes
from graftlm.talk.serving.slots import Slots

# The rest is for activations, the copy made while buffers grow, and whoever else uses the machine.
GPU_SHARE, CPU_SHARE = 0.6, 0.25
UNKNOWN_BYTES = 2 * 2**30  # a modest guess where the system does not say


def cache_budget_tokens(slots: Slots, most_tokens: int) -> int:
    """Tokens whose keys and values fit a share of the memory now free, at most `most_tokens`."""
    if slots.device.type == "cuda":
        room_bytes = GPU_SHARE * torch.cuda.mem_get_info(slots.device)[0]
    else:
        room_bytes = CPU_SHARE * (available_memory_bytes() or UNKNOWN_BYTES)
    return min(most_tokens, int(room_bytes // slots.token_bytes))
