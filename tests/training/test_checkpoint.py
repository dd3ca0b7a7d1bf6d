"""Checkpoints: whole or absent, every damage named, the only whole one never lost."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from graftlm.errors import DiskError, UserError
from graftlm.training import checkpoint as checkpoint_module
from graftlm.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    newest_stored,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
)

GROUPS = ("weights", "random")


def checkpoint(step: int) -> Checkpoint:
    weights = {"a": torch.full((3, 4), float(step)), "b.c": torch.arange(step, step + 5)}
    return Checkpoint({"weights": weights, "random": {"torch": torch.arange(8, dtype=torch.uint8)}}, {"step": step})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints after 2 and 4 steps."""
    for step in (2, 4):
        save_checkpoint(step_folder(tmp_path, step), checkpoint(step))
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    found = load_checkpoint(step_folder(saved, 4))
    assert found.values == {"step": 4}
    for name, group in checkpoint(4).tensors.items():
        assert found.tensors[name].keys() == group.keys()
        assert all(torch.equal(found.tensors[name][key], tensor) for key, tensor in group.items())
    assert newest_checkpoint(saved) == step_folder(saved, 4)
    assert [path.name for path in saved.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", [Path.unlink, flip, cut, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["weights.safetensors", "random.safetensors", "values.json", "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_it_used(saved: Path, name: str, damage, capsys) -> None:
    """R6 C1 C2: missing, flipped, cut short, empty."""
    damage(step_folder(saved, 4) / name)
    with pytest.raises(UserError):
        load_checkpoint(step_folder(saved, 4))
    found = newest_stored(saved, GROUPS)
    assert found is not None
    assert found.values["step"] == 2
    assert name in capsys.readouterr().err
    assert not step_folder(saved, 4).exists()


def test_when_every_one_is_damaged_nothing_is_begun_anew_in_silence(saved: Path) -> None:
    """R6: the file is named, nothing is deleted."""
    for step in (2, 4):
        flip(step_folder(saved, step) / "weights.safetensors")
    with pytest.raises(
        UserError, match=r"weights\.safetensors does not match .* No earlier checkpoint is whole"
    ) as error:
        newest_stored(saved, GROUPS)
    assert f"delete {saved.parent}" in error.value.fix
    assert len(list(saved.iterdir())) == 2
    assert newest_stored(saved / "none", GROUPS) is None


def test_a_state_that_lacks_a_part_is_not_resumed_from(saved: Path, capsys) -> None:
    """R6: without its random states a run would go on to another model."""
    save_checkpoint(step_folder(saved, 6), Checkpoint({"weights": {"a": torch.zeros(1)}}, {"step": 6}))
    found = newest_stored(saved, GROUPS)
    assert found is not None
    assert found.values["step"] == 4
    assert "lacks random.safetensors" in capsys.readouterr().err


def test_pruning_keeps_the_newest_whole_ones(saved: Path) -> None:
    """R9: one without manifest does not count as whole, and is not what is kept."""
    shutil.copytree(step_folder(saved, 4), step_folder(saved, 6))
    (step_folder(saved, 6) / "manifest.json").unlink()
    prune_checkpoints(saved, num_kept=1)
    assert newest_checkpoint(saved) == step_folder(saved, 4)
    assert not step_folder(saved, 2).exists()
    prune_checkpoints(saved, num_kept=1)
    assert newest_checkpoint(saved) == step_folder(saved, 4)


def test_too_little_room_is_told_before_writing(saved: Path, monkeypatch) -> None:
    """D1: bytes needed and free; the earlier ones stay."""
    usage = namedtuple("usage", "total used free")(0, 0, 10)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"needs 96 bytes .* and 10 are free") as error:
        save_checkpoint(step_folder(saved, 6), checkpoint(6))
    assert error.value.exit_code == 4
    assert newest_checkpoint(saved) == step_folder(saved, 4)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_fills_while_writing_leaves_the_earlier_ones(saved: Path, monkeypatch, number: int) -> None:
    """D1: safetensors hides the system's error in its text."""

    def full(*_):
        raise SafetensorError(f"Error while serializing: I/O error: no room (os error {number})")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    for step in (4, 6):
        with pytest.raises(DiskError, match="bytes free"):
            save_checkpoint(step_folder(saved, step), checkpoint(step))
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", "step-00000004"]
    assert load_checkpoint(step_folder(saved, 4)).values == {"step": 4}


def test_what_a_kill_left_half_written_goes_with_the_next_save(saved: Path) -> None:
    (saved / ".step-00000006.123").mkdir()
    (saved / ".step-00000006.123" / "weights.safetensors").write_text("half")
    assert newest_checkpoint(saved) == step_folder(saved, 4)
    save_checkpoint(step_folder(saved, 6), checkpoint(6))
    assert sorted(path.name for path in saved.iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6)]


def test_one_of_the_same_step_is_replaced(saved: Path) -> None:
    save_checkpoint(step_folder(saved, 4), Checkpoint(checkpoint(4).tensors, {"step": 4, "again": True}))
    assert json.loads((step_folder(saved, 4) / "values.json").read_text()) == {"step": 4, "again": True}
