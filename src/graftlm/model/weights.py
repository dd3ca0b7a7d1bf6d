"""A model folder on disk: looked through before a byte of it is used, written so that it is whole or absent.

Owns the checks of safetensors files, shard indexes and manifests, and the atomic writing of a folder. Does
not know what a model computes: no torch here, only names, shapes, sizes and hashes. On the road every folder
that holds weights (`2-base`, the stages, `N-model`) is read and written through here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftlm.errors import UserError
from graftlm.run import disk_errors, make_folder, progress, read_json, write_json

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER_BYTES = 100_000_000  # Source: the safetensors format's own limit
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: its file, dtype as safetensors names it, shape, and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_model_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises UserError when there is none or it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a model folder: it has no config.json.",
            "Give a folder as save_pretrained writes it (config.json, *.safetensors, tokenizer files).",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.", "Fetch the file again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not an object.", "Fetch the file again.")
    return config


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from file headers alone.

    Raises UserError on pickled weights, a missing or escaping shard, a truncated or damaged file, a dtype
    that is not fp32, fp16 or bf16, and an index that disagrees with its shards.
    """
    index_path, single = folder / INDEX, folder / "model.safetensors"
    if not index_path.is_file() and not single.is_file():
        _refuse_pickles(folder)
        raise UserError(
            f"{folder} holds no weights: neither model.safetensors nor {INDEX}.",
            "Copy the safetensors files there, or choose another folder.",
        )
    if not index_path.is_file():
        return read_header(single)
    weight_map = _weight_map(index_path)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = _contained(folder, shard, index_path)
        tensors |= {n: t for n, t in read_header(path).items() if weight_map.get(n) == shard}
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise UserError(
            f"{index_path} places {lost[0]} in {weight_map[lost[0]]}, which lacks it ({len(lost)} such).",
            "Fetch the index and the shards again: they are not of one model.",
        )
    return tensors


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code; nothing was read.",
            "Take the model's safetensors files, or convert these where you trust them.",
        )


def _weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        weight_map, shards = {}, {None}
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise UserError(f"{index_path} has no usable weight_map.", "Fetch the index file again.")
    return weight_map


def _contained(folder: Path, shard: str, index_path: Path) -> Path:
    """The shard's path, if it is a plain safetensors file name.

    Hub caches link to blobs, so links are followed.
    """
    if shard != Path(shard).name or shard.startswith("."):
        raise UserError(
            f"{index_path} names the shard {shard!r}, which lies outside the folder.",
            "Do not use this download: an honest index names files of its own folder.",
        )
    if not shard.endswith(".safetensors"):
        raise UserError(
            f"{index_path} names {shard}, which is not a safetensors file; it was not read.",
            "Take the safetensors files of the same model.",
        )
    if not (folder / shard).is_file():
        raise UserError(f"The shard {shard} is missing from {folder}.", "Fetch this file; the rest can stay.")
    return folder / shard


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises UserError when the file is cut short or its header is
    damaged.

    Source: the safetensors format: 8 bytes little-endian header length, JSON header, then the tensors without
    gaps.
    """
    size_bytes = path.stat().st_size
    refetch = "Fetch the file again, or write it again; nothing of it was used."
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or length > min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise UserError(f"{path} is cut short or is not safetensors ({size_bytes:,} bytes).", refetch)
        raw = stream.read(length)
    start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    try:
        for name, entry in json.loads(raw).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                tensors[name] = StoredTensor(path, entry["dtype"], shape, start + begin, start + end)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"The header of {path} is damaged.", refetch) from None
    expected = max((tensor.end for tensor in tensors.values()), default=start)
    if expected != size_bytes:
        raise UserError(f"{path} has {size_bytes:,} bytes; its header tells of {expected:,}.", refetch)
    for name, tensor in tensors.items():
        _check_extent(name, tensor, refetch)
    return tensors


def _check_extent(name: str, tensor: StoredTensor, refetch: str) -> None:
    if tensor.dtype not in _ELEMENT_BYTES:
        raise UserError(
            f"{tensor.file} holds {name} as {tensor.dtype}; fp32, fp16 and bf16 are understood.",
            "Take the model's unquantised weights.",
        )
    num_bytes = _ELEMENT_BYTES[tensor.dtype]
    for size in tensor.shape:
        num_bytes *= size
    if tensor.end - tensor.begin != num_bytes:
        raise UserError(f"{tensor.file} has {tensor.end - tensor.begin:,} of {num_bytes:,} bytes of {name}.", refetch)


def tensor_sha256(tensor: StoredTensor) -> str:
    """sha256 over the stored bytes of one tensor."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        digest, left = hashlib.sha256(), tensor.end - tensor.begin
        while left:
            piece = stream.read(min(left, 2**22))
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def model_fingerprint(folder: str | Path) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all tensors.

    The same however the model is sharded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(Path(folder)).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor_sha256(tensor)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_manifest(folder: Path) -> bool:
    """Compare a folder with the manifest.json lying in it; False when there is none.

    Raises UserError naming the file that is missing, has another size or other bytes, or was added beside.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    mend = f"Restore {folder} from where it was made, or make it again; it was not used."
    manifest = read_json(path)
    for name, fact in manifest.items():
        file = folder / name
        if name != Path(name).name or not file.is_file():
            raise UserError(f"{name}, listed in {path}, is missing.", mend)
        size_bytes = file.stat().st_size
        if size_bytes != fact["bytes"]:
            raise UserError(f"{file} has {size_bytes:,} bytes; {MANIFEST} says {fact['bytes']:,}.", mend)
    for name, fact in progress(manifest.items(), len(manifest), f"checking {folder.name}"):
        if file_sha256(folder / name) != fact["sha256"]:
            raise UserError(f"{folder / name} changed since it was written (sha256 differs).", mend)
    added = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in manifest)
    if added:
        raise UserError(f"{folder / added[0]} is not in {MANIFEST}.", f"Move it elsewhere, or delete {path}.")
    return True


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Let a full disk show as the OSError it is: safetensors hides the system's number in its error's text."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> dict[str, str]:
    """Let `write` fill a scratch folder, then put its files into `folder` with a manifest; sha256 by file
    name.

    A new folder appears by one rename. In a folder that already holds something (a step's own marks), weights
    of an earlier try go first and the manifest comes last, so a kill leaves no folder that passes for a
    finished one. Raises DiskError.
    """
    folder = folder.absolute()
    scratch = folder.with_name(f".{folder.name}.saving")
    with disk_errors(folder.parent):
        shutil.rmtree(scratch, ignore_errors=True)
        make_folder(scratch, may_exist=False)
        try:
            with system_errors():
                write(scratch)
            paths = sorted(scratch.iterdir())
            manifest = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in progress(paths, len(paths), f"hashing {folder.name}")
            }
            for path in scratch.iterdir():
                _sync(path)
            if folder.is_dir() and any(folder.iterdir()):
                _move_into(scratch, folder)
                write_json(folder / MANIFEST, manifest)
            else:
                write_json(scratch / MANIFEST, manifest)
                _sync(scratch)
                scratch.replace(folder)
            _sync(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return {name: fact["sha256"] for name, fact in manifest.items()}


def _move_into(scratch: Path, folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    for stale in (*folder.glob("*.safetensors"), folder / INDEX):
        stale.unlink(missing_ok=True)
    for path in sorted(scratch.iterdir()):
        path.replace(folder / path.name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
