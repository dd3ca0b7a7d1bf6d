"""Packed files: the same rows as unpacked, and what is said of those that are not whole, foreign or endless."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from row_files import alpaca

from graftlm.errors import UserError
from graftlm.text import json_rows, lines
from graftlm.text.files import open_files
from graftlm.text.lines import raw_lines, read_lines
from graftlm.text.texts import read_texts

ROWS = [alpaca(f"question {i}", "", "答案") for i in range(3)]


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
packed = pytest.mark.parametrize("suffix", PACKERS)


def read(path: Path) -> list[tuple[str, Any]]:
    return [(row.where, row.problem or row.value) for file in open_files(path) for row in file.rows]


@packed
@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS), "jsonl"),
        ("rows.json", json.dumps(ROWS, indent=1), "json"),
        ("rows.json", "".join(json.dumps(row) + "\n" for row in ROWS), "jsonl"),
        ("rows", json.dumps(ROWS), "json"),
        ("rows.csv", "instruction,input,output\n" + "".join(f"question {i},,答案\n" for i in range(3)), "csv"),
        ("rows.tsv", "instruction\tinput\toutput\n" + "".join(f"question {i}\t\t答案\n" for i in range(3)), "csv"),
    ],
)
def test_the_same_rows_as_unpacked(tmp_path: Path, name: str, content: str, form: str, suffix: str) -> None:
    """The form is told by the suffix before that of the packing, else by the first bytes within."""
    plain, path = tmp_path / name, tmp_path / f"{name}{suffix}"
    plain.write_text(content, encoding="utf-8")
    path.write_bytes(PACKERS[suffix](content.encode()))
    assert [file.form for file in open_files(path)] == [form]
    assert read(path) == [(where.replace(str(plain), str(path)), row) for where, row in read(plain)]
    bare = path.rename(tmp_path / "bare.jsonl") if form == "jsonl" else path
    assert [row for _, row in read(bare)] == ROWS  # the first bytes tell of the packing, not the name


@packed
def test_text_is_read_as_lines_and_a_folder_holds_packed_files(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"text.txt{suffix}").write_bytes(PACKERS[suffix]("一\n二\n\n三".encode()))
    assert list(read_texts(tmp_path)) == ["一", "二", "", "三"]
    assert [row for _, row in read(tmp_path)] == ["一\n二", "三"]


@packed
def test_several_packed_parts_in_one_file_are_all_read(tmp_path: Path, suffix: str) -> None:
    """As `cat a.gz b.gz` writes them."""
    path = tmp_path / f"rows.txt{suffix}"
    path.write_bytes(PACKERS[suffix](b"one\n") + PACKERS[suffix](b"two\n"))
    assert list(read_lines(path)) == ["one", "two"]


@packed
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-3],
        lambda whole: whole[:40] + bytes(20) + whole[60:],
        lambda whole: whole[:4],
        lambda whole: whole + b"more that is not packed",
    ],
    ids=["half", "end cut off", "changed inside", "begun", "more behind"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    """B2: a download that stopped, or bytes that changed."""
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = PACKERS[suffix]("".join(json.dumps(alpaca(f"{i**5}", "", "b")) + "\n" for i in range(500)).encode())
    path.write_bytes(damage(whole))
    with pytest.raises(UserError, match=r"not a whole (gzip|Zstandard) file") as told:
        read(path)
    assert str(path) in told.value.problem
    assert "-dc" in told.value.fix


@packed
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "it is a PNG picture"),
        (gzip.compress(b"{}"), "it is packed twice"),
        (b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(248), "it is a tar archive"),
        (b"PAR1" + bytes(50), "is a packed Parquet file"),
        ("你好".encode("utf-16"), "it is UTF-16"),
    ],
    ids=["png", "gzip", "tar", "parquet", "utf-16"],
)
def test_foreign_content_is_refused(tmp_path: Path, suffix: str, content: bytes, problem: str) -> None:
    """B1 B2: what is packed is looked at as a plain file is."""
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](content))
    with pytest.raises(UserError) as told:
        read(path)
    assert problem in told.value.problem
    assert str(path) in told.value.problem


@packed
def test_a_name_that_promises_a_packing_is_held_to_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    for content, told in (b"", "is empty"), (b'{"text": "plain"}\n', f"is named {suffix} and is not packed so"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=told):
            read(path)


def test_another_encoding_is_told_with_the_command_that_unpacks_and_converts(tmp_path: Path) -> None:
    """B1: a GBK file, packed."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("你好\n".encode("gb18030")))
    with pytest.raises(UserError) as told:
        list(read_lines(path))
    assert told.value.fix == f"Convert it: gzip -dc {path} | iconv -f GB18030 -t UTF-8 > text.utf8.txt"


def test_a_long_line_and_a_large_array_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"one\n" + b"x" * 100))
    assert len(list(raw_lines(path, longest_bytes=100))) == 2
    with pytest.raises(UserError, match=r"rows\.json\.gz:2: a line of more than 99 bytes"):
        list(raw_lines(path, longest_bytes=99))
    path.write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    monkeypatch.setattr(json_rows, "LARGEST_ARRAY_BYTES", 100)
    with pytest.raises(UserError, match="a JSON array is read whole"):
        read(path)


def test_an_endless_line_is_not_unpacked_into_memory(tmp_path: Path) -> None:
    """A file of 1 MB that unpacks to 1 GB without a line end; reading it may take a tenth of that."""
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(256):
            stream.write(bytes(2**22))
    code = """
import re, sys
from pathlib import Path
from graftlm.errors import UserError
from graftlm.text import lines
def held(name): return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = held("VmRSS")
try: list(lines.raw_lines(Path(sys.argv[1]), longest_bytes=2**24))
except UserError as error: print(error.problem)
print(held("VmHWM") - before)
"""
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    problem, kib = told.stdout.splitlines()
    assert "a line of more than 16,777,216 bytes" in problem
    assert int(kib) < 100_000
    assert lines.LONGEST_LINE_BYTES <= 2**28
