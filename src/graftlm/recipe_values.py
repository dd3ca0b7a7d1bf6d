"""What a recipe's values may be: its sections' manners, numbers, names, and paths made absolute.

Owns that a section tells all its mistakes at once, and what a path, a pattern of names or a hub id is. Does not know
any section (`recipe.py`) or how mistakes are worded (`mistakes.py`).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails

from graftlm.script_names import is_script, nearest_script

Place = tuple[str | int, ...]
"""Where a value stands in a recipe: its keys, and its number where it is one of a list."""

# A name that ends so is a file, though `data/rows.jsonl` has the form of an id on the hub.
FILE_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".model",
    ".safetensors", ".jinja",
)  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error. All its mistakes are told at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        # Validators that run after the fields would say nothing while any field is wrong.
        details: list[Any] = []
        section = None
        try:
            section = validate(value)
        except ValidationError as error:
            details += error.errors(include_url=False)
        if isinstance(value, Mapping):
            defaults = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
            for place, told in cls.contradictions(defaults | dict(value)):
                context = {"error": ValueError(told)}
                details.append(InitErrorDetails(type="value_error", loc=place, input=value, ctx=context))
        if section is None or details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return section

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """What cannot stand together, each with the key to look at; `given` is what was written (not yet checked, so
        of any type) above the defaults."""
        yield from ()


def values_of(section: Any) -> Mapping[str, Any]:
    """The values of a section within another, written or made already; none where it is no section."""
    return section if isinstance(section, Mapping) else vars(section) if isinstance(section, Section) else {}


def _not_bool(value: Any) -> Any:
    # YAML reads `no` as false, and pydantic would go on to read false as 0.
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}")
    return value


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form `owner/name` of a model or data set on the hub, and not that of a file's path."""
    is_file = Path(text).suffix.lower() in FILE_SUFFIXES
    return not is_file and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def is_pattern(path: str | Path) -> bool:
    """Whether a path is read as a pattern of names (`*`, `?`, `[...]`): one that exists as it stands is not."""
    return re.search(r"[*?[]", str(path)) is not None and not os.path.exists(path)


def folder_of_pattern(pattern: str | Path) -> Path:
    """The last folder of a pattern that exists as it stands: below it names are compared, itself it may hold `[`."""
    return next(folder for folder in Path(pattern).parents if folder.is_dir())


def files_named(pattern: str | Path) -> list[Path]:
    """The files a pattern names, by name: `**` is any number of folders, and names that begin with a dot are left out,
    as in the shell. Empty where no file matches."""
    folder = folder_of_pattern(pattern)
    names = glob.glob(str(Path(pattern).relative_to(folder)), root_dir=folder, recursive=True)
    return sorted({folder / name for name in names if (folder / name).is_file()})


def has_files(path: str | Path) -> bool:
    """Whether something lies at a path, or a pattern names a file."""
    return os.path.exists(path) or (is_pattern(path) and bool(files_named(path)))


def resolve_path(value: Any, info: ValidationInfo) -> Any:
    """Make a path relative to the recipe's folder absolute; leave hub ids as they are.

    Where the context asks for it (`needs_files`), a path at which nothing lies is a mistake.
    """
    return _resolved(value, info, may_be_pattern=False)


def resolve_source(value: Any, info: ValidationInfo) -> Any:
    """As `resolve_path`, for what may also be a pattern: then it is a mistake that no file matches."""
    return _resolved(value, info, may_be_pattern=True)


def _resolved(value: Any, info: ValidationInfo, may_be_pattern: bool) -> Any:
    if not isinstance(value, str):
        return value
    context = info.context or {}
    path = Path(value).expanduser()
    if not path.is_absolute() and context.get("folder") is not None:
        path = Path(context["folder"]) / path
        if looks_like_hub_id(value) and not os.path.exists(path):
            return value
        path = path.resolve()
    if context.get("needs_files") and not os.path.exists(path):
        if not (may_be_pattern and is_pattern(path)):
            raise ValueError(f"there is no file or folder {path}")
        if not files_named(path):
            raise ValueError(f"no file matches {path}")
    return str(path)


def _script(name: str) -> str:
    if not is_script(name):
        raise ValueError(f"Unicode knows no script {name!r}; {nearest_script(name)}")
    return name


Number = Annotated[float, BeforeValidator(_not_bool)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[StrictInt, Field(gt=0)]
Location = Annotated[str, BeforeValidator(resolve_path)]
"""A local path (relative to the recipe's file) or a hub id."""

SourceLocation = Annotated[str, BeforeValidator(resolve_source)]
"""The same, or a pattern of file names."""

ScriptName = Annotated[str, AfterValidator(_script)]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
