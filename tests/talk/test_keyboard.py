"""What is one message: lines pasted together are, lines typed ahead are not."""

import os
import sys
from collections.abc import Iterator

import pytest

from graftlm.errors import UserError
from graftlm.talk import keyboard


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of the terminal that is standard input."""
    end, terminal_file = os.openpty()
    with os.fdopen(terminal_file, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield end
    os.close(end)


def test_lines_that_come_at_once_are_one_message(monkeypatch) -> None:
    """A terminal that does not mark pasted text hands its lines over one by one, without a pause."""
    typed = iter(["one", "two", "three"])
    waiting = iter([True, True, False])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(keyboard.select, "select", lambda *_: ([sys.stdin] if next(waiting) else [], [], []))
    assert keyboard._read_message("> ") == "one\ntwo\nthree"


def test_lines_typed_before_anybody_asks_are_messages_of_their_own(keys: int, capsys) -> None:
    read = keyboard.line_editor()
    os.write(keys, "天空\n/help\n\n\x04".encode())
    assert [read("> ") for _ in range(3)] == ["天空", "/help", ""]
    with pytest.raises(EOFError):
        read("> ")
    assert capsys.readouterr().out == "> 天空\n> /help\n> \n"


def test_what_is_not_utf8_is_told(keys: int) -> None:
    os.write(keys, "天空\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        keyboard.line_editor()("> ")
