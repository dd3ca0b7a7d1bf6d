"""Run a chat template that came from somewhere else, without trusting it.

Owns the jinja environment: set up as transformers sets up its own (so the same string renders the same there),
sandboxed, and bounded in time, loop turns and size of any string it builds. Does not know what a conversation or
a token is. On the road it stands under `dialogue`, which every step that needs tokens calls.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from threading import local
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from graftlm.errors import UserError

MAX_TEMPLATE_CHARACTERS = 200_000
MAX_TICKS = 200_000  # loop turns and macro calls of one rendering
MAX_SECONDS = 10.0  # one rendering; the largest real template needs a few milliseconds
MAX_STRING_CHARACTERS = 20_000_000  # any string or list the template builds
_DICT_ATTRIBUTES = frozenset(dir(dict))
MAX_PADDING = 10_000  # an integer handed to a string method or a filter that pads


class TemplateRefused(Exception):
    """The template itself raised, broke its bounds or touched what it must not."""


class _Generation(Extension):
    """transformers' `{% generation %}` block: its body is rendered, its bounds are found otherwise here."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts loop turns and macro calls and refuses to build huge values."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._budget = local()
        self.tick = self._tick  # one object, so that `call` knows it at a glance
        for name in ("center", "indent", "format", "wordwrap"):
            self.filters[name] = _bounded(self.filters[name])

    def start(self) -> None:
        """Begin the budget of one rendering (per thread)."""
        self._budget.ticks = 0
        self._budget.deadline = time.monotonic() + MAX_SECONDS

    def _tick(self) -> None:
        """Count one loop turn or macro call."""
        self._budget.ticks += 1
        if self._budget.ticks > MAX_TICKS:
            raise SecurityError(f"the template went through more than {MAX_TICKS:,} loop turns")
        if not self._budget.ticks & 63 and time.monotonic() > self._budget.deadline:
            raise SecurityError(f"the template ran for more than {MAX_SECONDS:g} seconds")

    def joined(self, *parts: Any) -> str:
        """The `~` operator, bounded."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > MAX_STRING_CHARACTERS:
            raise SecurityError(f"the template built a string over {MAX_STRING_CHARACTERS:,} characters")
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_is_small(left, 1000) and _is_small(right, 16)):
            raise SecurityError("the template raised a number to a large power")
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            _check_length(len(repeated) * max(int(times), 0))
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the template formats with %")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does, with a short way for what nearly every access is: a message's field."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (type(obj) is Namespace and attr[0] != "_") or super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if called is self.tick:
            return called()
        if isinstance(getattr(called, "__self__", None), str):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and value > MAX_PADDING:
                    raise SecurityError(f"the template asked for {value} characters of padding")
            if getattr(called, "__name__", "") in ("format", "format_map"):
                raise SecurityError("the template calls format")
            return _checked(super().call(context, called, *args, **kwargs))
        return super().call(context, called, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, then put a tick into every loop and macro and bound every `~`."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, list):
                    value[:] = [_bounded_concat(item) for item in value]
                else:
                    setattr(parent, field, _bounded_concat(value))
        return tree


def _bounded_concat(node: Any) -> Any:
    if not isinstance(node, nodes.Concat):
        return node
    joined = nodes.EnvironmentAttribute("joined")
    return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_small(value: Any, bound: int) -> bool:
    return _is_number(value) and abs(value) <= bound


def _check_length(length: int) -> None:
    if length > MAX_STRING_CHARACTERS:
        raise SecurityError(f"the template built a value over {MAX_STRING_CHARACTERS:,} characters")


def _checked(value: Any) -> Any:
    if hasattr(value, "__len__"):
        _check_length(len(value))
    return value


def _bounded(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose integers may not ask for more padding than any honest template needs."""

    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, int) and given > MAX_PADDING:
                raise SecurityError(f"the template asked for {given} characters of padding")
        return apply(value, *args, **kwargs)

    return bounded


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    raise SecurityError("the template uses the format filter")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _BoundedEnvironment:
    """transformers' settings, bounded. Source: transformers/utils/chat_template_utils.py (Apache-2.0)."""
    environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["format"] = _format_filter
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form[:100])
    return environment


@lru_cache(maxsize=32)
def compile_template(source: str) -> Callable[..., str]:
    """A function rendering `source` with the variables it is given.

    Raises: UserError when the template cannot be parsed; the function raises TemplateRefused.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise UserError(
            f"the chat template has {len(source):,} characters, at most {MAX_TEMPLATE_CHARACTERS:,} are read",
            "choose a built-in template: card or alpaca",
        )
    environment = _environment()
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f" at line {line}" if line else ""
        raise UserError(
            f"the chat template cannot be read{where}: {error}", "mend it, or choose card or alpaca"
        ) from None

    def render(**variables: Any) -> str:
        environment.start()
        parts, length = [], 0
        try:
            for part in template.generate(**variables):
                length += len(part)
                _check_length(length)
                parts.append(part)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise TemplateRefused(str(error) or type(error).__name__) from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None
        return "".join(parts)

    return render
