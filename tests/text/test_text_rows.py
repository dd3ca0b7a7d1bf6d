"""Token rows on disk (`text/rows.py`): read back as written, or refused."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.errors import DiskError, UserError
from graftlm.text import rows_file as rows_file_module
from graftlm.text.dialogue import Rendered
from graftlm.text.rows import RowsBuilder, TokenRows, rows_meta, text_rows
from graftlm.text.rows_file import rows_file, save_rows
from graftlm.text.tokenizer import Tokenizer


def some_rows(tokenizer: Tokenizer, num_rows: int = 5) -> TokenRows:
    builder = RowsBuilder(tokenizer.num_pieces)
    for i in range(num_rows):
        ids = [1, *range(3, 5 + i), 2]
        builder.add(Rendered(ids, [False] + [True] * (len(ids) - 1), 3 * i), f"文件.jsonl:{i}\nx")
    return builder.rows(rows_meta(tokenizer, "template", 64))


def test_rows_come_back_as_they_were(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    rows = some_rows(llama_tokenizer)
    save_rows(rows, tmp_path / "train")
    found = TokenRows.load(tmp_path / "train", tokenizer=llama_tokenizer, template_fingerprint="template")
    assert len(found) == 5
    for i in range(5):
        assert [part.tolist() for part in found.row(i)] == [part.tolist() for part in rows.row(i)]
    assert (found.num_tokens, found.num_targets, found.num_target_bytes) == (30, 25, 30)
    assert found.lengths.tolist() == [4, 5, 6, 7, 8]
    assert found.sources[4] == "文件.jsonl:4 x"
    assert found.ids.dtype == np.uint16
    assert os.listdir(tmp_path) == ["train"]


def test_a_stretch_at_a_time_is_the_same_bytes(
    tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows written as they come are what NumPy saves of all of them at once."""
    monkeypatch.setattr(rows_file_module, "STRETCH_TOKENS", 12)
    rows = some_rows(llama_tokenizer, 30)
    with rows_file(tmp_path / "train", llama_tokenizer.num_pieces, rows.meta) as file:
        for i in range(30):
            ids, is_target = rows.row(i)
            file.add(Rendered(ids.tolist(), is_target.tolist(), int(rows.target_bytes[i])), rows.sources[i])
    for name in ("ids", "is_target", "offsets", "target_bytes"):
        np.save(tmp_path / "whole.npy", getattr(rows, name))
        assert (tmp_path / "train" / f"{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    found = TokenRows.load(tmp_path / "train")
    assert list(found.sources) == list(rows.sources)
    assert (len(found.sources), found.sources[29], found.sources[-1]) == (30, rows.sources[29], rows.sources[29])
    assert found.lengths_of([3, 29, 0]) == rows.lengths[[3, 29, 0]].tolist()
    with pytest.raises(IndexError):
        found.sources[30]


def test_a_folder_of_no_rows_is_whole(tmp_path: Path) -> None:
    with rows_file(tmp_path / "text", 70_000, {}):
        pass
    found = TokenRows.load(tmp_path / "text")
    assert (len(found), found.num_tokens, list(found.sources), found.ids.dtype) == (0, 0, [], np.uint32)


def test_an_error_while_rows_are_written_leaves_nothing(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    def fail() -> None:
        with rows_file(tmp_path / "train", llama_tokenizer.num_pieces, {}) as file:
            file.append(some_rows(llama_tokenizer))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []


def test_large_vocabularies_take_four_bytes() -> None:
    builder = RowsBuilder(70_000)
    builder.add(Rendered([69_999], [True], 1), "x")
    assert builder.rows().ids.tolist() == [69_999]


def test_rows_of_another_tokenizer_or_template_are_refused(
    tmp_path: Path, llama_tokenizer: Tokenizer, byte_tokenizer: Tokenizer
) -> None:
    """The trap: ids kept under a file's name and reused under another tokenizer or template."""
    save_rows(some_rows(llama_tokenizer), tmp_path / "train")
    with pytest.raises(UserError, match="made with another tokenizer"):
        TokenRows.load(tmp_path / "train", tokenizer=byte_tokenizer)
    with pytest.raises(UserError, match="made with another template"):
        TokenRows.load(tmp_path / "train", template_fingerprint="other")


@pytest.mark.parametrize("name", ["ids.npy", "is_target.npy", "offsets.npy", "target_bytes.npy", "sources.txt"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "pickle"])
def test_damaged_rows_are_refused(tmp_path: Path, llama_tokenizer: Tokenizer, name: str, damage: str) -> None:
    """C1 C2 C3 for token rows: truncated, a bit flipped, a file missing, a pickle in its place."""
    save_rows(some_rows(llama_tokenizer), tmp_path / "train")
    path = tmp_path / "train" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":
        np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").rename(path)
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{re.escape(name)} (is missing|has changed)") as told:
        TokenRows.load(tmp_path / "train")
    assert "graftlm run" in told.value.fix


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 2}', "{"])
def test_foreign_meta_is_refused(tmp_path: Path, llama_tokenizer: Tokenizer, meta: str) -> None:
    save_rows(some_rows(llama_tokenizer), tmp_path / "train")
    (tmp_path / "train" / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"damaged|row format"):
        TokenRows.load(tmp_path / "train")


def test_a_folder_that_holds_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no token rows: meta\.json is missing"):
        TokenRows.load(tmp_path)


def test_an_interrupted_or_full_write_leaves_the_old_rows(
    tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1: no space for the new rows; the old ones stay, nothing half-written does."""
    save_rows(some_rows(llama_tokenizer, 2), tmp_path / "train")
    monkeypatch.setattr(rows_file_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DiskError, match=r"need 1\d\d bytes more below .* and 10 are free"):
        save_rows(some_rows(llama_tokenizer, 4), tmp_path / "train")
    monkeypatch.undo()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows_file_module.os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        save_rows(some_rows(llama_tokenizer, 4), tmp_path / "train")
    monkeypatch.undo()
    assert len(TokenRows.load(tmp_path / "train")) == 2
    assert os.listdir(tmp_path) == ["train"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.sampled_from("ab 你好\n</s>é"), max_size=60), max_size=4), max_tokens=st.integers(4, 40)
)
def test_text_rows_hold_every_token_once(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> None:
    """BOS begins every row and is not learned; the text follows in order; only the last row of a text has the end."""
    found = list(text_rows(texts, tokenizer, max_tokens))
    assert len(found) == len(texts)
    for text, rows in zip(texts, found, strict=True):
        assert all(len(row.ids) <= max_tokens for row in rows)
        assert all(row.ids[0] == tokenizer.bos_id and not row.is_target[0] for row in rows)
        assert all(all(row.is_target[1:]) for row in rows)
        assert [i for row in rows for i in row.ids[1:]] == [*tokenizer.encode(text), tokenizer.eos_id]
        assert sum(row.num_target_bytes for row in rows) == len(text.encode())


def test_text_rows_need_room(llama_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        list(text_rows(["a"], llama_tokenizer, 2))


def test_meta_is_readable_json(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    save_rows(some_rows(llama_tokenizer), tmp_path / "train")
    meta = json.loads((tmp_path / "train" / "meta.json").read_text())
    assert (meta["rows"], meta["tokens"], meta["max_tokens"]) == (5, 30, 64)
    assert set(meta["sha256"]) == {"ids.npy", "is_target.npy", "offsets.npy", "target_bytes.npy", "sources.txt"}
