"""Lines: encodings and where things stand."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.lines import documents, read_lines


def test_lines_come_without_their_ends_and_the_file_without_its_mark(tmp_path: Path) -> None:
    """B1: byte order mark and CRLF."""
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff一\r\n二\u2028三\n\n四".encode())
    assert list(read_lines(path)) == ["一", "二\u2028三", "", "四"]


def test_gbk_is_told_with_the_command_that_converts_it(tmp_path: Path) -> None:
    """B1: a GBK file."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"plain\n" + "你好\n".encode("gb18030"))
    with pytest.raises(UserError) as told:
        list(read_lines(path))
    assert f"{path}:2: not UTF-8 (byte 0xc4); it reads as GB18030" in told.value.problem
    assert told.value.fix == f"Convert it: iconv -f GB18030 -t UTF-8 {path} > text.utf8.txt"


def test_what_is_neither_is_not_called_gbk(tmp_path: Path) -> None:
    """B1: bytes that are no text of either encoding."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError) as told:
        list(read_lines(path))
    assert "iconv" not in told.value.fix


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(read_lines(tmp_path / "none.txt"))


def test_documents_stand_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\na\nb\n \nc", encoding="utf-8")
    assert [(row.where, row.value) for row in documents(path)] == [(f"{path}:2", "a\nb"), (f"{path}:5", "c")]
