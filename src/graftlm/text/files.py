"""Rows out of files: JSON, JSON lines, Parquet, CSV, plain text, folders of them, data sets of the hub.

Owns file forms, encodings and where each row stands (`file:line`; Parquet and the hub have no lines, there the row's
number). Does not know what a row means: `readers` makes dialogues of rows, `texts` plain texts. A file that is not
whole is refused; a row that is not whole is handed on with its problem, so that it can be counted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.errors import UserError
from graftlm.recipe import looks_like_hub_id

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""What is read out of a folder. A file named by itself may have any suffix: its first bytes tell its form."""

COUNTED_BYTES = 20_000_000
"""From this size on it pays to count a file's lines first, so that progress can tell the time left."""

_FOREIGN = (
    (b"\x89PNG", "a PNG picture"), (b"\xff\xd8\xff", "a JPEG picture"), (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"), (b"PK\x03\x04", "a ZIP archive"), (b"\x1f\x8b", "a gzip archive: gunzip it first"),
    (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip
_LONGEST_NUMBER = 300

Form = Literal["jsonl", "json", "parquet", "csv", "text", "hub"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands, what it holds, or what is wrong with it."""

    where: str
    value: Any
    problem: str = ""


@dataclass(frozen=True, slots=True)
class File:
    """One file or hub data set; `num_rows` is known for Parquet and for large files of lines."""

    name: str
    form: Form
    rows: Iterator[Row]
    num_rows: int | None = None


def open_files(path: str | Path, *, split: str | None = None, config: str | None = None) -> Iterator[File]:
    """The file at `path`, the files in a folder by name, or a hub data set's split.

    The rows of plain text are its documents: blocks between blank lines. Raises UserError: missing, foreign or not
    whole, told at the latest when the rows are read.
    """
    file = Path(path)
    if not file.exists() and looks_like_hub_id(str(path)):
        yield _hub_file(str(path), split, config)
    elif file.is_dir():
        found = sorted(one for one in file.iterdir() if one.suffix.lower() in SUFFIXES and one.is_file())
        if not found:
            raise UserError(f"{file} holds no {', '.join(SUFFIXES)} file.", "Give a folder of such files, or one file.")
        for one in found:
            yield _open(one)
    else:
        yield _open(file)


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends. Raises UserError for a missing file or another encoding."""
    for number, raw in _raw_lines(Path(path)):
        try:
            yield _decoded(raw, number)
        except UnicodeDecodeError as error:
            raise _not_utf8(Path(path), number, error) from None


def _open(path: Path) -> File:
    form = _form_of(path)
    if form == "parquet":
        return _parquet_file(path)
    rows = {"jsonl": _json_lines, "json": _json_array, "csv": _csv_rows, "text": _documents}[form](path)
    return File(str(path), form, rows, _count_lines(path) if form == "jsonl" else None)


def _form_of(path: Path) -> Form:
    """By suffix where that decides, else by the first bytes. Raises UserError for what is none of them."""
    try:
        with path.open("rb") as stream:
            head = stream.read(65_536)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the path of an existing file.") from None
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    for mark, what in _FOREIGN:
        if head.startswith(mark):
            fix = "Convert it: iconv -f UTF-16 -t UTF-8" if what == "UTF-16" else f"Give {', '.join(SUFFIXES)} files."
            raise UserError(f"{path} is no text of rows: it is {what}.", fix)
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix == ".txt" or (suffix != ".json" and first[:1] not in (b"{", b"[")):
        return "text"
    # Many a `.json` holds one object a line, and an object may be spread over lines.
    return "jsonl" if first[:1] == b"{" and _is_object(first.split(b"\n", 1)[0]) else "json"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        # Longer than what was looked at: an object that long on one line is one of many.
        return len(line) > 60_000


# --------------------------------------------------------------------------------------------------- lines and encoding


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the path of an existing file.") from None


def _decoded(raw: bytes, number: int) -> str:
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> UserError:
    try:
        error.object.decode("gb18030")
        found = "it reads as GB18030, as older Chinese files do"
        fix = f"Convert it: iconv -f GB18030 -t UTF-8 {path} > {path.stem}.utf8{path.suffix}"
    except UnicodeDecodeError:
        found, fix = "nor is it GB18030", "Convert it to UTF-8, or remove that line."
    return UserError(f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); {found}.", fix)


def _count_lines(path: Path) -> int | None:
    if path.stat().st_size < COUNTED_BYTES:
        return None
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


def _documents(path: Path) -> Iterator[Row]:
    block: list[str] = []
    first = 1
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield Row(f"{path}:{first}", "\n".join(block))
            block = []
    if block:
        yield Row(f"{path}:{first}", "\n".join(block))


# ----------------------------------------------------------------------------------------------------------------- JSON


class _Decoder:
    """JSON that tells a field given twice, and does not spend seconds on a number of a million digits."""

    def __init__(self) -> None:
        self._has_twin = False
        decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_number)
        self.whole, self._scan = decoder.decode, decoder.raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self._has_twin |= len(found) != len(pairs)
        return found

    def row(self, where: str, line: str) -> Row:
        """The row of one line."""
        try:
            value = self.whole(line)
        except (ValueError, RecursionError) as error:
            return Row(where, None, _json_problem(error))
        return self._row(where, value)

    def element(self, where: str, text: str, start: int) -> tuple[Row, int]:
        """The row starting at `start` and where it ends. Raises ValueError, RecursionError."""
        value, end = self._scan(text, start)
        return self._row(where, value), end

    def _row(self, where: str, value: Any) -> Row:
        has_twin, self._has_twin = self._has_twin, False
        return Row(where, None, "a field given twice") if has_twin else Row(where, value)


def _number(digits: str) -> float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")


def _json_problem(error: Exception) -> str:
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "not JSON"


def _json_lines(path: Path) -> Iterator[Row]:
    decoder = _Decoder()
    has_seen_utf8 = False
    for number, raw in _raw_lines(path):
        try:
            line = _decoded(raw, number)
        except UnicodeDecodeError as error:
            if not has_seen_utf8:
                raise _not_utf8(path, number, error) from None
            yield Row(f"{path}:{number}", None, "not UTF-8")  # one broken line in a file that is otherwise whole
            continue
        has_seen_utf8 |= not line.isascii()
        if line.strip():
            yield decoder.row(f"{path}:{number}", line)


def _json_array(path: Path) -> Iterator[Row]:
    """The elements of one JSON array, each where it begins; a single object is one row."""
    text = "\n".join(read_lines(path))
    decoder = _Decoder()
    line = 1
    position = counted = 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    try:
        position = skip(position)
        is_array = text[position : position + 1] == "["
        position = skip(position + is_array)
        is_done = is_array and text[position : position + 1] == "]"
        while position < len(text) and not is_done:
            line += text.count("\n", counted, position)
            counted = position
            row, position = decoder.element(f"{path}:{line}", text, position)
            yield row
            position = skip(position)
            found = text[position : position + 1]
            is_done = found == "]" if is_array else position == len(text)
            if not is_done and (found != "," or not is_array):
                raise ValueError(f"expected , or ] at character {position}, found {found!r}")
            position = position if is_done else skip(position + 1)
        if not is_done and (is_array or text.strip()):
            raise ValueError("it ends in the middle")
        if is_array and text[position + 1 :].strip():
            raise ValueError("more follows after its end")
    except (ValueError, RecursionError) as error:
        what = "JSON nested too deeply" if isinstance(error, RecursionError) else f"not whole JSON ({error})"
        fix = "Mend the file, or give one row a line as .jsonl: then a broken row is left out and counted."
        raise UserError(f"{path}:{line}: {what}.", fix) from None


# -------------------------------------------------------------------------------------------------- tables and the hub


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the names in the first line; a field may hold line ends between quotes."""
    lines = csv.reader(
        (f"{line}\n" for line in read_lines(path)), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    names: list[str] | None = None
    while True:
        where = f"{path}:{lines.line_num + 1}"
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(where, None, f"not CSV ({error})")
            continue
        if names is None:
            names = fields
        elif len(fields) != len(names) and fields:
            yield Row(where, None, "more or fewer fields than the first line names")
        elif fields:
            yield Row(where, dict(zip(names, fields, strict=True)))


def _parquet_file(path: Path) -> File:
    import pyarrow
    import pyarrow.parquet

    def broken(error: Exception) -> UserError:
        return UserError(f"{path}: not a whole Parquet file ({error}).", "Copy or download it again.")

    def rows() -> Iterator[Any]:
        try:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise broken(error) from None

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise broken(error) from None
    return File(str(path), "parquet", _numbered(str(path), rows()), file.metadata.num_rows)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(rows, start=1):
        yield Row(f"{name}:{number}", value)


def _hub_file(name: str, split: str | None, config: str | None) -> File:
    def rows() -> Iterator[Any]:
        try:
            yield from stream_dataset(name, split, config)
        except UserError:
            raise
        except Exception as error:  # the hub client raises many unrelated kinds
            raise UserError(
                f"{name}: no such file, and it could not be fetched as a hub data set ({type(error).__name__}).",
                "Check the path, or the id and the network; a gated data set needs `hf auth login`.",
            ) from error

    return File(name, "hub", _numbered(name, rows()))


def stream_dataset(name: str, split: str | None, config: str | None) -> Iterable[Any]:
    """The rows of one split of a data set: `split`, else its train split, else its only one.

    Raises UserError naming what there is to choose from; else whatever the hub client raises.
    """
    from datasets import get_dataset_config_names, load_dataset

    if config is None:
        configs = get_dataset_config_names(name)
        if len(configs) > 1 and "default" not in configs:
            raise UserError(
                f"{name} holds {len(configs)} data sets: {', '.join(sorted(configs)[:20])}.",
                "Choose one: `config: NAME` beside the path in a recipe, --config NAME for graftlm data.",
            )
    splits = load_dataset(name, config, streaming=True)
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if (split or "train") not in splits:
        raise UserError(
            f"{name} has no split {split or 'train'}; it has {', '.join(map(str, splits))}.",
            "Choose one: `split: NAME` beside the path in a recipe, --split NAME for graftlm data.",
        )
    return splits[split or "train"]
