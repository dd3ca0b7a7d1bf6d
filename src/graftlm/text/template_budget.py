"""What one rendering of a chat template may cost: loop turns, seconds, size of what it builds.

Owns the bounds and how values are weighed. Does not know jinja's machinery: `sandbox` asks before and after every
operation. Budgets are per thread: a server renders in several.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import local
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

MAX_TICKS = 200_000  # loop turns and macro calls
MAX_SECONDS = 10.0  # the largest real template needs a few milliseconds
MAX_SIZE = 5_000_000  # characters of one string, items of one list
MAX_BUILT = 100_000_000  # characters and items in all
MAX_NODES = 200_000  # values inside a nested list or dict
MAX_PADDING = 10_000  # an integer handed to a string method or a filter: a width, a count
MAX_NUMBER_BITS = 4_096

# No chat template needs these; what they build cannot be told beforehand.
_FORBIDDEN = ("format", "format_map", "translate", "maketrans", "encode", "expandtabs")
_CONTAINERS = (list, tuple, dict, Namespace)


class Budget:
    """The bounds of one rendering. Every method raises SecurityError when one is broken."""

    def __init__(self) -> None:
        self._spent = local()
        # One object each, as bound methods would be new ones at every access.
        self.tick = self._tick
        self.literal = self._literal

    def start(self) -> None:
        """Begin a rendering in this thread."""
        self._spent.ticks = self._spent.size = 0
        self._spent.deadline = time.monotonic() + MAX_SECONDS

    def _tick(self) -> None:
        """Count one loop turn or macro call."""
        self._spent.ticks += 1
        if self._spent.ticks > MAX_TICKS:
            raise SecurityError(f"the template went through more than {MAX_TICKS:,} loop turns")
        if not self._spent.ticks & 63:
            self._check_time()

    def _literal(self, value: Any) -> Any:
        """A list, tuple or dict the template wrote; nesting it in itself again and again is how small text grows."""
        self._weigh_nested(value)
        return value

    def spend(self, size: int) -> None:
        """Count characters or items about to be built."""
        if size > MAX_SIZE:
            raise SecurityError(f"the template built a value over {MAX_SIZE:,} characters")
        if size < 1000:
            return  # ticks and the length of the template bound how many small ones there can be
        self._spent.size += size
        if self._spent.size > MAX_BUILT:
            raise SecurityError(f"the template built more than {MAX_BUILT:,} characters in all")
        self._check_time()

    def built(self, value: Any) -> Any:
        """Count what an operation gave."""
        if isinstance(value, (str, list, tuple, dict)):
            self.spend(len(value))
        if isinstance(value, (list, tuple, dict)):
            self._weigh_nested(value)
        return value

    def printed(self, value: Any) -> Any:
        """Weigh what is about to become text."""
        if isinstance(value, _CONTAINERS):
            self._weigh_nested(value)
        return value

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Weigh `left operator right` before it is done."""
        are_numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and not (are_numbers and abs(left) <= 1000 and abs(right) <= 16):
            raise SecurityError("the template raised a number to a large power")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the template formats with %")
        if operator == "*" and are_numbers:
            if sum(value.bit_length() for value in (left, right) if isinstance(value, int)) > MAX_NUMBER_BITS:
                raise SecurityError("the template built a huge number")
        elif operator == "*":
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            self.spend(_length(repeated) * max(times, 0) if isinstance(times, int) else 0)
        elif operator == "+" and not are_numbers:
            self.spend(_length(left) + _length(right))

    def before(self, name: str, value: Any, args: Sequence[Any]) -> None:
        """Weigh a filter or method called `name` on `value`, before it works."""
        if name in _FORBIDDEN:
            raise SecurityError(f"the template calls {name}")
        for given in args:
            if isinstance(given, int) and given > MAX_PADDING:
                raise SecurityError(f"the template asked for {given} characters of padding")
            self.printed(given)
        self.printed(value)
        if name == "replace" and len(args) >= 2 and isinstance(value, str):
            old, new = str(args[0]), str(args[1])
            self.spend(len(value) + (value.count(old) if old else len(value) + 1) * len(new))
        elif name == "join":
            separator, items = (value, args[0]) if isinstance(value, str) and args else (args[0] if args else "", value)
            self.spend(_length(separator) * _length(items) + _length_of_items(items))

    def _check_time(self) -> None:
        if time.monotonic() > self._spent.deadline:
            raise SecurityError(f"the template ran for more than {MAX_SECONDS:g} seconds")

    def _weigh_nested(self, value: Any) -> None:
        """Count every value inside `value`, one that stands there twice twice, as printing would."""
        size = num_nodes = 0
        left = [value]
        while left:
            one = left.pop()
            num_nodes += 1
            if isinstance(one, str):
                size += len(one)
            elif isinstance(one, dict):
                left += one.keys()
                left += one.values()
            elif isinstance(one, (list, tuple)):
                left += one
            elif isinstance(one, Namespace):
                left += object.__getattribute__(one, "_Namespace__attrs").values()
            if num_nodes + len(left) > MAX_NODES or size > MAX_SIZE:
                raise SecurityError(f"the template built a value over {MAX_NODES:,} items or {MAX_SIZE:,} characters")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") and not isinstance(value, Undefined) else 0


def _length_of_items(items: Any) -> int:
    """Characters of the strings in a list; what is produced one by one is bounded by its loop turns."""
    if not isinstance(items, (list, tuple)):
        return 0
    return sum(len(item) for item in items if isinstance(item, str))
