"""Talking at a terminal: turns, commands, keys, and what a model must not do to the screen."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import UserError
from graftlm.talk import terminal
from graftlm.talk.sampling import Sampling
from graftlm.talk.terminal import chat_loop, chat_once


def talk(chatbot: Any, *lines: str | type[BaseException], sampling: Sampling | None = None) -> str:
    """What the screen shows when these lines are typed; an exception class is a key such as Ctrl-C."""
    typed = iter(lines)
    shown: list[str] = []

    def read(prompt: str) -> str:
        line = next(typed, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    chat_loop(chatbot, sampling or Sampling(), read, shown.append)
    return "".join(shown)


@pytest.fixture
def greeter(speaking: Callable, tokenizer: Any) -> Any:
    return speaking(tokenizer.encode_continuation("你好 there"))


def asked(chatbot: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the messages of every conversation the chatbot is asked to continue."""
    seen: list[list[str]] = []
    stream = chatbot.stream

    def watched(conversation: Any, sampling: Sampling) -> Iterator[str]:
        seen.append([message.content for message in conversation.messages])
        return stream(conversation, sampling)

    monkeypatch.setattr(chatbot, "stream", watched)
    return seen


def test_turns_carry_the_history_until_reset(greeter, monkeypatch) -> None:
    seen = asked(greeter, monkeypatch)
    screen = talk(greeter, "hi", "", "and?", "/reset", "again")
    assert seen == [["hi"], ["hi", "你好 there", "and?"], ["again"]]
    assert screen.count("你好 there\n") == 3


def test_quit_leaves_and_double_slash_sends(greeter, monkeypatch) -> None:
    seen = asked(greeter, monkeypatch)
    talk(greeter, "//hi", "/quit", "never")
    assert seen == [["/hi"]]


def test_a_saved_conversation_goes_on_after_loading(greeter, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    seen = asked(greeter, monkeypatch)
    talk(greeter, "hi", f"/save {file}")
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
    screen = talk(greeter, f"/load {file}", "go on", f"/save {file}")
    assert seen[-1] == ["hi", "你好 there", "go on"]
    assert "after 2 messages" in screen
    assert "Kept 4 messages" in screen


@pytest.mark.parametrize(
    ("line", "told"),
    [("/sing", "no command /sing"), ("/save", "needs a file's name"), ("/save x", "Nothing has been said"),
     ("/load /nowhere/x", "There is no file /nowhere/x"), ("/help", "Ctrl-C stops an answer")],
)  # fmt: skip
def test_mistakes_are_told_and_the_talk_goes_on(greeter, line: str, told: str) -> None:
    screen = talk(greeter, line, "hi")
    assert told in screen
    assert "你好 there" in screen


def test_other_files_are_not_overwritten(greeter, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not a saved conversation" in talk(greeter, "hi", f"/save {tmp_path / 'thesis.txt'}")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert "There is no folder" in talk(greeter, "hi", f"/save {tmp_path / 'no' / 'x.jsonl'}")


def test_ctrl_c_stops_the_answer_and_keeps_the_talk(speaking, tokenizer, monkeypatch) -> None:
    bot = speaking(tokenizer.encode_continuation("one two three four five"))
    seen = asked(bot, monkeypatch)
    shown: list[str] = []
    lines = iter(["count", "and?"])

    def write(text: str) -> None:
        shown.append(text)
        if text == " two":
            raise KeyboardInterrupt

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    pieces = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode_continuation("one two three")]
    chat_loop(bot, Sampling(), read, lambda text: write(" two" if text == pieces[1] else text))
    assert "(stopped)" in "".join(shown)
    assert seen[1][0] == "count"
    assert seen[1][1] == "".join(pieces[:2])


def test_ctrl_c_at_the_prompt_hints_and_ctrl_d_leaves(greeter) -> None:
    assert "Ctrl-D or /quit leaves" in talk(greeter, KeyboardInterrupt)


def test_a_question_too_long_is_told_and_forgotten(speaking, tokenizer, monkeypatch) -> None:
    bot = speaking(tokenizer.encode_continuation("ok"), max_positions=260)
    seen = asked(bot, monkeypatch)
    screen = talk(bot, "hello there " * 300, "hi")
    assert "of this model's 260" in screen
    assert seen[-1] == ["hi"]


def test_cut_answers_and_lost_turns_are_told(speaking, tokenizer) -> None:
    bot = speaking(tokenizer.encode_continuation("one two three"), max_positions=220)
    screen = talk(bot, *["what is the capital of France?"] * 14, sampling=Sampling(max_new_tokens=2))
    assert "(cut after 2 tokens)" in screen
    assert "no longer fit and were left out" in screen


def test_a_model_cannot_drive_the_terminal(speaking, tokenizer) -> None:
    ids = [i for i in range(tokenizer.num_pieces) if tokenizer.token_bytes(i) == b"\x1b"]
    bot = speaking([*ids, *tokenizer.encode_continuation("[2Jhello\n")])
    screen = talk(bot, "hi")
    assert "\x1b" not in screen
    assert "[2Jhello\n" in screen


def test_once_is_json_ready(greeter, tokenizer) -> None:
    answer = chat_once(greeter, "hi", Sampling())
    assert json.loads(json.dumps(answer))["answer"] == "你好 there"
    assert answer["answer_tokens"] == len(tokenizer.encode_continuation("你好 there"))
    assert answer["prompt_tokens"] > 10
    with pytest.raises(UserError, match="empty"):
        chat_once(greeter, "  ", Sampling())


def test_a_system_message_stands_first_until_switched_off(greeter, monkeypatch) -> None:
    seen = asked(greeter, monkeypatch)
    screen = talk(greeter, "/system Be kind.", "hi", "/reset", "/system", "again", "/system off", "/reset", "bare")
    assert seen == [["Be kind.", "hi"], ["Be kind.", "again"], ["bare"]]
    assert "The system message stays." in screen
    assert screen.count("System message: Be kind.") == 2
    assert "There is no system message." in screen


def test_a_talk_can_begin_with_a_system_message(greeter, monkeypatch) -> None:
    seen = asked(greeter, monkeypatch)
    lines = iter(["hi"])
    chat_loop(greeter, Sampling(), lambda _: next(lines, "/quit"), lambda _: None, system="Be brief.")
    assert seen == [["Be brief.", "hi"]]


def test_params_are_shown_and_changed(greeter) -> None:
    screen = talk(greeter, "/params", "/params temperature=0.7 max_new_tokens=1", "hi", "/params")
    assert "temperature=0 top_p=1 top_k=0 repetition_penalty=1 max_new_tokens=512 seed=0" in screen
    assert screen.count("temperature=0.7") == 2
    assert "(cut after 1 tokens)" in screen


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("warmth=1", "There is no parameter warmth. Known: temperature, top_p"),
        ("top_k=many", "top_k is 'many', expected a whole number."),
        ("top_p=2", "top_p is 2.0, expected above 0"),
        ("temperature", "temperature is '', expected a number."),
    ],
)
def test_wrong_params_change_nothing(greeter, words: str, told: str) -> None:
    screen = talk(greeter, f"/params {words}", "/params")
    assert told in screen
    assert "temperature=0 top_p=1 top_k=0" in screen


def test_lines_that_come_at_once_are_one_message(monkeypatch) -> None:
    """A terminal that does not mark pasted text hands its lines over one by one, without a pause."""
    typed = iter(["one", "two", "three"])
    waiting = iter([True, True, False])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(terminal.select, "select", lambda *_: ([sys.stdin] if next(waiting) else [], [], []))
    assert terminal._read_message("> ") == "one\ntwo\nthree"
