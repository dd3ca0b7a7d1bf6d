"""Every recipe that is shipped reads without a mistake, and the card's says what the card says."""

from pathlib import Path

import pytest

from graftlm.recipe import Lora
from graftlm.recipe_file import load_recipe
from graftlm.sweep import cells_of, load_sweep

RECIPES = Path(__file__).parents[1] / "recipes"
SWEEPS = [path for path in sorted(RECIPES.rglob("*.yaml")) if "\ngrid:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", sorted({*RECIPES.rglob("*.yaml")} - {*SWEEPS}), ids=lambda path: path.stem)
def test_every_recipe_reads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len(recipe.stages) >= 1


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_reads_with_all_its_recipes(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    assert len(cells_of(sweep, Path("out"))) >= 2


def test_the_cards_recipe_says_what_the_card_says() -> None:
    """Figures from the published card and its author's logs."""
    recipe = load_recipe(RECIPES / "llama2-7b-chinese.yaml")
    full, lora = recipe.stages
    assert recipe.data.sources[0].sample == 500_000
    assert recipe.data.max_tokens == 1024
    assert (full.trains.kind, full.epochs, full.peak_lr, full.warmup_ratio) == ("full", 1, 2e-4, 0.01)
    assert isinstance(lora.trains, Lora)
    assert (lora.trains.rank, lora.trains.rows, lora.epochs, lora.peak_lr, lora.warmup_ratio) == (
        64,
        "all",
        2,
        2e-5,
        0.05,
    )
    for stage in recipe.stages:
        assert (stage.batch_rows, stage.precision, stage.schedule, stage.weight_decay) == (128, "fp16", "cosine", 0.01)
        assert (stage.loss_scale.initial, stage.loss_scale.growth_interval) == (65536, 100)
        assert (stage.loss_scale.hysteresis, stage.loss_scale.floor) == (2, 1e-10)


def test_the_demos_paths_are_in_the_repository() -> None:
    recipe = load_recipe(RECIPES / "demo.yaml")
    assert recipe.base.scratch is not None
    paths = [*recipe.base.scratch.text, *recipe.tokenizer.text, *(source.path for source in recipe.data.sources)]
    assert all(Path(path).is_file() for path in paths)
