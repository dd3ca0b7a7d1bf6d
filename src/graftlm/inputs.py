"""What a recipe reads: every path and hub id it names, by the step that reads it.

Owns that list and the check that all of it is there before the first step. Does not read any of it.
"""

from __future__ import annotations

from pathlib import Path

from graftlm.errors import UserError
from graftlm.recipe import Recipe
from graftlm.recipe_values import has_files, looks_like_hub_id

# Values of tokenizer.common_characters that are no file.
NAMED_CHARACTERS = ("auto", "gb2312-1", "none")


def inputs_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Paths and hub ids by step: scratch, tokenizer, base, data, report. The other steps read only earlier ones."""
    scratch, tokenizer, data = recipe.base.scratch, recipe.tokenizer, recipe.data
    characters = None if tokenizer.common_characters in NAMED_CHARACTERS else tokenizer.common_characters
    sources = (*data.sources, *data.heldout, *data.text)
    named = {
        "scratch": (*scratch.text, *scratch.heldout) if scratch else (),
        "tokenizer": (recipe.base.model, tokenizer.pieces, *tokenizer.text, characters),
        "base": (recipe.grow.vectors, *new_language_texts(recipe)),
        "data": (*(source.path for source in sources), data.template if data.template.endswith(".jinja") else None),
        "report": (recipe.report.exact_questions,),
    }
    return {step: tuple(path for path in paths if path) for step, paths in named.items()}


def new_language_texts(recipe: Recipe) -> tuple[str, ...]:
    """Where text of the new language is found: what its pieces are learned from, else the dialogues themselves."""
    dialogues = tuple(source.path for source in recipe.data.sources if source.language == "new")
    return recipe.tokenizer.text or dialogues


def missing_inputs(recipe: Recipe) -> list[str]:
    """The local paths of the recipe that do not exist, and patterns that no file matches."""
    data = recipe.data
    may_be_pattern = {source.path for source in (*data.sources, *data.heldout, *data.text)} | {*recipe.tokenizer.text}

    def is_there(path: str) -> bool:
        return looks_like_hub_id(path) or (has_files(path) if path in may_be_pattern else Path(path).exists())

    return sorted({path for named in inputs_of(recipe).values() for path in named if not is_there(path)})


def check_inputs(recipe: Recipe) -> None:
    """Every local path of the recipe must exist before the first step: told all at once. Raises UserError."""
    missing = missing_inputs(recipe)
    if missing:
        listed = "".join(f"\n  {path}" for path in missing)
        count = "a path that does" if len(missing) == 1 else f"{len(missing)} paths that do"
        raise UserError(
            f"The recipe names {count} not exist:{listed}",
            "Mend the recipe, or override the key on the command line (section.key=PATH).",
        )
