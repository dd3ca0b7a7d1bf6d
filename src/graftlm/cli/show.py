"""How a verb's result reaches standard output: one JSON object, or lines of `key  value` for a person."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

# Examples out of people's files must not drive the terminal: they are written out.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def show(value: Any, as_json: bool) -> None:
    """Print a result, a dataclass or a mapping. What a mapping holds inside is indented."""
    found: Any = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


def _lines(found: Mapping[str, Any], indent: str = "", shows_texts: bool = False) -> Iterator[str]:
    """What `examples` hold are texts, in which a blank counts: they stand in quotes."""
    width = max((len(str(key)) for key, value in found.items() if not _is_open(value)), default=0)
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ", shows_texts or key == "examples")
        elif shows_texts and isinstance(value, list | tuple) and value:
            yield f"{indent}{key}"
            yield from (f"{indent}  {_quoted(item)}" for item in value)
        elif _is_open(value):
            yield f"{indent}{key}"
            yield from (f"{indent}  {_text(item)}" for item in value)
        else:
            yield f"{indent}{key!s:<{width}}  {_text(value)}"


def _is_open(value: Any) -> bool:
    """Whether a value takes lines of its own: a mapping, or a list of more than numbers and single words."""
    is_long = isinstance(value, list | tuple) and any(" " in str(item) or len(str(item)) > 30 for item in value)
    return bool(value) and (isinstance(value, Mapping) or is_long)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else plain(str(value))


def _quoted(value: Any) -> str:
    return f'"{plain(value)}"' if isinstance(value, str) else _text(value)


def plain(text: str) -> str:
    """Text that cannot drive a terminal: control characters are written out."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
