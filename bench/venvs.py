"""An environment of its own for each peer, made once from the pins beside its arm.

Torch is installed first, so that no peer's requirements choose another build of it: where the CPU build comes from is
the machine's own setting of pip.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment below `folder`, made now if it is not there for these very pins."""
    pins = (PEERS / f"{peer}.txt").read_text()
    home = (folder / peer).absolute()
    python, stamp = home / "bin" / "python", home / "pins.txt"
    if stamp.is_file() and stamp.read_text() == pins:
        return python
    print(f"{peer}: making its environment in {folder / peer}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    for wanted in ([torch], ["--requirement", str(PEERS / f"{peer}.txt")]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    _without_cuda_extensions(home, python)
    stamp.write_text(pins)
    return python


def _without_cuda_extensions(home: Path, python: Path) -> None:
    """LLaMA-Factory requires torchvision and torchaudio, which are published for CUDA and do not load beside a CPU
    torch. It reads no picture and no sound here: the one goes, the other does without its compiled part."""
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    for library in home.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()
