"""What this machine cannot train is told before anything is trained."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_tiny_recipe

from graftlm.errors import UserError
from graftlm.feasible import refuse_what_cannot_be_computed
from graftlm.pipeline import run_recipe
from graftlm.recipe_file import load_recipe
from graftlm.run import DONE

GIB = 2**30
LARGE = "stages.lora.trains.rank=1000000"


def steps_begun(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("[0-9]-*"))


@pytest.mark.parametrize(
    ("place", "key", "longest"),
    [("base.scratch.training", "base.scratch.row_tokens", 32), ("stages.lora", "data.max_tokens", 256)],
)
def test_a_row_that_may_come_is_told_before_a_base_is_made(tmp_path: Path, place: str, key: str, longest: int) -> None:
    """Its rows would be known only once the base is pretrained."""
    recipe = load_recipe(write_tiny_recipe(tmp_path), [f"{place}.micro_batch_tokens={longest - 1}"])
    told = rf"^{place}.micro_batch_tokens is {longest - 1}, and a row may have {longest} tokens \({key}\)"
    with pytest.raises(UserError, match=told) as refused:
        run_recipe(recipe, tmp_path / "run")
    assert f"{place}.micro_batch_tokens={longest}" in refused.value.fix
    assert f"{key}={longest - 1}" in refused.value.fix
    assert steps_begun(tmp_path / "run") == []


def test_all_micro_batches_too_short_are_told_at_once(tmp_path: Path) -> None:
    short = ["stages.full.micro_batch_tokens=200", "stages.lora.micro_batch_tokens=100"]
    with pytest.raises(UserError) as refused:
        run_recipe(load_recipe(write_tiny_recipe(tmp_path), short), tmp_path / "run")
    assert [line.split()[0] for line in refused.value.problem.splitlines()] == [one.partition("=")[0] for one in short]
    asked = "stages.full.micro_batch_tokens=256 stages.lora.micro_batch_tokens=256, or with data.max_tokens=100."
    assert refused.value.fix == f"Run it with {asked}"


def test_a_stage_larger_than_memory_is_told_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("graftlm.training.room.memory_here_bytes", lambda *_: 2 * GIB)
    recipe = write_tiny_recipe(tmp_path)
    told = r"^stages.lora: It needs [\d.]+ GiB at its peak \(.*\), by estimate; 2.0 are there"
    with pytest.raises(UserError, match=told):
        run_recipe(load_recipe(recipe, [LARGE]), tmp_path / "run")
    assert steps_begun(tmp_path / "run") == []


def test_what_was_no_more_than_likely_is_told_once_rows_are_there(tmp_path: Path, monkeypatch) -> None:
    """Before the first of the stages is trained; the steps before it are kept."""
    monkeypatch.setattr("graftlm.training.room.memory_here_bytes", lambda *_: 2 * GIB)
    monkeypatch.setattr("graftlm.feasible.GUESSED", 100)
    recipe = write_tiny_recipe(tmp_path)
    with pytest.raises(UserError, match=r"^stages.lora: It needs "):
        run_recipe(load_recipe(recipe, [LARGE]), tmp_path / "run")
    done = [name for name in steps_begun(tmp_path / "run") if (tmp_path / "run" / name / DONE).is_file()]
    assert done == ["0-scratch", "1-tokenizer", "2-base", "3-data"]
    assert not (tmp_path / "run" / "4-full" / "metrics.jsonl").exists()


def test_bf16_is_refused_of_every_stage_on_a_gpu_without_it(tmp_path: Path, monkeypatch) -> None:
    stages = {f"stages.{stage.name}": stage for stage in load_recipe(
        write_tiny_recipe(tmp_path), ["stages.lora.precision=bf16"]
    ).stages}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: False)
    with pytest.raises(UserError, match=r"^stages.lora.precision is bf16, which an old one does not compute") as told:
        refuse_what_cannot_be_computed(stages, torch.device("cuda"))
    assert "stages.lora.precision=fp16" in told.value.fix
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: True)
    refuse_what_cannot_be_computed(stages, torch.device("cuda"))


def test_what_a_later_stage_computes_with_is_looked_for_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    recipe = load_recipe(write_tiny_recipe(tmp_path), ["stages.lora.frozen_base=nf4"])
    with pytest.raises(UserError, match="needs bitsandbytes, and it is not installed"):
        run_recipe(recipe, tmp_path / "run")
    assert steps_begun(tmp_path / "run") == []
