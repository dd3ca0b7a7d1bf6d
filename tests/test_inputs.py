"""What a recipe reads: every path in it is known to the step that reads it, and missing ones are told together."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.inputs import check_inputs, inputs_of
from graftlm.recipe import Recipe

STAGE = {"name": "full", "trains": {"kind": "full"}}


def full_recipe(**base) -> Recipe:
    """A recipe naming a path in every place that takes one."""
    return Recipe.model_validate(
        {
            "name": "all",
            "base": base or {"model": "/in/base"},
            "tokenizer": {"mode": "merge", "text": ["/in/t"], "pieces": "/in/p", "common_characters": "/in/c"},
            "grow": {"vectors": "/in/v"},
            "data": {
                "sources": [{"path": "/in/s"}],
                "heldout": [{"path": "/in/h"}],
                "text": [{"path": "/in/x"}],
                "template": "/in/own.jinja",
            },
            "stages": [STAGE],
            "report": {"exact_questions": "/in/q"},
        }
    )


def paths_in(value) -> set[str]:
    if isinstance(value, dict):
        return {path for one in value.values() for path in paths_in(one)}
    if isinstance(value, list | tuple):
        return {path for one in value for path in paths_in(one)}
    return {value} if isinstance(value, str) and value.startswith("/in/") else set()


def test_every_path_of_a_recipe_is_some_steps_input() -> None:
    """A file left out would not be fingerprinted: its change would go unnoticed."""
    scratch = {"text": ["/in/e"], "heldout": ["/in/f"], "training": STAGE}
    for recipe in (full_recipe(), full_recipe(scratch=scratch)):
        known = {path for paths in inputs_of(recipe).values() for path in paths}
        assert known == paths_in(recipe.model_dump())
    assert "none" not in inputs_of(full_recipe())["tokenizer"]


def test_missing_ones_are_told_together_and_hub_ids_are_left_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\d+ paths that do not exist:\n  /in/base\n  /in/c\n"):
        check_inputs(full_recipe())
    (tmp_path / "zh.txt").write_text("x")
    fields = {
        "name": "hub",
        "base": {"model": "owner/model"},
        "tokenizer": {"text": [str(tmp_path / "zh.txt")]},
        "data": {"sources": [{"path": "owner/rows"}], "heldout_rows": 1},
        "stages": [STAGE],
    }
    check_inputs(Recipe.model_validate(fields))
    fields["data"]["sources"] = [{"path": "data/rows.jsonl"}]
    with pytest.raises(UserError, match=r"a path that does not exist:\n  data/rows.jsonl"):
        check_inputs(Recipe.model_validate(fields))
    fields["data"]["sources"] = [{"path": str(tmp_path / "z?.txt")}]
    check_inputs(Recipe.model_validate(fields))
    fields["data"]["sources"] = [{"path": str(tmp_path / "rows-*")}]
    fields["grow"] = {"vectors": str(tmp_path / "z?.txt")}  # is no source, and so no pattern
    with pytest.raises(UserError, match=r"2 paths that do not exist:\n  .*/rows-\*\n  .*/z\?\.txt"):
        check_inputs(Recipe.model_validate(fields))
