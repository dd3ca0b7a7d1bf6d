"""glibc's malloc told to give freed memory back, and oneDNN to keep few kernels: a CPU trains in a process's memory.

Owns malloc's thresholds and when its heap is trimmed. glibc keeps freed blocks below 32 MiB, and before 2.38 seldom
fits an aligned block (as torch asks for) into one that was freed: a stage then holds up to twice what is alive. oneDNN,
which multiplies in 16 bits, makes a kernel for every shape and keeps 1,024 of them, of 1 to 2 MB each, and packed rows
have other shapes in every step: a stage then holds more with every step. Of malloc nothing is set without glibc.
Sources: mallopt(3), malloc_trim(3), oneDNN's guide on its primitive cache; measured: bench/memory.py, docs/log.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

GIVEN_BACK = 4 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Counted: one micro-batch's are 70 at most, in a LoRA stage with all targets whose heads share keys.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "96"}
AS_SET = {
    "MALLOC_MMAP_THRESHOLD_": str(GIVEN_BACK), "MALLOC_TRIM_THRESHOLD_": str(GIVEN_BACK), "THP_MEM_ALLOC_ENABLE": "1",
    **KERNELS,
}  # fmt: skip
"""An environment in which a process begins as `keep_little` leaves one."""
SECONDS_BETWEEN_TRIMS = 10.0


def keep_little() -> None:
    """Have freed blocks of `GIVEN_BACK` bytes or more leave the process, and torch ask for huge pages for new ones.

    Without huge pages the first touch of every block would cost too much time: nothing is done where the kernel has
    none, nor where the user has chosen. To be called before torch makes its first tensor or product.
    """
    for name, value in KERNELS.items():
        os.environ.setdefault(name, value)
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # the user has chosen
        return
    with contextlib.suppress(OSError, AttributeError):  # no Linux, or another malloc than glibc's
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii"):
            return
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, GIVEN_BACK)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first tensor


class HeapTrim:
    """Gives back what is free in the heap, below the thresholds, at most once in `SECONDS_BETWEEN_TRIMS`."""

    def __init__(self) -> None:
        self.is_next_at = 0.0

    def __call__(self, *_: object) -> None:
        """Trim, if it is time to."""
        now = time.monotonic()
        if now >= self.is_next_at:
            self.is_next_at = now + SECONDS_BETWEEN_TRIMS
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
