"""What is wrong with a body, in words of the API: its fields as they were written, what they may be, and why.

Owns those words. Does not know routes; `requests` owns the fields. Pydantic's own sentences name its types and the
branches it tried, which whoever wrote the body has never heard of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NO_TOOLS = "no tools can be called here"
_ONE_VALUE = "not done here"
WHY = {
    "tools": _NO_TOOLS, "tool_choice": _NO_TOOLS, "tool_calls": _NO_TOOLS, "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS, "type": "only text is read and written here", "modalities": "only text is written here",
    "audio": "only text is written here", "frequency_penalty": "not done here; repetition_penalty is",
    "presence_penalty": "not done here; repetition_penalty is", "logit_bias": _ONE_VALUE, "echo": _ONE_VALUE,
    "suffix": _ONE_VALUE, "store": "answers are not kept here", "service_tier": "there is one tier here",
    "reasoning_effort": "the model answers without thinking first", "verbosity": "not done here; ask for it in words",
    "prediction": _ONE_VALUE, "web_search_options": "nothing is looked up here",
}  # fmt: skip
"""Why a field is taken only at the value that changes nothing."""

UNREADABLE = "The body is no JSON that can be read: UTF-8, not nested deeply, no number of thousands of digits."
"""Of a body that the framework could not parse, and has only a word of its own for."""

_KINDS = {
    "string_type": "text", "list_type": "a list", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "finite_number": "a finite number", "bool_type": "true or false",
    "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object", "none_required": "null",
    "int_parsing_size": "a whole number of fewer digits",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt"), "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}  # fmt: skip


def complaint(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence about the first of a body's mistakes, as pydantic found them, and the field it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "The body is not JSON.", None
    branches = _branches(errors)
    found = next((error for error in branches if not _is_other_branch(error)), branches[0])
    place = _place(found)
    if found["type"] == "disagreeing":
        return f"{found['msg']}.", found["ctx"]["param"]
    if not place:
        return "The body must be a JSON object sent as application/json.", None
    if found["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {place}", place
    wanted = _wanted(found)
    if _is_other_branch(found):  # no branch is of the value's kind: each tells its own
        more = [_wanted(error).removeprefix("must be ") for error in branches[1:]]
        wanted = " or ".join(dict.fromkeys([wanted, *more]))
    why = WHY.get(_field(found))
    return f"{place}: {wanted}{f' ({why})' if why else ''}.", place


def _parts(error: Mapping[str, Any]) -> list[int | str]:
    return [part for part in error["loc"] if part != "body"]


def _is_tag(part: int | str) -> bool:
    """Whether a part of a place names a branch of a union and no field: `str`, `constrained-str`, `list[…]`."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or part.startswith("list["))


def _place(error: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in _parts(error) if not _is_tag(part))


def _field(error: Mapping[str, Any]) -> str:
    return next((part for part in reversed(_parts(error)) if isinstance(part, str) and not _is_tag(part)), "")


def _branches(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first mistake, and where it is one of a field that may be several kinds, what each kind said against it."""
    parts = _parts(errors[0])
    tag = next((number for number, part in enumerate(parts) if _is_tag(part)), None)
    return [errors[0]] if tag is None else [error for error in errors if _parts(error)[:tag] == parts[:tag]]


def _is_other_branch(error: Mapping[str, Any]) -> bool:
    """Whether the mistake only says that the value is of another kind than this branch."""
    return error["type"] in ("string_type", "list_type") and _is_tag(_parts(error)[-1])


def _wanted(error: Mapping[str, Any]) -> str:
    kind, told = error["type"], error.get("ctx") or {}
    field = _field(error)
    if kind == "missing":
        return "is missing"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return "must be 0" if field in WHY else f"must be {words} {_digits(told[bound])}"
    if kind == "literal_error":
        return f"must be {told['expected'].lower()}"
    if kind == "too_long":
        return (
            f"may hold {told['max_length']} at most, not {told['actual_length']}"
            if field not in WHY
            else "must be empty"
        )
    return "must not be empty" if kind in ("too_short", "string_too_short") else str(error["msg"])


def _digits(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
