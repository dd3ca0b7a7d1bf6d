"""Run a chat template that came from somewhere else, without trusting it.

Owns the jinja environment: set up as transformers sets up its own (so the same string renders the same there),
sandboxed, and every operation of a template goes through the bounds of `template_budget`. Does not know what a
conversation or a token is. On the road it stands under `dialogue`, which every step that needs tokens calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from graftlm.errors import UserError
from graftlm.text.template_budget import Budget

MAX_TEMPLATE_CHARACTERS = 200_000
_DICT_ATTRIBUTES = frozenset(dir(dict))
# No chat template needs these; each builds or scans far more than it is given, or answers differently every time.
_NO_FILTERS = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_LITERALS = (nodes.List, nodes.Tuple, nodes.Dict)


class TemplateRefused(Exception):
    """The template itself raised, broke its bounds or touched what it must not."""


class _Generation(Extension):
    """transformers' `{% generation %}` block: its body is rendered, its bounds are found otherwise here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)]


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which everything a template builds is weighed, before it is built where that can be told."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = Budget()
        self.tick = self.budget.tick  # one object, so that `call` knows it at a glance
        self.literal = self.budget.literal
        self.finalize = self.budget.printed
        for name in _NO_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: self._weighed(name, apply) for name, apply in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form[:100])

    def _weighed(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is weighed before and after. Some take jinja's context before the value."""
        first = 1 if hasattr(apply, "jinja_pass_arg") else 0

        @wraps(apply)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            self.budget.before(name, args[first], (*args[first + 1 :], *kwargs.values()))
            return self.budget.built(apply(*args, **kwargs))

        return weighed

    def joined(self, *parts: Any) -> str:
        """The `~` operator."""
        return self.concat([str(self.budget.printed(part)) for part in parts])

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What a macro, a block or the template as a whole printed, put together."""
        parts = list(parts)
        self.budget.spend(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As the sandbox does; a slice is weighed."""
        found = super().getitem(obj, argument)
        return self.budget.built(found) if isinstance(argument, slice) else found

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does, with a short way for what nearly every access is: a message's field."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (type(obj) is Namespace and attr[0] != "_") or super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if called is self.tick or called is self.literal:
            return called(*args)
        owner, called_name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) or called_name in ("format", "format_map"):  # the sandbox hides those two's string
            self.budget.before(called_name, owner, (*args, *kwargs.values()))
        return self.budget.built(super().call(context, called, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, then put a tick into every loop and macro and weigh every `~`, list, tuple and dict."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno))
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, list):
                    value[:] = [_weighed_node(item) for item in value]
                else:
                    setattr(parent, field, _weighed_node(value))
        return tree


def _call(method: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None, lineno=at.lineno)


def _weighed_node(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _call("joined", node.nodes, node)
    if isinstance(node, _LITERALS) and getattr(node, "ctx", "load") == "load" and not _is_constant(node):
        return _call("literal", [node], node)
    return node


def _is_constant(node: nodes.Expr) -> bool:
    """Whether a literal holds nothing that could have been built: `['user', 'assistant']`."""
    return all(isinstance(child, (nodes.Const, nodes.Pair)) or child is node for child in node.find_all(nodes.Expr))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reason(error: BaseException) -> str:
    """What jinja, Python or a template's author says, without the stop at its end: it becomes part of a sentence."""
    return str(error).rstrip(" .?") or type(error).__name__


def _environment() -> _BoundedEnvironment:
    """transformers' settings, bounded. Source: transformers/utils/chat_template_utils.py (Apache-2.0)."""
    return _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])


@lru_cache(maxsize=32)
def compile_template(source: str) -> Callable[..., str]:
    """A function rendering `source` with the variables it is given.

    Raises: UserError when the template cannot be parsed; the function raises TemplateRefused.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise UserError(
            f"The chat template has {len(source):,} characters; at most {MAX_TEMPLATE_CHARACTERS:,} are read.",
            "Choose a built-in template: card or alpaca.",
        )
    environment = _environment()
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f" at line {line}" if line else ""
        raise UserError(
            f"The chat template cannot be read{where}: {_reason(error)}.", "Mend it, or choose card or alpaca."
        ) from None

    def render(**variables: Any) -> str:
        environment.budget.start()
        parts = []
        try:
            for part in template.generate(**variables):
                environment.budget.spend(len(part))
                parts.append(part)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise TemplateRefused(_reason(error)) from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefused(f"{type(error).__name__}: {_reason(error)}") from None
        return "".join(parts)

    return render
