"""A model folder on disk: written whole or not at all, its manifest checked, its headers never trusted.

What loading refuses is tested where models are loaded (test_causal.py).
"""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graftlm.errors import DiskError, UserError
from graftlm.model import weights as weights_module
from graftlm.model.weights import (
    model_fingerprint,
    read_header,
    stored_tensors,
    system_errors,
    tensor_sha256,
    verify_manifest,
    write_folder,
)


def write(scratch: Path, value: float = 1.0) -> None:
    save_file({"a": torch.full((2, 3), value), "b": torch.arange(4.0)}, scratch / "model.safetensors")
    (scratch / "config.json").write_text("{}")


def test_a_written_folder_verifies_and_tells_its_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hashes = write_folder(folder, write)
    assert verify_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: fact["sha256"] for name, fact in manifest.items()} == hashes
    assert set(hashes) == {"model.safetensors", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not verify_manifest(tmp_path)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("place", ["_sync", "_move_into", "write_json", "file_sha256"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_kill_while_writing_leaves_the_old_folder_or_none_that_passes(tmp_path, monkeypatch, place, beside) -> None:
    """A step's folder, which holds its own marks already, loses its manifest first and gets it last."""
    folder = tmp_path / "2-base"
    if beside:
        folder.mkdir()
        (folder / "started.json").write_text("{}")
        write_folder(folder, write)

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, place, kill)
        if place == "_move_into" and not beside:
            patch.setattr(weights_module, "write_json", kill)
        with pytest.raises(Killed):
            write_folder(folder, lambda scratch: write(scratch, 2.0))
    if not beside:
        assert not folder.exists()
    elif (folder / "manifest.json").exists():
        verify_manifest(folder)
    write_folder(folder, lambda scratch: write(scratch, 3.0))
    verify_manifest(folder)
    assert load_file(folder / "model.safetensors")["a"].unique().tolist() == [3.0]
    assert (folder / "started.json").exists() is beside


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_told_whatever_library_meets_it(tmp_path: Path, number: int) -> None:
    """D1: also out of safetensors, which hides the number; an error without one is not taken for the disk's."""
    for error in (OSError(number, "no room"), SafetensorError(f"I/O error: no room (os error {number})")):

        def fail(_: Path, error: Exception = error) -> None:
            raise error

        with pytest.raises(DiskError, match="make it writable" if number == errno.EROFS else "bytes free"):
            write_folder(tmp_path / "m", fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SafetensorError), system_errors():
        raise SafetensorError("header too large")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_a_place_that_takes_no_folder_is_told() -> None:
    with pytest.raises(UserError, match="No folder can be made in /proc"):
        write_folder(Path("/proc/x"), lambda _: None)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", write)
    (tmp_path / "secret").write_text("x")
    manifest = {"../secret": {"bytes": 1, "sha256": weights_module.file_sha256(tmp_path / "secret")}}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is missing"):
        verify_manifest(tmp_path / "m")


def test_headers_tell_names_shapes_and_places(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", write)
    found = read_header(tmp_path / "m" / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "a": ("F32", (2, 3)), "b": ("F32", (4,)),
    }  # fmt: skip
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert content[found["b"].begin : found["b"].end] == torch.arange(4.0).numpy().tobytes()
    assert stored_tensors(tmp_path / "m") == found


def test_the_fingerprint_follows_names_shapes_and_bytes_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", write)
    write_folder(tmp_path / "other", lambda scratch: write(scratch, 2.0))
    write_folder(tmp_path / "again", write)
    (tmp_path / "again" / "config.json").write_text('{"x": 1}')
    assert model_fingerprint(tmp_path / "one") == model_fingerprint(tmp_path / "again")
    assert model_fingerprint(tmp_path / "one") != model_fingerprint(tmp_path / "other")
    first, second = (read_header(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert tensor_sha256(first["b"]) == tensor_sha256(second["b"])
    assert tensor_sha256(first["a"]) != tensor_sha256(second["a"])
