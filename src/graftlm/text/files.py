"""Rows out of files: JSON, JSON lines, Parquet, CSV, plain text, packed or not, folders of them, data sets of the hub.

Owns file forms and where each row stands (`file:line`; in a JSON array `file item N`; Parquet and the hub have no
lines, there the row's number). Does not know what a row means: `readers` makes dialogues of rows, `texts` plain
texts. A file that is not whole is refused; a row that is not whole is handed on with its problem, so that it can be
counted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.errors import UserError
from graftlm.recipe_values import files_named, is_pattern, looks_like_hub_id
from graftlm.text.json_rows import json_array, json_lines
from graftlm.text.lines import Row, documents, read_lines
from graftlm.text.unpacked import inner_name, packing_of, unpacked, unpacking_command

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""What is read out of a folder, packed (`.gz`, `.zst`) or not. A file named by itself may have any suffix: its first
bytes tell its form."""

COUNTED_BYTES = 20_000_000
"""From this size on it pays to count a file's lines first, so that progress can tell the time left."""

_FOREIGN = (
    (b"\x89PNG", "a PNG picture"), (b"\xff\xd8\xff", "a JPEG picture"), (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"), (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "packed twice"), (b"\x28\xb5\x2f\xfd", "packed twice"),
    (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip

Form = Literal["jsonl", "json", "parquet", "csv", "text", "hub"]


@dataclass(frozen=True, slots=True)
class File:
    """One file or hub data set; `num_rows` is known for Parquet and for large files of lines that are not packed."""

    name: str
    form: Form
    rows: Iterator[Row]
    num_rows: int | None = None


def open_files(path: str | Path, *, split: str | None = None, config: str | None = None) -> Iterator[File]:
    """The file at `path`, the files in a folder (not in folders within it) or those a pattern names, each by name, or
    a hub data set's split.

    The rows of plain text are its documents: blocks between blank lines. Raises UserError: missing, foreign or not
    whole, told at the latest when the rows are read.
    """
    file = Path(path)
    if file.exists() and (split or config):
        raise UserError(
            f"{file} lies on this disk, and a split or config belongs to a hub data set.", "Leave them out."
        )
    if not file.exists() and looks_like_hub_id(str(path)):
        yield _hub_file(str(path), split, config)
    elif file.is_dir():
        found = sorted(one for one in file.iterdir() if _is_of_rows(one) and one.is_file())
        if not found:
            fix = f"Give a folder of such files, one file, or a pattern: '{file}/**/*.jsonl' looks in folders below it."
            raise UserError(f"{file} holds no {', '.join(SUFFIXES)} file.", fix)
        yield from map(_open, found)
    elif is_pattern(file):
        if not (found := files_named(file)):
            fix = "Mend the pattern: * is any part of a name, ** any number of folders."
            raise UserError(f"No file matches {file}.", fix)
        yield from map(_open, found)
    else:
        yield _open(file)


def _is_of_rows(path: Path) -> bool:
    return inner_name(path).suffix.lower() in SUFFIXES


def _open(path: Path) -> File:
    form = _form_of(path)
    if form == "parquet":
        return _parquet_file(path)
    rows = {"jsonl": json_lines, "json": json_array, "csv": _csv_rows, "text": documents}[form](path)
    return File(str(path), form, rows, _count_lines(path) if form == "jsonl" else None)


def _form_of(path: Path) -> Form:
    """By suffix (of a packed file the one before it) where that decides, else by the first bytes. Raises UserError for
    what is none of them."""
    with unpacked(path) as stream:
        head = stream.read(65_536)
    suffix = inner_name(path).suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        if command := unpacking_command(path):
            fix = f"Unpack it: {command} > {inner_name(path).name}"
            raise UserError(f"{path} is a packed Parquet file, which cannot be read as it comes.", fix)
        return "parquet"
    for mark, what in _FOREIGN:
        if head.startswith(mark):
            fix = "Convert it: iconv -f UTF-16 -t UTF-8" if what == "UTF-16" else f"Give {', '.join(SUFFIXES)} files."
            raise UserError(f"{path} is no text of rows: it is {what}.", fix)
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is no text of rows: it is a tar archive.", f"Unpack it: tar -xf {path}")
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


def _count_lines(path: Path) -> int | None:
    if path.stat().st_size < COUNTED_BYTES or packing_of(path):
        return None
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the names in the first line; a field may hold line ends between quotes."""
    lines = csv.reader(
        (f"{line}\n" for line in read_lines(path)), delimiter="\t" if inner_name(path).suffix.lower() == ".tsv" else ","
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
