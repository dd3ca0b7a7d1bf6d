"""Freed memory leaves the process: large blocks at once, small ones when the heap is trimmed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm import malloc
from graftlm.malloc import HeapTrim

KEPT = """
import ctypes
from pathlib import Path
from graftlm.malloc import HeapTrim, keep_little
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
libc.free(libc.malloc(30 << 20))  # from now on glibc keeps blocks of up to as much
blocks = [libc.malloc({size}) for _ in range((90 << 20) // {size})]
for block in blocks:
    libc.memset(block, 1, {size})
full = resident()
for block in blocks[:-1]:
    libc.free(block)
{then}
print(full - resident() >> 20)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")


def given_back(size: int, first: str = "", then: str = "") -> int:
    """MiB of 90 that leave the process when blocks of `size` are freed, all but the last."""
    code = KEPT.format(size=size, first=first, then=then)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def test_large_blocks_leave_the_process_when_they_are_freed() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("no huge pages here: memory is kept for the sake of time")
    assert given_back(5 << 20) < 5
    assert given_back(5 << 20, first="keep_little()") > 80


def test_small_blocks_leave_it_when_the_heap_is_trimmed() -> None:
    assert given_back(1 << 16) < 5
    assert given_back(1 << 16, then="HeapTrim()()") > 80


@pytest.mark.parametrize(("chosen", "kept"), [(None, "96"), ("7", "7")])
def test_few_kernels_are_kept_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, kept: str
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    code = f"import os; from graftlm.malloc import keep_little; keep_little(); print(os.environ['{name}'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == kept


def test_the_heap_is_trimmed_once_in_ten_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    at, trimmed = [100.0], []
    monkeypatch.setattr(malloc.time, "monotonic", lambda: at[0])
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: type("Libc", (), {"malloc_trim": trimmed.append}))
    trim = HeapTrim()
    for at[0] in (100.0, 105.0, 109.0, 110.0, 111.0, 125.0):
        trim("a step's record")
    assert trimmed == [0, 0, 0]
