"""Reading a recipe from YAML: `extends`, overrides, and where every value stands.

Owns the file format. Does not know what the knobs mean (`recipe.py`) or how mistakes are told (`mistakes.py`). Hostile
files are bounded: size, depth, no aliases, no tags, no duplicate keys; only plain numbers are numbers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from graftlm.errors import UserError
from graftlm.mistakes import Lines, Mistake, flags_told, mistakes_of, nearest
from graftlm.recipe import Recipe
from graftlm.recipe_values import Place, has_files

MAX_BYTES = 1_000_000
MAX_DEPTH = 30

S = TypeVar("S", bound=BaseModel)
# YAML 1.1 also reads 010 as 8, 1:30 as 90 and 1_000 as 1000: here they stay text, and the knob refuses them.
PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")


@dataclass(slots=True)
class _Source:
    """What is known of a recipe's text beside its values: where each stands, and what cannot even be a value."""

    lines: Lines = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, needs_files: bool = False) -> Recipe:
    """Read, extend, override and check a recipe.

    `overrides` are `section.key=value` texts; a stage is named by its name or number (`stages.lora.epochs=1`).
    Paths in the file are relative to the file, paths in overrides to the working directory. With `needs_files` a
    local path at which nothing lies is a mistake.

    Raises UserError naming every mistake at once, each with file and line and the nearest known key.
    """
    path = Path(path)
    source = _Source()
    tree = _read_with_parent(path, source)
    if "grid" in tree and "recipe" in tree:
        raise UserError(f"{path} is a sweep of recipes, not a recipe.", f"graftlm sweep {path}")
    for override in overrides:
        try:
            _apply_override(tree, override, source)
        except ValueError as error:
            source.mistakes.append(Mistake(f"override {override}", 0, str(error)))
    tree.setdefault("name", path.stem)
    mistakes = source.mistakes
    try:
        context = {"folder": str(path.resolve().parent), "needs_files": needs_files}
        recipe = Recipe.model_validate(tree, context=context)
    except ValidationError as error:
        mistakes += mistakes_of(error.errors(include_url=False), source.lines)
    else:
        if not mistakes:
            return recipe
    told = dict.fromkeys(map(str, sorted(mistakes, key=lambda one: one.line)))
    count = f"{len(told)} mistake{'s' if len(told) > 1 else ''} in {path}:"
    fix = f"Mend {'them' if len(told) > 1 else 'it'} and run the same command again; docs/guide.md lists every key."
    raise UserError("\n".join([count, *(f"  {line}" for line in told)]), fix)


def read_tree(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """The values of a YAML file that is no recipe, bounded as one, and where each stands. Raises UserError."""
    source = _Source()
    tree = _read_yaml(Path(path), source)
    if source.mistakes:
        raise UserError(f"{source.mistakes[0]}.", "Mend that line and run the same command again.")
    return tree, source.lines


def section_from_flags(section: type[S], flags: dict[str, Any]) -> S:
    """A section built from a command's flags. Raises UserError naming each flag at fault."""
    try:
        return section.model_validate(flags)
    except ValidationError as error:
        told = flags_told(error.errors(include_url=False), section)
        raise UserError(told, "Mend the flags; --help shows an example.") from None


def _read_with_parent(path: Path, source: _Source) -> dict[str, Any]:
    tree = _read_yaml(path, source)
    parent_name = tree.pop("extends", None)
    if parent_name is None:
        return tree
    if not isinstance(parent_name, str):
        raise UserError(f"{path}: extends must name one recipe file, found {parent_name!r}.", "Write extends: FILE.")
    above = _Source()
    parent_path = path.parent / parent_name
    if parent_path.resolve().parent != path.resolve().parent:
        raise UserError(
            f"{path} extends {parent_path}, which lies in another folder: relative paths would change meaning.",
            "Keep a recipe beside the one it extends.",
        )
    parent = _read_yaml(parent_path, above)
    if "extends" in parent:
        raise UserError(
            f"{path} extends {parent_path}, which itself extends {parent['extends']}: one level is allowed.",
            f"Extend {parent['extends']} directly, or write the keys out.",
        )
    parent.pop("name", None)
    source.mistakes += above.mistakes
    for where, line in above.lines.items():
        source.lines.setdefault(where, line)
    return _merge(parent, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_yaml(path: Path, source: _Source) -> dict[str, Any]:
    if not path.is_file():
        # Compared without what all of them have in common, their folder and their ending.
        known = {other.stem: other for other in sorted(path.parent.glob("[!.]*.yaml"))}
        near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
        raise UserError(
            f"There is no recipe {path}.",
            f"Did you mean {known[near[0]]}?" if near else "Give the path of a YAML file; recipes/ holds examples.",
        )
    size_bytes = path.stat().st_size
    if size_bytes > MAX_BYTES:
        raise UserError(
            f"{path} is {size_bytes:,} bytes; a recipe is at most {MAX_BYTES:,}.", "Is this the right file?"
        )
    try:
        text = path.read_text(encoding="utf-8")
        node = _compose(text, path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}).", "Save the recipe as UTF-8.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not YAML: {what}.", "Mend that line and run the same command again.") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected `key: value` lines, found something else.", "recipes/ holds examples.")
    return _build(node, (), path, source)


def _compose(text: str, source: Path | str) -> yaml.Node | None:
    """The node tree of a YAML text without aliases and tags: they can make a small file enormous, or run code.

    Raises UserError, yaml.YAMLError.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # events are read lazily, before any tree is built
        place = f"{source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{place}: YAML aliases are not allowed in a recipe.", "Write the value out.")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(f"{place}: YAML tags ({tag}) are not allowed in a recipe.", "Write a plain value.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{place}: nested more than {MAX_DEPTH} deep.", "A recipe has three levels.")
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _build(node: yaml.Node, where: Place, path: Path, source: _Source) -> Any:
    source.lines[where] = (str(path), node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                told = "a key is one plain word, found a list or a mapping"
                source.mistakes.append(Mistake(str(path), line, told))
                continue
            key = str(key_node.value)
            if key in built:
                source.mistakes.append(Mistake(str(path), line, f"the key {key} stands here twice: keep one of them"))
                continue
            built[key] = _build(value_node, (*where, key), path, source)
            source.lines[(*where, key)] = (str(path), line)
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*where, index), path, source) for index, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    """A plain value: null, bool, int, float or text. Dates, and what only YAML 1.1 takes for a number or bool (off),
    stay text."""
    is_number = node.tag.endswith(":float") and ":" not in node.value and "_" not in node.value
    is_number = is_number or (node.tag.endswith(":int") and PLAIN_INT.fullmatch(node.value) is not None)
    is_bool = node.tag.endswith(":bool") and node.value.lower() in ("true", "false")
    if is_number or is_bool or node.tag.endswith(":null"):
        return yaml.SafeLoader("").construct_object(node)
    return node.value


def _apply_override(tree: dict[str, Any], override: str, source: _Source) -> None:
    """Put the value of one override into `tree`. Raises ValueError saying what is wrong with it."""
    where_text, equals, value_text = override.partition("=")
    if not equals or not where_text:
        raise ValueError("it is not of the form section.key=value, for example stages.0.epochs=1")
    try:
        node = _compose(value_text, f"override {override}")
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or "it is not YAML"
        raise ValueError(f"{what}; put quotes around a text with special characters") from None
    except UserError as error:
        raise ValueError(error.problem.rpartition(": ")[2].rstrip(".")) from None
    here: Any = tree
    where: list[str | int] = []
    parts = where_text.split(".")
    for depth, part in enumerate(parts):
        key = _key_in(here, part, ".".join(parts[:depth]))
        where.append(key)
        if isinstance(here, dict) and key not in here:
            source.lines[tuple(where)] = (f"override {override}", 0)
        if depth == len(parts) - 1:
            value = _build(node, tuple(where), Path("command line"), source) if node is not None else None
            here[key] = _from_working_directory(value)
            source.lines[tuple(where)] = (f"override {override}", 0)
        elif isinstance(here, dict) and not isinstance(here.get(key), dict | list):
            here[key] = {}
        here = here[key]


def _from_working_directory(value: Any) -> Any:
    """A path typed on the command line means the file the shell would complete, not one beside the recipe."""
    if isinstance(value, list):
        return [_from_working_directory(item) for item in value]
    if not isinstance(value, str) or not ("/" in value or "." in value):
        return value
    path = Path(value).expanduser()
    return str(path.resolve()) if has_files(path) else value


def _key_in(container: Any, part: str, name: str) -> str | int:
    """`part` as a key of what stands at `name`. Raises ValueError where it has none such."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ValueError(f"{name} holds no keys")
    names = [item.get("name") if isinstance(item, dict) else None for item in container]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(container):
        return int(part)
    raise ValueError(f"there is no {part} in {name}{nearest(part, (told or at for at, told in enumerate(names)))}")
