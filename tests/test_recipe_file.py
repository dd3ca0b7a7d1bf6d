"""Recipes: all mistakes at once with their lines, hostile files bounded, overrides and `extends`."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.recipe_file import load_recipe

GOOD = """\
name: tiny
base: {model: owner/base}
tokenizer: {mode: continued, text: [zh.txt]}
data:
  sources: [{path: rows.jsonl}]
  heldout_rows: 10
stages:
  - name: full
    trains: {kind: full}
    peak_lr: 1e-5
  - name: lora
    trains: {kind: lora, rank: 4}
"""


def write(folder: Path, text: str, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert caught.value.fix
    return caught.value.problem


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.base.model == "owner/base"
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.stages[0].peak_lr == 1e-5


def test_all_mistakes_at_once_with_line_and_nearest_key(tmp_path: Path) -> None:
    """P3: typos, `no` for a number and a rank on a full stage are told together."""
    text = GOOD.replace("heldout_rows: 10", "heldout_rows: no").replace("rank: 4", "rnak: 4")
    text = text.replace("trains: {kind: full}", "trains: {kind: full, rank: 3}")
    problem = problem_of(write(tmp_path, text))
    assert "3 mistakes" in problem
    assert "tiny.yaml:6: data.heldout_rows" in problem
    assert "tiny.yaml:9: unknown key stages.0.trains.rank" in problem
    assert "tiny.yaml:12: unknown key stages.1.trains.rnak; did you mean rank?" in problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "stages: []\n", "twice"),
        (GOOD + "report: &a {num_samples: 1}\nexport: *a\n", "aliases"),
        (GOOD + "report: !!python/object:os.system {}\n", "tags"),
        (GOOD + "report: " + "[" * 40 + "]" * 40, "nested"),
        (GOOD + "report: {", "not YAML"),
        ("just text", "key: value"),
        ("x" * 1_000_001, "bytes"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    """P2: tags, alias bombs, depth bombs, duplicate keys and giant files."""
    assert told in problem_of(write(tmp_path, text))


def test_overrides_name_stages_by_name_or_number(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["stages.lora.trains.rank=8", "stages.0.epochs=2.5", "seed=7"])
    assert recipe.stages[1].trains.rank == 8
    assert recipe.stages[0].epochs == 2.5
    assert recipe.seed == 7
    assert "there is no nope" in problem_of(path, "stages.nope.epochs=1")
    assert "did you mean epochs?" in problem_of(path, "stages.lora.epoch=1")
    assert "section.key=value" in problem_of(path, "seed")


def test_extends_merges_one_level(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    child = write(tmp_path, "extends: tiny.yaml\nseed: 3\ndata: {max_tokens: 64}\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.data.max_tokens, recipe.data.heldout_rows) == ("child", 3, 64, 10)
    grandchild = write(tmp_path, "extends: child.yaml\n", "grandchild.yaml")
    assert "one level" in problem_of(grandchild)


def test_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "tyni.yaml")
    assert "tiny.yaml" in caught.value.fix
