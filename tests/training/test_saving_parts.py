"""Checkpoints in parts: any number of ranks goes on from them bit for bit, and only what all have written counts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import ended, on_ranks, started
from test_several_ranks import Killed
from tiny_training import FIRST_NEW_ID, FULL, LORA_ALL, make_rows, make_stage, tiny_model, weights_sha256

from graftlm.errors import DiskError, UserError
from graftlm.recipe import Stage
from graftlm.run import read_metrics
from graftlm.training import saving_parts
from graftlm.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_folder,
    stored_checkpoint,
)
from graftlm.training.joining import joined
from graftlm.training.optim import optimizer_tensors
from graftlm.training.place import place_here
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.saving_parts import PartSaver
from graftlm.training.stage import StageRun

CPU = torch.device("cpu")
SECONDS = 20.0  # nothing here may wait longer for another thread
STAGE = make_stage(FULL, epochs=4, recovery="off")
CUT_AT = 5  # the newest checkpoint is then that of step 4


def run_of(ranks: Ranks, folder: Path, stage: Stage = STAGE) -> StageRun:
    folder.mkdir(exist_ok=True)
    heldout = {"new": make_rows(4, seed=9)} if stage.keep == "best" else {}
    return StageRun(tiny_model(), stage, make_rows(), heldout, folder, CPU, FIRST_NEW_ID, ranks=ranks)


def sha256_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sorted(tensors.items())}


def held_by(run: StageRun) -> dict[str, Any]:
    """Hashes of all that learns and of its moments, put together from all ranks."""
    state = optimizer_tensors(run.optimizer, run.parts.by_name)
    wholes = run.parts.wholes(run.parts.by_name), run.parts.wholes(dict(sorted(state.items())))
    return {"weights": sha256_of(wholes[0]), "optimizer": sha256_of(wholes[1])}


def trained(ranks: Ranks, folder: Path, stop: int, stage: Stage = STAGE) -> dict[str, Any]:
    """Train until step `stop` (0: to the end): what was held at every save and after resuming, and the last weights."""
    run = run_of(ranks, folder, stage)
    told: dict[str, Any] = {"saved": {}}
    save, back, record = run._save, run._go_back_to, run._record

    def saved() -> None:
        save()
        told["saved"][str(run.step)] = held_by(run)

    def gone_back(saved: Any) -> None:
        back(saved)
        told["resumed"] = held_by(run)

    def cut(step_record: Any) -> None:
        record(step_record)
        if step_record.step == stop:
            run.saver.wait()
            raise Killed

    run._save, run._go_back_to, run._record = saved, gone_back, cut  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        run.run()
    return {**told, "last": weights_sha256(run.model), "in_parts": isinstance(run.saver, PartSaver)}


def both_ways(ranks: Ranks, folder: Path, stop: int) -> list[dict[str, Any]]:
    """Go on from the same state in parts and in one piece."""
    return [trained(ranks, folder / name, stop) for name in ("parts", "whole")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A stage cut after step `CUT_AT`: its folder with the newest state in parts, beside it the same in one piece; and
    what was held when that was saved. By 1 rank it is in one piece only."""

    @functools.cache
    def take(by: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"by-{by}")
        count, shard, local = {"1": (1, "none", 0), "2": (2, "full", 0), "2x2": (4, "hybrid", 2)}[by]
        if count == 1:
            torch.set_num_threads(1)
            told = trained(ALONE, folder / "parts", CUT_AT)
        else:
            told = on_ranks(
                count, trained, folder / "parts", CUT_AT, folder=folder / "by", shard=shard, local_count=local
            )[0]
        assert told["in_parts"] is (count > 1)
        shutil.copytree(folder / "parts", folder / "whole")
        newest = newest_checkpoint(folder / "whole" / "checkpoints")
        save_checkpoint(newest, load_checkpoint(newest))
        return folder, told["saved"]["4"]

    return take


@pytest.mark.parametrize(
    ("by", "count", "shard", "local_count"),
    [
        ("2", 1, "none", 0),
        ("2", 4, "full", 0),
        ("1", 2, "full", 0),
        ("2x2", 2, "full", 0),
        pytest.param("2", 4, "hybrid", 2, marks=pytest.mark.slow),
        pytest.param("2", 2, "none", 0, marks=pytest.mark.slow),
        pytest.param("2x2", 1, "none", 0, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_goes_on_bit_for_bit(
    tmp_path: Path,
    written: Callable[[str], tuple[Path, dict[str, Any]]],
    by: str,
    count: int,
    shard: str,
    local_count: int,
) -> None:
    """R5: weights and moments are those that were saved, and from parts the run goes on as from one piece."""
    folder, saved = written(by)
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    if count == 1:
        told = [both_ways(ALONE, run, 7)]
    else:
        told = on_ranks(count, both_ways, run, 7, folder=tmp_path / "on", shard=shard, local_count=local_count)
    for parts, whole in told:
        assert parts["last"] == whole["last"]
    parts, whole = told[0]
    assert parts["resumed"] == whole["resumed"] == saved
    assert len(saved["optimizer"]) == 3 * len(saved["weights"]) > 0
    assert parts["saved"].keys() == whole["saved"].keys() == {"6"}
    assert parts["saved"] == whole["saved"]


def test_a_checkpoint_in_parts_is_safetensors_and_json_alone(
    written: Callable[[str], tuple[Path, dict[str, Any]]],
) -> None:
    """A file a rank, none of them pickle, each in the manifest, every tensor once; read whole without ranks."""
    for by, count in (("2", 2), ("2x2", 4)):
        folder, saved = written(by)
        newest = newest_checkpoint(folder / "parts" / "checkpoints")
        stored = stored_checkpoint(newest)
        assert (newest.name, stored.is_in_parts, stored.groups) == (
            "step-00000004", True, ("optimizer", "random", "weights"),
        )  # fmt: skip
        files = {file.name for file in newest.iterdir()}
        parts = {f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in range(1, count + 1)}
        assert files == parts | {"values.json", "manifest.json"}
        assert json.loads((newest / "manifest.json").read_text()).keys() == files - {"manifest.json"}
        for name in ("weights", "optimizer"):
            assert sha256_of(stored.tensors(name)) == saved[name]
        sizes = [(newest / name).stat().st_size for name in sorted(parts)]
        whole = sum(tensor.nbytes for group in stored.groups for tensor in stored.tensors(group).values())
        assert whole < sum(sizes) < 2 * whole  # headers are as large as these tensors
        lines = [line for line in read_metrics(folder / "parts" / "metrics.jsonl") if line["event"] == "saved"]
        assert [line["step"] for line in lines] == [2, 4]
        assert (lines[-1]["part_bytes"], lines[-1]["num_bytes"]) == (sizes, whole)


def test_the_best_weights_are_kept_in_parts_too(tmp_path: Path) -> None:
    stage = make_stage(LORA_ALL, epochs=4, keep="best", heldout_every=3)
    told = on_ranks(2, trained, tmp_path / "run", 0, stage, folder=tmp_path / "on", shard="full")
    best = stored_checkpoint(newest_checkpoint(tmp_path / "run" / "best"))
    assert (best.is_in_parts, best.groups) == (True, ("weights",))
    kept = load_checkpoint(tmp_path / "run" / "trained")
    assert kept.values == best.values
    assert sha256_of(kept.tensors["weights"]) == sha256_of(best.tensors("weights"))
    assert len(told) == 2


@pytest.mark.parametrize("damage", ["flipped", "missing", "added"])
def test_a_damaged_part_is_told_and_passed_over(
    tmp_path: Path, written: Callable[[str], tuple[Path, dict[str, Any]]], damage: str
) -> None:
    """C2 C4: whichever rank wrote it; the run goes on from the checkpoint before."""
    shutil.copytree(written("2")[0] / "parts", tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    part = newest / "shard-00002-model-00001-of-00001.safetensors"
    if damage == "missing":
        part.unlink()
    elif damage == "added":  # readers look into every such file there
        part = shutil.copy(part, newest / "shard-00003-model-00001-of-00001.safetensors")
    else:
        content = bytearray(part.read_bytes())
        content[-5] ^= 1
        part.write_bytes(content)
    with pytest.raises(UserError, match=part.name):
        load_checkpoint(newest)
    told = on_ranks(2, trained, tmp_path / "run", 3, folder=tmp_path / "on", shard="full")
    said = (tmp_path / "on" / "0.err").read_text()
    assert part.name in said
    assert "Looking for an earlier checkpoint" in said
    assert "continuing after step 2" in said
    assert told[0]["resumed"].keys() == {"weights", "optimizer"}
    assert not newest.exists()


def struck(fault: str, folder: Path) -> None:
    """Train as this rank; at the save of step 4 rank 1 meets the fault in the thread that writes its part."""
    ranks: Any = None
    write = saving_parts.write_part

    def broken(temporary: Path, rank: int, groups: Any) -> list[Path]:
        files = write(temporary, rank, groups)
        if rank == 1 and "step-00000004" in temporary.name:
            if fault == "full":
                raise OSError(28, "No space left on device")
            files[0].write_bytes(files[0].read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    saving_parts.write_part = broken
    try:
        with joined(place_here(), {}, CPU, 10.0, 30.0, "full") as ranks:
            run_of(ranks, folder).run()
    except UserError as error:
        if ranks.speaks:
            print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


@pytest.mark.parametrize(
    ("fault", "codes", "says"),
    [
        ("killed", {0: 130, 1: -signal.SIGKILL}, "Rank 1 of 2 is gone"),
        ("full", {0: DiskError.exit_code, 1: DiskError.exit_code}, "Rank 1: Writing below"),
    ],
)
def test_a_rank_struck_down_as_it_writes_leaves_the_last_good_one(
    tmp_path: Path, fault: str, codes: dict[int, int], says: str
) -> None:
    """R1 R4 D1: half the parts are no checkpoint; all end in time, and the same again ends as an undisturbed run."""
    assert ended(started(2, struck, fault, tmp_path / "run", folder=tmp_path), 40) == codes
    assert says in (tmp_path / "0.err").read_text()
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(newest).values["step"] == 2
    if fault == "killed":
        again = on_ranks(2, trained, tmp_path / "run", 0, folder=tmp_path / "again", shard="full")
        undisturbed = on_ranks(2, trained, tmp_path / "other", 0, folder=tmp_path / "undisturbed", shard="full")
        assert [told["last"] for told in again] == [told["last"] for told in undisturbed]
        assert [folder.name for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
            "step-00000010", "step-00000012",
        ]  # fmt: skip


def held_up(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Rank 1 writes its part of step 2 only after step 3: is there a checkpoint meanwhile, and what does it hold?"""
    write, gate = saving_parts.write_part, threading.Event()

    def waiting(temporary: Path, rank: int, groups: Any) -> list[Path]:
        assert rank == 0 or gate.wait(SECONDS)
        return write(temporary, rank, groups)

    saving_parts.write_part = waiting
    run = run_of(ranks, folder)
    told: dict[str, Any] = {"there": []}
    save, record = run._save, run._record

    def saved() -> None:
        save()
        told.setdefault("held", held_by(run))

    def recorded(step_record: Any) -> None:
        record(step_record)
        if step_record.step == 3:
            told["there"].append(step_folder(run.checkpoints, 2).exists())
            gate.set()
        if step_record.step == 4:
            run.saver.wait()
            ranks.any(False)  # rank 0 goes on when it is published
            told["there"].append(step_folder(run.checkpoints, 2).exists())
            raise Killed

    run._save, run._record = saved, recorded  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.run()
    return told


def test_it_is_a_checkpoint_only_when_every_part_is_written_and_that_of_its_step(tmp_path: Path) -> None:
    for told in on_ranks(2, held_up, tmp_path / "run", folder=tmp_path, shard="full"):
        assert told["there"] == [False, True]
    stored = stored_checkpoint(step_folder(tmp_path / "run" / "checkpoints", 2))
    held = json.loads((tmp_path / "0.json").read_text())["held"]
    assert {name: sha256_of(stored.tensors(name)) for name in held} == held


def on_a_disk_of_its_own(ranks: Ranks, folder: Path) -> bool:
    """Every rank but the first finds another folder there."""
    own = folder if ranks.is_first else folder.with_name("elsewhere")
    run = run_of(ranks, own)
    run.run()
    return isinstance(run.saver, PartSaver)


def test_ranks_without_one_disk_have_rank_0_write_all(tmp_path: Path) -> None:
    assert on_ranks(2, on_a_disk_of_its_own, tmp_path / "run", folder=tmp_path, shard="full") == [False, False]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert not stored_checkpoint(newest).is_in_parts
    assert "is not one folder for all ranks" in (tmp_path / "0.err").read_text()
    assert not (tmp_path / "elsewhere" / "checkpoints").exists()


def test_what_is_saved_within_the_step_is_the_same(tmp_path: Path) -> None:
    """Where memory holds no copy, each rank writes its part while the step waits. The bytes of a header differ from one
    writing to the next (its keys come in any order), those of the tensors do not."""
    told = on_ranks(2, within_and_beside, tmp_path, folder=tmp_path / "on", shard="full")
    assert {tuple(one) for one in told} == {(False, True)}
    found = []
    for name in ("within", "beside"):
        folders = sorted((tmp_path / name / "checkpoints").iterdir())
        states = [load_checkpoint(folder) for folder in folders]
        hashes = [{group: sha256_of(named) for group, named in state.tensors.items()} for state in states]
        files = [{file.name: file.stat().st_size for file in folder.glob("shard-*")} for folder in folders]
        found.append(([folder.name for folder in folders], [state.values for state in states], hashes, files))
    assert found[0] == found[1]
    assert found[0][0] == ["step-00000010", "step-00000012"]


def within_and_beside(ranks: Ranks, folder: Path) -> list[bool]:
    told = []
    for name in ("within", "beside"):
        (folder / name).mkdir(exist_ok=True)
        given = tiny_model(), STAGE, make_rows(), {}, folder / name, CPU, FIRST_NEW_ID
        run = StageRun(*given, ranks=ranks, saves_beside=name == "beside")
        run.run()
        told.append(run.saver.in_background)
    return told


def test_large_parts_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bounded size each, as the writer holds a file in memory; read back they are the same tensors."""
    from graftlm.training import part_files

    monkeypatch.setattr(part_files, "FILE_BYTES", 100)
    given = {f"t{n}": torch.full((4, n + 1), float(n)) for n in range(8)}
    state = Checkpoint({"weights": given}, {"step": 1})
    files = part_files.write_part(tmp_path, 3, state.tensors)
    assert len(files) > 2
    assert all(file.name.startswith("shard-00004-") for file in files)
    found = part_files.read_parts(tmp_path, "weights", lambda _, whole: torch.empty_like(whole, device="cpu"))
    assert sha256_of(found) == sha256_of(given)
