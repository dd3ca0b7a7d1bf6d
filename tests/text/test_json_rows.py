"""Rows out of JSON, and bounds on hostile JSON."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.json_rows import json_array, json_lines


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_an_element_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{"a": "x\ny"}, {"b": [1, {"c": "啊"}]}, "text"]
    for layout in (json.dumps(rows, indent=2), json.dumps(rows), "\ufeff" + json.dumps(rows)):
        path = written(tmp_path / "rows.json", layout)
        found = list(json_array(path))
        assert [row.value for row in found] == rows
        assert [row.where for row in found] == [f"{path} item {number}" for number in (1, 2, 3)]
    assert list(json_array(written(path, "[]"))) == []
    one = list(json_array(written(path, '{\n "a": 1\n}\n')))
    assert [(row.where, row.value) for row in one] == [(f"{path}:1", {"a": 1})]
    assert list(json_array(written(path, " \n"))) == []


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('[{"a": 1},\n{"a": 2}', 2, "item 2: not whole JSON (it ends in the middle"),
        ('[{"a": 1},\n', 1, "it ends in the middle"),
        ('[{"a": 1},\n{"a": }]', 2, "not whole JSON"),
        ('[{"a": 1}\n{"a": 2}]', 1, "expected , or ]"),
        ('[{"a": 1}] [', 1, "more follows"),
        ("[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_an_array_that_is_not_whole_is_refused_with_its_line(
    tmp_path: Path, content: str, where: int, what: str
) -> None:
    """B2 B8: truncated or broken arrays, a depth bomb."""
    path = written(tmp_path / "rows.json", content)
    with pytest.raises(UserError) as told:
        list(json_array(path))
    assert told.value.problem.startswith(f"{path}:{where}: ")
    assert what in told.value.problem
    assert "jsonl" in told.value.fix


def test_a_field_given_twice_is_a_problem_of_that_row_only(tmp_path: Path) -> None:
    """B8: duplicate keys, also deep inside."""
    content = '{"a": 1, "a": 2}\n{"b": [{"c": 1, "c": 1}]}\n{"a": 1}\n'
    found = list(json_lines(written(tmp_path / "rows.jsonl", content)))
    assert [row.problem for row in found] == ["a field given twice", "a field given twice", ""]
    array = f"[{','.join(content.splitlines())}]"
    assert [row.problem for row in json_array(written(tmp_path / "a.json", array))] == [row.problem for row in found]


def test_one_broken_line_among_utf8_is_a_problem_of_that_row(tmp_path: Path) -> None:
    """B1: one line of another encoding; a file whose first text is of another encoding is refused."""
    good, bad = '{"a": "你好"}\n'.encode(), '{"a": "你好"}\n'.encode("gb18030")
    found = list(json_lines(written(tmp_path / "rows.jsonl", good + bad + good)))
    assert [row.problem for row in found] == ["", "not UTF-8", ""]
    with pytest.raises(UserError, match="GB18030"):
        list(json_lines(written(tmp_path / "rows.jsonl", bad + good)))


def test_a_number_of_a_million_digits_costs_nothing(tmp_path: Path) -> None:
    """B8: huge integers, in a row and in an array."""
    found = list(json_lines(written(tmp_path / "rows.jsonl", '{"a": ' + "9" * 1_000_000 + "}\n")))
    assert found[0].value == {"a": float("inf")}
    assert next(json_array(written(tmp_path / "rows.json", "[" + "9" * 1_000_000 + "]"))).value == float("inf")
