"""File forms: what is read, what is refused and how that is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from row_files import alpaca, write_rows

from graftlm.errors import UserError
from graftlm.text.files import open_files, stream_dataset

ROWS = [alpaca(f"question {i}", "", "答案") for i in range(3)]


def read(path: Path | str, **choice: Any) -> list[tuple[str, Any]]:
    """Where each row stands and what it holds, or its problem."""
    return [(row.where, row.problem or row.value) for file in open_files(path, **choice) for row in file.rows]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS), "jsonl"),
        ("rows.json", json.dumps(ROWS), "json"),
        ("rows.json", json.dumps(ROWS, indent=1), "json"),
        ("rows.json", "".join(json.dumps(row) + "\n" for row in ROWS), "jsonl"),
        ("rows.data", "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS), "jsonl"),
        ("rows", json.dumps(ROWS), "json"),
        ("rows.csv", 'instruction,input,output\n"question 0",,答案\nquestion 1,,答案\n\nquestion 2,,答案\n', "csv"),
        ("rows.tsv", "instruction\tinput\toutput\n" + "".join(f"question {i}\t\t答案\n" for i in range(3)), "csv"),
    ],
)
def test_the_same_rows_in_every_form(tmp_path: Path, name: str, content: str, form: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    files = list(open_files(path))
    assert [file.form for file in files] == [form]
    assert [row.value for row in files[0].rows] == ROWS


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert read(path) == [(f"{path}:{i + 1}", row) for i, row in enumerate(ROWS)]
    path = path.rename(tmp_path / "rows.bin")  # known by its first bytes
    assert [file.num_rows for file in open_files(path)] == [3]


def test_nested_parquet_rows_are_read_as_json_would_be(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read(write_parquet(tmp_path / "rows.parquet", [row]))[0][1] == row


def test_csv_fields_may_hold_lines_and_broken_rows_are_told(tmp_path: Path) -> None:
    """B2: a table whose rows have more or fewer fields than its head."""
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output\n"a\nb",c\nonly\nd,e,f\n"g ""h""",i\n', encoding="utf-8")
    problem = "more or fewer fields than the first line names"
    assert read(path) == [
        (f"{path}:2", {"instruction": "a\nb", "output": "c"}),
        (f"{path}:4", problem),
        (f"{path}:5", problem),
        (f"{path}:6", {"instruction": 'g "h"', "output": "i"}),
    ]


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ROWS[:1])
    write_parquet(tmp_path / "a.parquet", ROWS[1:2])
    (tmp_path / "LICENSE").write_text("no rows")
    assert [row["instruction"] for _, row in read(tmp_path)] == ["question 1", "question 0"]


def test_a_pattern_names_files_in_order(tmp_path: Path) -> None:
    """Below a folder whose own name holds a bracket; hidden files and folders are none of its files."""
    shards = tmp_path / "corpus[1]"
    for number, name in enumerate(("part-b.jsonl", "part-a.jsonl", "deep/part-c.jsonl", "deep/.part-d.jsonl", "rest")):
        (shards / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(shards / name, [alpaca(f"question {number}", "", "答案")])
    (shards / "part-folder.jsonl").mkdir()

    def asked(pattern: str) -> list[str]:
        return [row["instruction"][-1] for _, row in read(shards / pattern)]

    assert asked("part-*.jsonl") == ["1", "0"]
    assert asked("**/*.jsonl") == ["2", "1", "0"]
    assert asked("part-[b-z].jsonl") == ["0"]
    with pytest.raises(UserError, match=r"No file matches .*corpus\[1\]/none-\*\."):
        read(shards / "none-*")


def test_a_file_that_exists_is_no_pattern(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows-1.jsonl", ROWS[:1])
    write_rows(tmp_path / "rows-[1].jsonl", ROWS[1:2])
    assert [row for _, row in read(tmp_path / "rows-[1].jsonl")] == ROWS[1:2]


def test_folders_within_a_folder_are_not_read_and_a_pattern_is_told_for_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "deep" / "rows.jsonl", ROWS)
    with pytest.raises(UserError) as told:
        read(tmp_path)
    assert f"'{tmp_path}/**/*.jsonl'" in told.value.fix
    write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    assert [row for _, row in read(tmp_path)] == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(200), "it is a PNG picture"),
        ("rows", b"\xff\xd8\xff\xe0" + bytes(200), "it is a JPEG picture"),
        ("rows.json", b"PK\x03\x04" + bytes(200), "it is a ZIP archive"),
        ("rows.jsonl", b"\x1f\x8b\x08" + bytes(200), "not a whole gzip file"),
        ("rows.txt", "你好".encode("utf-16"), "it is UTF-16"),
        ("rows.jsonl", '{"instruction": "你好", "output": "好"}\n'.encode("gb18030"), "not UTF-8"),
        ("rows.parquet", b"PAR1" + bytes(50), "not a whole Parquet file"),
        ("rows.parquet", b"", "not a whole Parquet file"),
        ("rows.parquet", b"no table at all", "not a whole Parquet file"),
        ("rows.jsonl", None, "cannot be read: No such file"),
    ],
)
def test_a_foreign_file_is_refused_with_its_name(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    """B1 B2: a picture, an archive, other encodings, a truncated table, a missing file."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as told:
        read(path)
    assert problem in told.value.problem
    assert str(path) in told.value.problem
    assert told.value.fix


def test_a_table_cut_off_is_refused_and_one_without_rows_is_empty(tmp_path: Path) -> None:
    """B2: a truncated Parquet file, one with bytes changed inside, one of 0 rows."""
    path = write_parquet(tmp_path / "rows.parquet", ROWS * 500)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a whole Parquet file"):
            read(path)
    empty = pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, path)
    assert read(path) == []


def test_a_folder_without_files_of_rows_is_told(tmp_path: Path) -> None:
    """B2: a folder where a file was meant."""
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        read(tmp_path)


def test_a_hub_id_without_the_hub_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as told:
        read("nobody/no-such-rows")
    assert told.value.problem.startswith("nobody/no-such-rows: no such file, and it could not be fetched")


def test_a_missing_file_in_a_folder_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(UserError, match=r"no-such-folder/rows\.jsonl cannot be read"):
        read("no-such-folder/rows.jsonl")


def test_a_split_of_a_local_file_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="belongs to a hub data set"):
        read(path, split="train")


def test_splits_and_configurations_are_chosen_by_name(tmp_path: Path) -> None:
    """A data set with several of them names what there is; `datasets` reads the folder as it reads the hub's."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for i, name in enumerate(("train", "test")):
        write_rows(folder / f"{name}.jsonl", ROWS[i : i + 1])
    assert list(stream_dataset(str(folder), None, None)) == ROWS[:1]
    assert list(stream_dataset(str(folder), "test", None)) == ROWS[1:2]
    with pytest.raises(UserError, match="no split validation; it has train, test"):
        stream_dataset(str(folder), "validation", None)
    named = (
        f"- config_name: {name}\n  data_files: {file}.jsonl\n" for name, file in (("one", "train"), ("two", "test"))
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(named)}---\n")
    with pytest.raises(UserError, match="2 data sets: one, two"):
        stream_dataset(str(folder), None, None)
    assert list(stream_dataset(str(folder), None, "two")) == ROWS[1:2]
