"""Write the tables of recipe keys into the guides: values and defaults from the recipe's models, meanings from
recipe_keys.yaml.

Run it after a change of `recipe.py`: python docs/recipe_keys.py. A test fails while the guides are behind.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from graftlm.recipe import Recipe

DOCS = Path(__file__).parent
START, END = "<!-- keys: written by docs/recipe_keys.py -->", "<!-- /keys -->"

Language = Literal["en", "zh"]
WORDS: dict[Language, dict[str, str]] = {
    "en": {},
    "zh": {
        "text": "文本", "whole number": "整数", "number": "数", "section": "小节", "list of sections": "小节的列表",
        "list of {}": "{}的列表", "its own": "各自的默认值", "none": "无",
    },
}  # fmt: skip
HEADS = {"en": "key | values | default | meaning", "zh": "键 | 取值 | 默认 | 含义"}
GUIDES: dict[str, Language] = {"guide.md": "en", "guide.zh.md": "zh"}


def tables(language: Language) -> str:
    """The tables of all sections. Raises KeyError for a key whose meaning nobody has written."""
    told = yaml.safe_load((DOCS / "recipe_keys.yaml").read_text(encoding="utf-8"))
    schema = Recipe.model_json_schema()
    models = {"Recipe": schema, **schema["$defs"]}
    parts = []
    for name, section in told["sections"].items():
        rows = []
        for key, field in models[name]["properties"].items():
            default = "" if key in models[name].get("required", ()) else _default(field, language)
            values, meaning = _values(field, language), told["keys"][f"{name}.{key}"][language]
            rows.append(f"| `{key}` | {values} | {default} | {meaning} |")
        where = f" `{section['path']}`" if section["path"] else ""
        parts.append(f"**{section[language]}**{where}\n\n| {HEADS[language]} |\n|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _word(name: str, language: Language) -> str:
    return WORDS[language].get(name, name)


def _values(field: dict[str, Any], language: Language) -> str:
    if "anyOf" in field or "oneOf" in field:
        options = [_values(option, language) for option in field.get("anyOf") or field["oneOf"]]
        return ", ".join(dict.fromkeys(option for option in options if option))
    if "$ref" in field:
        return _word("section", language)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type", "string")
    if kind == "array":
        inner = field.get("items") or (field.get("prefixItems") or [{}])[0]
        if "$ref" in inner:
            return _word("list of sections", language)
        return _word("list of {}", language).format(_values(inner, language))
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    return " ".join([_word(names[kind], language), ", ".join(limits)]).strip()


def _default(field: dict[str, Any], language: Language) -> str:
    value = field.get("default")
    if isinstance(value, dict):
        return _word("its own", language)
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value) or _word("none", language)
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def current(text: str, language: Language) -> str:
    """The guide `text` with its tables as they should be."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{tables(language)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name, language in GUIDES.items():
        guide = DOCS / name
        guide.write_text(current(guide.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(f"{guide}: written", file=sys.stderr)
