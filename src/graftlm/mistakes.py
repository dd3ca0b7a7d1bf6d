"""Mistakes of a recipe told so that a person can mend them: place, what was found, what was expected, nearest key.

Owns the words, of recipes and of flags. Does not know YAML: `recipe_file.py` says on which line every value stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from graftlm.recipe import Recipe
from graftlm.recipe_values import Place

Lines = dict[Place, tuple[str, int]]
"""File and line of every value, by its keys; line 0 where the file is no file (an override)."""

SHOWN_CHARS = 60
KINDS = ("full", "lora", "new-rows")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake: the file (or override) and line it stands in, 0 where there is none, and what is told of it."""

    file: str
    line: int
    told: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.told}" if self.line else f"{self.file}: {self.told}"


def mistakes_of(details: Sequence[ErrorDetails], lines: Lines) -> list[Mistake]:
    """What is wrong with the values of a recipe; `lines` holds at least the place of the whole, ()."""
    found = []
    for place, options in _by_place(details, Recipe).items():
        file, line = next(lines[place[:length]] for length in range(len(place), -1, -1) if place[:length] in lines)
        found += [Mistake(file, line, told) for told in _told(options, ".".join(map(str, place)), place)]
    return found


def flags_told(details: Sequence[ErrorDetails], section: type[BaseModel]) -> str:
    """What is wrong with a section made of a command's flags, a line for each."""
    found = []
    for place, options in _by_place(details, section).items():
        flag = f"--{str(place[0]).replace('_', '-')}" if place else ""
        found += _told(options, flag, place)
    return "\n".join(dict.fromkeys(found))


def nearest(name: str, known: Iterable[Any]) -> str:
    """The known name that was probably meant, else all there are; to end a sentence with."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"


def _by_place(details: Sequence[ErrorDetails], model: Any) -> dict[Place, list[ErrorDetails]]:
    """Details by place: a value of several types is one mistake, though each type has its detail."""
    found: dict[Place, list[ErrorDetails]] = {}
    for detail in details:
        if not _follows_from_another(detail, details):
            found.setdefault(_place(detail, model), []).append(detail)
    return found


def _follows_from_another(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """A list whose items are wrong is also told to be too short: the items' own mistakes suffice."""
    where = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in details
    )


def _place(detail: ErrorDetails, model: Any) -> Place:
    """Where a detail belongs: its location without what pydantic adds for the options of a union."""
    place: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(part, int):
            place.append(part)
        elif isinstance(model, list):
            model = _options_by_kind(model).get(part)
        elif isinstance(model, type) and part in model.model_fields:
            place.append(part)
            model = _section_in(model.model_fields[part].annotation)
        elif detail["type"] == "extra_forbidden":
            place.append(part)
    return tuple(place)


def _told(options: Sequence[ErrorDetails], key: str, place: Place) -> list[str]:
    """The lines to tell about one place."""
    start = f"{key}: " if key else ""
    told, expected, contradicted, value = [], [], [], ""
    for detail in options:
        kind, found, context = detail["type"], detail.get("input"), detail.get("ctx", {})
        if kind == "extra_forbidden":
            told.append(f"unknown key {key}{nearest(str(place[-1]), _known_keys(detail['loc'][:-1]))}")
        elif kind == "missing":
            told.append(f"{key} is missing")
        elif kind == "union_tag_invalid":
            told.append(f"{key}.kind: unknown kind {_short(context['tag'])}{nearest(context['tag'], KINDS)}")
        elif kind == "union_tag_not_found":
            told.append(f"{key}: kind is missing: {_one_of(KINDS)}")
        elif kind == "value_error":
            contradicted.append(str(context["error"]))
        else:
            expected.append(_expected(kind, context, place))
            is_plain = not isinstance(found, Mapping | Sequence | BaseModel) or isinstance(found, str)
            value = f", found {_short(found)}" if is_plain else value
    if expected:
        contradicted = ["; ".join([f"expected {_one_of(expected)}{value}", *contradicted])]
    return told + [start + what for what in contradicted]


def _expected(kind: str, context: Mapping[str, Any], place: Place) -> str:
    """What pydantic asks of a value, in a recipe's words."""
    if kind.startswith("int_"):
        return "a whole number"
    if kind.startswith("float_"):
        return "a number"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        is_name = place[-1] == "name"
        return "small letters, digits and hyphens, 41 at most" if is_name else "the hub's name of it, like apache-2.0"
    if kind == "too_short":
        return f"at least {context['min_length']} in the list"
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"a number {words} {context[bound]:g}"
    return _EXPECTED[kind]


_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "model_attributes_type": "keys and values, for example {kind: full}",
    "model_type": "keys and values",
    "string_type": "text",
    "tuple_type": "a list",
}


def _short(value: Any) -> str:
    """A value as YAML has it, and not much of it."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _known_keys(location: Place) -> list[str]:
    """The keys of the section at `location`, followed through the models' annotations."""
    model: Any = Recipe
    for part in location:
        if isinstance(model, list):
            model = _options_by_kind(model).get(str(part), model[0])
        elif isinstance(model, type) and part in model.model_fields:
            model = _section_in(model.model_fields[str(part)].annotation)
    if isinstance(model, list):
        return sorted({key for option in model for key in option.model_fields})
    return list(model.model_fields) if isinstance(model, type) else []


def _options_by_kind(options: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {get_args(option.model_fields["kind"].annotation)[0]: option for option in options}


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
