"""Messages from a terminal: lines as they are typed, pasted, or typed ahead.

Owns what is one message. Does not know what is done with it. Lines that come while nobody asks for one (the model
loads, an answer is being said) were typed: each is a message of its own. Lines that come together at the prompt were
pasted: they are one message.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections import deque
from collections.abc import Callable

from graftlm.errors import UserError

# A pasted line is followed by the next within this time; no person types so fast.
_PASTE_SECONDS = 0.03


def line_editor() -> Callable[[str], str]:
    """What reads a message, with arrow keys and history where the system has them: `read(prompt)`.

    It raises EOFError, KeyboardInterrupt, and UserError for bytes that are no UTF-8.
    """
    with contextlib.suppress(ImportError):
        import readline

        # Python switches it off; with it the terminal marks pasted text, whose line ends then end no message.
        readline.parse_and_bind("set enable-bracketed-paste on")
    return _Keyboard().read if sys.stdin.isatty() else _read_line


class _Keyboard:
    """A terminal's keys; `_ahead` are lines that nobody has asked for yet, None for Ctrl-D."""

    def __init__(self) -> None:
        self._ahead: deque[bytes | None] = deque()

    def read(self, prompt: str) -> str:
        self._ahead += _typed_ahead()
        if not self._ahead:
            return _read_message(prompt)
        typed = self._ahead.popleft()
        if typed is None:
            raise EOFError
        try:
            line = typed.decode(sys.stdin.encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            raise _not_utf8() from None
        print(f"{prompt}{line}", flush=True)
        with contextlib.suppress(ImportError):
            import readline

            readline.add_history(line)
        return line


def _typed_ahead() -> list[bytes | None]:
    """The whole lines that wait in the terminal, where it hands lines over one by one; half a line stays in it."""
    import termios

    keys = sys.stdin.fileno()
    lines: list[bytes | None] = []
    while termios.tcgetattr(keys)[3] & termios.ICANON and select.select([keys], [], [], 0)[0]:
        lines.append(os.read(keys, 65536) or None)
        if lines[-1] is None:
            break
    return lines


def _read_message(prompt: str) -> str:
    """A typed line; where the terminal does not mark pasted text, the lines that follow at once belong to it."""
    lines = [_read_line(prompt)]
    while select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:
        try:
            lines.append(_read_line(""))
        except EOFError:
            break
    return "\n".join(lines)


def _read_line(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError:
        raise _not_utf8() from None


def _not_utf8() -> UserError:
    return UserError("What was typed is not UTF-8.", "Set the terminal's encoding to UTF-8.")
