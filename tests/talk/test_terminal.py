"""Talking at a terminal: turns, commands, keys, and what a model must not do to the screen."""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from child import in_background

from graftlm.cli import main
from graftlm.errors import UserError
from graftlm.model.causal import new_causal, save_causal
from graftlm.talk.sampling import Sampling
from graftlm.talk.terminal import chat_loop, chat_once
from graftlm.text.dialogue import CARD


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


def test_of_several_kept_conversations_one_is_chosen(greeter, monkeypatch, tmp_path: Path) -> None:
    """The page's "Export all" is such a file; nothing of it may be overwritten either."""
    file = tmp_path / "all of them.jsonl"
    rows = [{"title": f"talk\x1b[2J {n}", "messages": [{"role": "user", "content": f"q{n}"}]} for n in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "third\nline " * 30}]))
    kept = file.read_bytes()
    seen = asked(greeter, monkeypatch)
    screen = talk(greeter, f"/load {file}", "hi", f"/save {file}", f"/load {file} 4", f"/load {file} 2", "go on")
    assert f"{file} holds 3 conversations:\n  1  talk[2J 1\n  2  talk[2J 2\n  3  third line third" in screen
    assert f"Say which: /load {file} 1" in screen
    assert "holds no conversation 4. Choose one from 1 to 3." in screen
    assert "not a saved conversation, or not one alone" in screen
    assert seen == [["hi"], ["q2", "go on"]]
    assert file.read_bytes() == kept


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


def test_ctrl_c_at_the_prompt_hints_and_a_second_one_leaves(greeter, monkeypatch) -> None:
    seen = asked(greeter, monkeypatch)
    screen = talk(greeter, KeyboardInterrupt, "hi", KeyboardInterrupt, "", KeyboardInterrupt, KeyboardInterrupt, "no")
    assert screen.count("Ctrl-C again, Ctrl-D or /quit leaves") == 3
    assert seen == [["hi"]]


def test_ctrl_c_before_an_answer_begins_is_no_step_towards_leaving(greeter, monkeypatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(greeter, "stream", interrupted)
        assert "(stopped)" in talk(greeter, "hi", KeyboardInterrupt, "and?", EOFError)


def test_a_question_too_long_is_told_and_forgotten(speaking, tokenizer, monkeypatch) -> None:
    bot = speaking(tokenizer.encode_continuation("ok"), max_positions=260)
    seen = asked(bot, monkeypatch)
    screen = talk(bot, "hello there " * 300, "hi")
    assert "of this model's 260" in screen
    assert seen[-1] == ["hi"]


def test_cut_answers_and_lost_turns_are_told(speaking, tokenizer) -> None:
    bot = speaking(tokenizer.encode_continuation("one two three"), max_positions=220)
    screen = talk(bot, *["what is the capital of France?"] * 14, sampling=Sampling(max_tokens=2))
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
    screen = talk(greeter, "/params", "/params temperature=0.7 max_tokens=1", "hi", "/params")
    assert "temperature=0 top_p=1 top_k=0 repetition_penalty=1 max_tokens=512 seed=0" in screen
    assert screen.count("temperature=0.7") == 2
    assert "(cut after 1 tokens)" in screen


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("warmth=1", "There is no parameter warmth. Known: temperature, top_p"),
        ("top_k=many", "top_k is 'many', expected a whole number."),
        ("top_p=2", "top_p is 2.0, expected from 0 to 1"),
        ("temperature=3", "temperature is 3.0, expected from 0 (always the likeliest) to 2."),
        ("temperature", "temperature is '', expected a number."),
    ],
)
def test_wrong_params_change_nothing(greeter, words: str, told: str) -> None:
    screen = talk(greeter, f"/params {words}", "/params")
    assert told in screen
    assert "temperature=0 top_p=1 top_k=0" in screen


def chat_at(terminal_name: str, model: str) -> None:
    """`graftlm chat` at a terminal of its own; runs in a child."""
    os.setsid()
    terminal_file = os.open(terminal_name, os.O_RDWR)  # becomes the controlling terminal: Ctrl-C reaches this process
    for place in range(3):
        os.dup2(terminal_file, place)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TERM"] = "xterm"
    torch.set_num_threads(1)
    sys.argv = ["graftlm", "chat", model, "--max-tokens", "100000"]
    main()


class Keyboard:
    """The other end of a terminal: keys go in, what the screen gets is waited for."""

    def __init__(self, end: int) -> None:
        self.end, self.screen = end, b""

    def press(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def press_until(self, keys: str, is_heard: Callable[[], bool]) -> None:
        """Python's line editor may miss a signal that comes before it waits: a person presses again."""
        for _ in range(15):
            self.press(keys)
            if is_heard():
                return

    def shows(self, words: str, after: int, seconds: float = 10) -> bool:
        """Whether the screen shows `words` behind the place `after` within so many seconds."""
        while self.screen.find(words.encode(), after) < 0:
            if not select.select([self.end], [], [], seconds)[0]:
                return False
            self.read()
        return True

    def wait(self, words: str, after: int = 0) -> int:
        """Until the screen shows `words` behind the place `after`; returns the place behind them."""
        while (found := self.screen.find(words.encode(), after)) < 0:
            self.read()
        return found + len(words.encode())

    def read(self) -> None:
        assert select.select([self.end], [], [], 60)[0], self.screen[-400:].decode(errors="replace")
        self.screen += os.read(self.end, 65536)


def test_keys_at_a_real_terminal(tokenizer, tmp_path: Path) -> None:
    """Pasted lines, stopping, earlier lines brought back, leaving: through a pseudo-terminal, the command itself."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("this Python's line editor marks no pasted text")
    model: Any = new_causal(
        num_rows=tokenizer.num_pieces, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8,
        max_positions=120_000,
    )  # fmt: skip
    model.lm_head.weight.data[tokenizer.eos_id] = 0.0  # some other row is always above: it speaks on and on
    save_causal(model, tmp_path / "model", also=lambda folder: tokenizer.save(folder, chat_template=CARD.jinja))
    end, terminal_file = os.openpty()
    child = in_background(chat_at, os.ttyname(terminal_file), str(tmp_path / "model"))
    keys = Keyboard(end)
    keys.press("/system Be kind.\n/help\nhalf")  # while the model loads: two messages, and the beginning of a third
    place = keys.wait("> /system Be kind.")
    place = keys.wait("System message: Be kind.", place)
    place = keys.wait("> /help", place)
    place = keys.wait("forget the conversation", place)
    place = keys.wait("half", place)
    keys.press(" a line\x15/system off\r")
    place = keys.wait("There is no system message.", place)
    place = keys.wait("> ", place)
    keys.press("\x1b[200~one\ntwo\x1b[201~\r")
    place = keys.wait("\x1b[?2004l", place)  # the line is taken; what follows is the answer
    while len(keys.screen) < place + 40:
        keys.read()
    keys.press("\x03")
    place = keys.wait("(stopped)", place)
    place = keys.wait("> ", place)
    keys.press(f"/save {tmp_path}/talk.jsonl\r")
    place = keys.wait("Kept 2 messages", place)
    said = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert said[0] == {"role": "user", "content": "one\ntwo"}
    assert said[1]["content"]
    place = keys.wait("> ", place)
    keys.press("/params top_k=3\r")
    place = keys.wait("top_k=3 repetition", place)
    place = keys.wait("> ", place)
    keys.press("\x1b[A\r")
    place = keys.wait("top_k=3 repetition", place)
    place = keys.wait("> ", place)
    keys.press("half a line")
    place = keys.wait("half a line", place)  # then it waits: a Ctrl-C before that is lost
    keys.press_until("\x03", lambda: keys.shows("Ctrl-C again", place))
    place = keys.wait("> ", keys.wait("Ctrl-C again", place))
    keys.press_until("\x03", lambda: child.join(2) or child.exitcode is not None)
    assert child.exitcode == 0
    os.close(terminal_file)
    os.close(end)
