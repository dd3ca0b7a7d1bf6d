"""Two hosts on this machine: network namespaces with an address each and one wire between them.

Needs root and the `ip` of iproute2; where they cannot be made the test is skipped and says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

WIRE = "eth0"
ADDRESSES = ("10.83.0.1", "10.83.0.2")
CLONE_NEWNET = 0x40000000  # setns(2)


class Hosts:
    """Host 0 and host 1, by the names of their namespaces."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names

    def lay_wire(self) -> None:
        """Join both; what was between them before is gone."""
        first, second = self.names
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("-n", first, "link", "del", WIRE)
        _ip("link", "add", WIRE, "netns", first, "type", "veth", "peer", "name", WIRE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", WIRE)
            for device in ("lo", WIRE):
                _ip("-n", name, "link", "set", device, "up")

    def cut_off(self, host: int) -> None:
        """No packet reaches the host or leaves it any more, and nobody is told."""
        _ip("-n", self.names[host], "link", "set", WIRE, "down")

    def kill_all(self, host: int) -> None:
        """End every process of the host at once."""
        for pid in _ip("netns", "pids", self.names[host]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts with a wire between them. Skips the test where the system makes none."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2)")
    hosts = Hosts((f"graftlm-{os.getpid()}-0", f"graftlm-{os.getpid()}-1"))
    try:
        try:
            for name in hosts.names:
                _ip("netns", "add", name)
            hosts.lay_wire()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield hosts
    finally:
        for host, name in enumerate(hosts.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                hosts.kill_all(host)
                _ip("netns", "del", name)


def move_to(host: str) -> None:
    """Let this process, which has one thread yet, and all it starts live on the host."""
    with Path("/run/netns", host).open("rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {host}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout
