"""Merging tensor by tensor gives the very bits of merging the whole model."""

import os
from pathlib import Path

import pytest
import torch

from graftlm.errors import UserError
from graftlm.model.causal import load_causal, new_causal, save_causal
from graftlm.model.tensors import source_of_folder
from graftlm.recipe import Full, Lora, NewRows, Stage
from graftlm.release.merge import after_stage
from graftlm.training.checkpoint import Checkpoint, save_checkpoint
from graftlm.training.trainable import prepare_model, trainable_parameters
from graftlm.training.trained import apply_stage

STAGES = {
    "full": Full(kind="full"),
    "lora": Lora(kind="lora", rank=4, alpha=8),
    "rslora": Lora(kind="lora", rank=4, alpha=8, rslora=True, rows="none"),
    "dora": Lora(kind="lora", rank=4, alpha=8, dora=True, rows="new", targets=("q_proj", "down_proj")),
    "rows": NewRows(kind="new-rows"),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = new_causal(
        num_rows=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, is_tied=request.param
    )
    save_causal(model, tmp_path / "base")
    return tmp_path / "base"


def train(base: Path, stage: Stage, folder: Path, first_new_id: int | None) -> None:
    """Leave what a stage keeps: every learning parameter moved by chance."""
    model = prepare_model(load_causal(base), stage.trains, first_new_id, 0)
    generator = torch.Generator().manual_seed(len(stage.name))
    weights = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in trainable_parameters(model).items()
    }
    save_checkpoint(folder / "trained", Checkpoint({"weights": weights}, {"step": 1}))


def same_bits(base: Path, stages: list[Stage], folder: Path, first_new_id: int | None) -> None:
    model, source = load_causal(base), source_of_folder(base)
    for stage in stages:
        model = apply_stage(model, stage, folder / stage.name, first_new_id)
        source = after_stage(source, stage, folder / stage.name)
    merged = dict(model.named_parameters())
    assert merged.keys() == source.shapes.keys()
    before = source_of_folder(base)
    moved = 0
    for name, parameter in merged.items():
        assert torch.equal(source.read(name), parameter), name
        moved += not torch.equal(before.read(name), parameter)
    assert moved > 0, "nothing was learned: nothing is tested"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("first_new_id", [30, None])
def test_one_stage(base: Path, tmp_path: Path, name: str, first_new_id: int | None) -> None:
    """N4, bit for bit: every way to learn, with rows split into old and new and without."""
    if first_new_id is None and name in ("dora", "rows"):
        pytest.skip("learns new rows, and there are none")
    stage = Stage(name=name, trains=STAGES[name])
    train(base, stage, tmp_path / name, first_new_id)
    same_bits(base, [stage], tmp_path, first_new_id)


def test_all_stages_one_after_another(base: Path, tmp_path: Path) -> None:
    stages = [Stage(name=name, trains=trains) for name, trains in STAGES.items()]
    for stage in stages:
        train(base, stage, tmp_path / stage.name, 30)
    same_bits(base, stages, tmp_path, 30)


def test_what_a_stage_kept_must_be_whole_and_of_this_model(base: Path, tmp_path: Path) -> None:
    """C1, C2: a kept file that is gone, cut short, changed by one bit, or of a model with one more layer."""
    stage = Stage(name="full", trains=STAGES["full"])
    folder, weights = tmp_path / "full", tmp_path / "full" / "trained" / "weights.safetensors"
    train(base, stage, folder, 30)
    whole = weights.read_bytes()

    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told):
            after_stage(source_of_folder(base), stage, folder)

    flipped = bytearray(whole)
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    refused("changed since it was written")
    weights.write_bytes(whole)
    os.truncate(weights, len(whole) - 8)
    refused("bytes; manifest.json says")
    weights.unlink()
    refused("not the whole result of a stage")
    larger = tmp_path / "larger"
    save_causal(new_causal(num_rows=40, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24), larger)
    train(larger, stage, folder, 30)
    refused("has no place for")
