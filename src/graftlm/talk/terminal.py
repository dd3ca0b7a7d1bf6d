"""Talking in a terminal: a conversation of several turns, or one message and out.

Owns commands and what is shown. Does not know how answers are made, nor what keys are pressed (`keyboard`). Reading
and writing are passed in, so that a conversation can be held by a test as well as by a person.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.talk.generate import Chatbot, ask
from graftlm.talk.keyboard import line_editor
from graftlm.talk.prompts import load_conversation, save_conversation
from graftlm.talk.sampling import Sampling
from graftlm.text.dialogue import Conversation, Message

HELP = """\
/reset        forget the conversation
/save FILE    keep it as one line of JSON
/load FILE    go on with a kept one; /load FILE 2 with the second of several
/system TEXT  put a system message before everything; alone it shows it, off removes it
/params       show how answers are drawn; /params temperature=0.7 top_p=0.9 changes it
/help         this list
/quit         leave (Ctrl-D, or Ctrl-C twice, too)
//text        send text that begins with a slash
Several lines pasted at once are one message; the arrow keys bring earlier ones back. Ctrl-C stops an answer."""

# What a model writes could otherwise move the cursor, rename the window or hide text: ESC and its kin.
_TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Talk:
    """One conversation at the terminal."""

    def __init__(
        self, chatbot: Chatbot, sampling: Sampling, system: str, write: Callable[[str], None], is_styled: bool
    ) -> None:
        self.chatbot, self.sampling, self.system = chatbot, sampling, system
        self.write, self.is_styled = write, is_styled
        self.turns: tuple[Message, ...] = ()

    def note(self, text: str) -> None:
        """A line of ours, told apart from what the model says."""
        self.write(f"\x1b[2m{text}\x1b[0m\n" if self.is_styled else f"{text}\n")

    def conversation(self, *more: Message) -> Conversation:
        """All that has been said, the system message first."""
        first = (Message("system", self.system),) if self.system else ()
        return Conversation((*first, *self.turns, *more))

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; returns whether to stay. Raises UserError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.note(HELP)
            case "/reset":
                self.turns = ()
                self.note("The conversation is forgotten." + (" The system message stays." if self.system else ""))
            case "/save":
                self.save(rest)
            case "/load":
                self.load(rest)
            case "/system":
                if rest:
                    self.system = "" if rest == "off" else rest
                self.note(_harmless(f"System message: {self.system}") if self.system else "There is no system message.")
            case "/params":
                if rest:
                    self.sampling = _with_params(self.sampling, rest)
                self.note(" ".join(f"{key}={value:g}" for key, value in asdict(self.sampling).items()))
            case _:
                raise UserError(f"There is no command {name}.", "Type /help; //text sends text that begins with /.")
        return True

    def save(self, name: str) -> None:
        """Keep the conversation in a file. Raises UserError."""
        if not name:
            raise UserError("/save needs a file's name.", "Type: /save talk.jsonl")
        if not self.turns:
            raise UserError("Nothing has been said yet.", "Say something first.")
        save_conversation(self.conversation(), Path(name).expanduser())
        self.note(f"Kept {len(self.turns)} messages in {name}.")

    def load(self, name: str) -> None:
        """Go on with a kept conversation; what was said here is forgotten. Raises UserError."""
        if not name:
            raise UserError("/load needs a file's name.", "Type: /load talk.jsonl")
        file, number = _file_and_number(name)
        messages = load_conversation(file, number).messages
        self.system = "\n\n".join(message.content for message in messages if message.role == "system")
        self.turns = tuple(message for message in messages if message.role != "system")
        self.note(f"Going on after {len(self.turns)} messages.")
        for message in self.turns[-2:]:
            self.note(_harmless(f"{message.role}: {message.content}"))

    def say(self, text: str) -> None:
        """One turn: the question, the answer as it comes. Raises UserError; the question is then forgotten."""
        question = Message("user", text)
        reply = self.chatbot.stream(self.conversation(question), self.sampling)
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
            self.turns = (*self.turns, question, Message("assistant", answer))


def chat_loop(
    chatbot: Chatbot,
    sampling: Sampling,
    read: Callable[[str], str] | None = None,
    write: Callable[[str], None] = _write,
    is_styled: bool | None = None,
    system: str = "",
) -> None:
    """Talk until Ctrl-D, /quit or Ctrl-C twice.

    `read(prompt)` returns a message, or raises EOFError or KeyboardInterrupt; `write` takes pieces of text.
    """
    talk = _Talk(chatbot, sampling, system, write, sys.stdout.isatty() if is_styled is None else is_styled)
    read = read or line_editor()
    talk.note("Type a message; /help lists the commands, Ctrl-D leaves.")
    is_leaving = False  # Ctrl-C was the last thing typed
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            if is_leaving:
                return
            is_leaving = True
            talk.note("Ctrl-C again, Ctrl-D or /quit leaves.")
            continue
        except UserError as error:
            talk.note(f"{error.problem} {error.fix}")
            continue
        is_leaving = False
        if line and not _obey(talk, line):
            return


def _obey(talk: _Talk, line: str) -> bool:
    """A command or a message; returns whether to stay. What goes wrong, or is stopped, is told."""
    try:
        if line.startswith("/") and not line.startswith("//"):
            return talk.command(line)
        talk.say(line[1:] if line.startswith("//") else line)
    except KeyboardInterrupt:  # before the answer began
        talk.write("\n")
        talk.note("(stopped)")
    except UserError as error:
        talk.note(_harmless(f"{error.problem} {error.fix}"))
    return True


def chat_once(chatbot: Chatbot, text: str, sampling: Sampling, system: str = "") -> dict[str, Any]:
    """Answer one message; JSON-ready. Raises UserError when it is empty or does not fit."""
    if not text.strip():
        raise UserError("The message is empty.", "Give some text: graftlm chat MODEL --once TEXT.")
    asked = ask(text)
    if system:
        asked = replace(asked, messages=(Message("system", system), *asked.messages))
    answer = chatbot.answer(asked, sampling)
    return {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "ending": answer.ending,
    }


def _with_params(sampling: Sampling, text: str) -> Sampling:
    """`key=value` words applied to the sampling; each value has the type it had. Raises UserError."""
    known = {field.name: type(getattr(sampling, field.name)) for field in fields(sampling)}
    changed: dict[str, Any] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if key not in known:
            raise UserError(f"There is no parameter {key}.", f"Known: {', '.join(known)}.")
        try:
            changed[key] = known[key](value)
        except ValueError:
            kind = "a whole number" if known[key] is int else "a number"
            raise UserError(f"{key} is {value!r}, expected {kind}.", f"Type: /params {key}=1") from None
    return replace(sampling, **changed)


def _file_and_number(name: str) -> tuple[Path, int | None]:
    """`FILE` or `FILE N`; a file's name may end in a blank and a number itself."""
    file = Path(name).expanduser()
    head, _, last = name.rpartition(" ")
    if head.strip() and last.isdecimal() and not file.exists():
        return Path(head.strip()).expanduser(), int(last)
    return file, None


def _harmless(text: str) -> str:
    return _TERMINAL_CONTROL.sub("", text)
