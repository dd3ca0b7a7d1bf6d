"""The first look at files: told in a line for each what is of no use, however far the step is that would read it."""

import json
from pathlib import Path

import pytest

from graftlm.recipe import Source
from graftlm.text.first_look import look_at_dialogues, look_at_lines, look_at_texts
from graftlm.text.readers import NUM_ROWS_LOOKED_AT, read_source


def rows_file(path: Path, rows: list[dict]) -> Source:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


GOOD = [{"instruction": "你好", "output": "好"}]


def test_every_file_of_no_use_is_told(tmp_path: Path) -> None:
    good = rows_file(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "gbk.jsonl").write_bytes(Path(good.path).read_text(encoding="utf-8").encode("gb18030"))
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n")
    foreign = rows_file(tmp_path / "foreign.jsonl", [{"frage": "a"}])
    (tmp_path / "empty.jsonl").touch()
    gbk, picture, empty = (Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("gbk", "picture", "empty"))
    found = look_at_dialogues([good, gbk, picture], [foreign, empty, Source(path="owner/rows"), good])
    told = ("not UTF-8", "it is a PNG picture", "its format cannot be told", "holds no row")
    assert [words in line for words, line in zip(told, found, strict=True)] == [True] * 4
    assert look_at_dialogues([good], [good]) == []


def test_dialogues_of_which_none_is_usable_are_told_where_all_were_seen(tmp_path: Path) -> None:
    useless = rows_file(tmp_path / "useless.jsonl", [{"instruction": "a", "output": ""}] * 2)
    assert look_at_dialogues([useless], []) == ["no row of data.sources can be learned from: an empty answer (2)."]
    assert look_at_dialogues([useless, rows_file(tmp_path / "good.jsonl", GOOD)], []) == []
    many = rows_file(tmp_path / "many.jsonl", [{"instruction": "a", "output": ""}] * NUM_ROWS_LOOKED_AT + GOOD)
    assert look_at_dialogues([many], []) == []
    (tmp_path / "plain.txt").write_text("only text\n")
    assert "they are plain texts" in look_at_dialogues([Source(path=str(tmp_path / "plain.txt"))], [])[0]


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    many = rows_file(tmp_path / "many.jsonl", GOOD * (NUM_ROWS_LOOKED_AT + 5))
    assert read_source(many, is_first_look=True).num_rows == NUM_ROWS_LOOKED_AT
    assert read_source(many).num_rows == NUM_ROWS_LOOKED_AT + 5


@pytest.mark.parametrize("look", [look_at_texts, look_at_lines])
def test_text_of_another_encoding_is_told(tmp_path: Path, look) -> None:
    (tmp_path / "zh.txt").write_text("你好\n", encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes("你好\n".encode("gb18030"))
    found = look([str(tmp_path / name) for name in ("zh.txt", "gbk.txt", "gbk.txt")])
    assert len(found) == 1
    assert "gbk.txt:1: not UTF-8" in found[0]
