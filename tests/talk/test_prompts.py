"""Prompts a person brings: every form, and what is said about the others."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.talk.prompts import conversation_of, load_conversation, read_prompts, save_conversation


@pytest.mark.parametrize(
    "value",
    ["hi", {"prompt": "hi"}, {"instruction": "hi", "input": ""}, {"instruction": "hi", "input": None, "output": "x"},
     {"messages": [{"role": "user", "content": "hi"}]}],
)  # fmt: skip
def test_every_form_asks_the_same(value) -> None:
    assert [(m.role, m.content) for m in conversation_of(value).messages] == [("user", "hi")]


@pytest.mark.parametrize(
    ("value", "told"),
    [(3, "a number, expected"), ({}, "none of the keys"), ({"prompt": None}, "prompt is null, expected text"),
     ({"prompt": " "}, "asks nothing"), ({"messages": {}}, "messages is an object, expected a list"),
     ({"messages": []}, "asks nothing"),
     ({"messages": [{"role": "text", "content": "x"}]}, "message 1 needs a role of system, user, assistant"),
     ({"prompt": "\ud800"}, "half a character")],
)  # fmt: skip
def test_what_is_wrong_is_said(value, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        conversation_of(value)


def test_lines_are_numbered_and_bad_bytes_told(tmp_path: Path) -> None:
    """B1, B2: BOM, CRLF, GBK, broken and deep JSON."""
    file = tmp_path / "p.jsonl"
    lines = [
        b'\xef\xbb\xbf{"prompt": "a"}\r',
        b"",
        '{"prompt": "你"}'.encode("gbk"),
        b'{"prompt": ',
        b"[" * 100_000,
        b"9" * 5000,
    ]
    file.write_bytes(b"\n".join(lines))
    rows = list(read_prompts(file))
    assert [row.line for row in rows if row.conversation is not None] == [1]
    assert [(row.line, row.problem) for row in rows[1:]] == [
        (3, "not UTF-8 (byte 12)"), (4, "not JSON"), (5, "not JSON"), (6, "not JSON")
    ]  # fmt: skip


def test_an_empty_or_foreign_file_is_no_conversation(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("")
    with pytest.raises(UserError, match="is empty"):
        load_conversation(file)
    file.write_text(json.dumps({"recipe": 1}))
    with pytest.raises(UserError, match=":1 has none of the keys"):
        load_conversation(file)
    file.write_text("import json\n\nprint(1)\n")
    with pytest.raises(UserError, match="x:1 not JSON, and no other of its 2 rows is a conversation"):
        load_conversation(file)


def test_a_place_that_holds_or_takes_no_conversation_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*nope\.\nGive one that /save wrote"):
        load_conversation(tmp_path / "nope")
    said = conversation_of("hi")
    with pytest.raises(UserError, match="There is no folder"):
        save_conversation(said, tmp_path / "nope" / "a.json")
    with pytest.raises(UserError, match=r"/proc takes no files\."):
        save_conversation(said, Path("/proc/a.json"))
