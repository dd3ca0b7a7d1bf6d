"""Talking in a terminal: a conversation of several turns, or one message and out.

Owns commands, keys and what is shown. Does not know how answers are made. Reading and writing are passed in, so
that a conversation can be held by a test as well as by a person.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.talk.answer_file import generate_file
from graftlm.talk.generate import Chatbot, ask
from graftlm.talk.prompts import load_conversation, save_conversation
from graftlm.talk.sampling import Sampling
from graftlm.text.dialogue import Conversation, Message

__all__ = ["chat_loop", "chat_once", "generate_file"]

HELP = """\
/reset        forget the conversation
/save FILE    keep it as one line of JSON
/load FILE    go on with a kept one
/quit         leave (Ctrl-D too)
//text        send text that begins with a slash
Ctrl-C stops an answer."""

# What a model writes could otherwise move the cursor, rename the window or hide text: ESC and its kin.
_TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Talk:
    """One conversation at the terminal."""

    def __init__(self, chatbot: Chatbot, sampling: Sampling, write: Callable[[str], None], is_styled: bool) -> None:
        self.chatbot, self.sampling, self.write, self.is_styled = chatbot, sampling, write, is_styled
        self.conversation = Conversation(())

    def note(self, text: str) -> None:
        """A line of ours, told apart from what the model says."""
        self.write(f"\x1b[2m{text}\x1b[0m\n" if self.is_styled else f"{text}\n")

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; returns whether to stay. Raises UserError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/save", "/load") and not rest:
            raise UserError(f"{name} needs a file's name.", f"Type: {name} talk.jsonl")
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.note(HELP)
            case "/reset":
                self.conversation = Conversation(())
                self.note("The conversation is forgotten.")
            case "/save":
                if not self.conversation.messages:
                    raise UserError("Nothing has been said yet.", "Say something first.")
                save_conversation(self.conversation, Path(rest).expanduser())
                self.note(f"Kept {len(self.conversation.messages)} messages in {rest}.")
            case "/load":
                self.conversation = load_conversation(Path(rest).expanduser())
                self.note(f"Going on after {len(self.conversation.messages)} messages.")
                for message in self.conversation.messages[-2:]:
                    self.note(_harmless(f"{message.role}: {message.content}"))
            case _:
                raise UserError(f"There is no command {name}.", "Type /help; //text sends text that begins with /.")
        return True

    def say(self, text: str) -> None:
        """One turn: the question, the answer as it comes. Raises UserError; the question is then forgotten."""
        asked = replace(self.conversation, messages=(*self.conversation.messages, Message("user", text)))
        reply = self.chatbot.stream(asked, self.sampling)
        if reply.num_dropped_messages:
            self.note(f"(the oldest {reply.num_dropped_messages} messages no longer fit and were left out)")
        said: list[str] = []
        try:
            for piece in reply:
                said.append(piece)
                self.write(_harmless(piece))
        except KeyboardInterrupt:
            reply.close()
            self.write("\n")
            self.note("(stopped)")
        else:
            self.write("\n")
            if reply.ending == "length":
                self.note(f"(cut after {reply.answer_tokens} tokens)")
        answer = "".join(said)
        if answer:
            self.conversation = replace(asked, messages=(*asked.messages, Message("assistant", answer)))


def chat_loop(
    chatbot: Chatbot,
    sampling: Sampling,
    read: Callable[[str], str] | None = None,
    write: Callable[[str], None] = _write,
    is_styled: bool | None = None,
) -> None:
    """Talk until Ctrl-D or /quit. `read(prompt)` returns a line or raises EOFError; `write` takes text as it comes."""
    is_styled = sys.stdout.isatty() if is_styled is None else is_styled
    talk = _Talk(chatbot, sampling, write, is_styled)
    read = read or _line_editor()
    talk.note("Type a message; /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = read("> ").strip()
            if not line:
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not talk.command(line):
                    return
            else:
                talk.say(line[1:] if line.startswith("//") else line)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            talk.note("Ctrl-D or /quit leaves.")
        except UserError as error:
            talk.note(f"{error.problem} {error.fix}")


def chat_once(chatbot: Chatbot, text: str, sampling: Sampling) -> dict[str, Any]:
    """Answer one message; JSON-ready. Raises UserError when it is empty or does not fit."""
    if not text.strip():
        raise UserError("The message is empty.", "Give some text: graftlm chat MODEL --once TEXT.")
    answer = chatbot.answer(ask(text), sampling)
    return {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "ending": answer.ending,
    }


def _harmless(text: str) -> str:
    return _TERMINAL_CONTROL.sub("", text)


def _line_editor() -> Callable[[str], str]:
    """Arrow keys and history where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it is what makes input() editable)
    return _read_line


def _read_line(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError:
        raise UserError("What was typed is not UTF-8.", "Set the terminal's encoding to UTF-8.") from None
