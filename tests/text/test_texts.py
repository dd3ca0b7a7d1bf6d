"""Plain texts out of any file."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.texts import read_texts


def test_lines_of_text_and_strings_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n二\n", encoding="utf-8")
    row = {"id": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": 3}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + '\n"said"\n', encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"instruction": "q", "output": ["r", {"more": "s"}]}]))
    assert list(read_texts(tmp_path)) == ["one", "", "二", "a\nb", "said", "q\nr\ns"]


def test_a_row_that_is_not_json_is_told_with_its_line(tmp_path: Path) -> None:
    """B2: text to learn from must be whole."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "b"}\n{"a": \n')
    with pytest.raises(UserError, match=f"{path}:2: not JSON"):
        list(read_texts(path))


def test_a_deeply_nested_row_is_read_without_recursion(tmp_path: Path) -> None:
    """B8: as deep as JSON itself may be read."""
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 800 + '"deep"' + "]" * 800 + "\n")
    assert list(read_texts(path)) == ["deep"]
