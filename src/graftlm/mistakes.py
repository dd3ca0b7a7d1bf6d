"""Mistakes of a recipe told so that a person can mend them: place, what was found, what was expected, nearest key.

Owns the words. Does not know YAML: `recipe_file.py` says on which line every value stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from graftlm.recipe import Recipe

Place = tuple[str | int, ...]
Lines = dict[Place, tuple[str, int]]
"""File and line of every value, by its keys; line 0 where the file is no file (an override)."""

SHOWN_CHARS = 60
KINDS = ("full", "lora", "new-rows")


def tell_mistakes(details: Sequence[ErrorDetails], lines: Lines, path: Path) -> list[str]:
    """One line for each mistake, in the order of the file."""
    told = []
    for detail in details:
        if not _follows_from_another(detail, details):
            place, key, file, line = _where(detail, lines, path)
            told.append((line, f"{file}:{line}: " if line else f"{file}: ", _tell(detail, key, place)))
    return list(dict.fromkeys(at + what for _, at, what in sorted(told, key=lambda one: one[0])))


def _follows_from_another(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """A list whose items are wrong is also told to be too short: the items' own mistakes suffice."""
    where = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in details
    )


def _where(detail: ErrorDetails, lines: Lines, path: Path) -> tuple[Place, str, str, int]:
    """The place in the recipe, its dotted key, and the file and line of the nearest value that stands somewhere."""
    place = tuple(part for part in detail["loc"] if part not in KINDS or len(detail["loc"]) == 1)
    file, line = str(path), 0
    for length in range(len(place), -1, -1):
        if place[:length] in lines:
            file, line = lines[place[:length]]
            break
    return place, ".".join(map(str, place)), file, line


def _tell(detail: ErrorDetails, key: str, place: Place) -> str:
    kind, found, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}{_nearest(str(place[-1]), _known_keys(detail['loc'][:-1]))}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        return f"{key}.kind: unknown kind {_short(context['tag'])}{_nearest(context['tag'], KINDS)}"
    if kind == "union_tag_not_found":
        return f"{key}: kind is missing: {_one_of(KINDS)}"
    expected = _EXPECTED.get(kind) or _decapitalised(
        detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    )
    is_told = isinstance(found, Mapping | Sequence | BaseModel) and not isinstance(found, str)
    value = "" if is_told or "found" in expected else f", found {_short(found)}"
    return f"{key + ': ' if key else ''}{expected}{value}"


_EXPECTED = {
    "model_type": "expected keys and values",
    "model_attributes_type": "expected keys and values, for example {kind: full}",
    "tuple_type": "expected a list",
    "string_pattern_mismatch": "a name is made of small letters, digits and hyphens, 41 at most",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def _known_keys(location: Place) -> list[str]:
    """The keys of the section at `location`, followed through the models' annotations."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(model, type) and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation)
        elif isinstance(model, list):
            kinds = {get_args(option.model_fields["kind"].annotation)[0]: option for option in model}
            model = kinds.get(str(part), model[0])
    if isinstance(model, list):
        return sorted({key for option in model for key in option.model_fields})
    return list(model.model_fields) if isinstance(model, type) else []


def _section_in(annotation: Any) -> Any:
    """The section class (or list of classes, for a union of them) inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    inner = [_section_in(option) for option in get_args(annotation) if option is not Ellipsis]
    sections = [section for section in inner if section is not None]
    is_union = get_origin(annotation) in (Union, type(int | str)) and len(sections) > 1
    return sections if is_union else (sections[0] if sections else None)
