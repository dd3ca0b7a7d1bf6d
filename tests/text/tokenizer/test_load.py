"""Loading a base in any of its forms; what is missing, foreign or cut off is told in two lines."""

import json
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer
from graftlm.text.tokenizer import ranks as ranks_module


def test_bare_model_is_exact(llama_like: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    for source in (tmp_path, tmp_path / "tokenizer.model"):
        found = load_tokenizer(source)
        assert found.has_fast_form
        assert found.fingerprint == load_tokenizer(llama_like).fingerprint


@pytest.mark.parametrize("content", [b"", b"not a model" * 20, b"version https://git-lfs.github.com/spec/v1\n"])
def test_foreign_model_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a whole SentencePiece model"):
        load_tokenizer(tmp_path)


def test_truncated_files_are_told(llama_like: Path, tmp_path: Path) -> None:
    """C1: a tokenizer file cut off is refused."""
    whole = (llama_like / "tokenizer.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(whole[: len(whole) // 2 + 1])
    with pytest.raises(UserError, match="cut off"):
        load_tokenizer(tmp_path / "cut.model")
    (tmp_path / "tokenizer.json").write_bytes((llama_like / "tokenizer.json").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole"):
        load_tokenizer(tmp_path)


def test_empty_folder_and_missing_path_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="could not be fetched"):
        load_tokenizer("nobody/nothing")


def test_role_that_is_no_control_token_is_told(llama_like: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((llama_like / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    with pytest.raises(UserError, match="eos_token is '<end>'"):
        load_tokenizer(tmp_path)


def test_a_model_cut_between_two_pieces_is_told(llama_like: Path, tmp_path: Path) -> None:
    """C1: what is left parses, and would load as another tokenizer."""
    whole = (llama_like / "tokenizer.model").read_bytes()
    end_of_piece = 0
    for _ in range(300):  # each piece is a field of its own: a tag byte, a length byte, content
        end_of_piece += 2 + whole[end_of_piece + 1]
    (tmp_path / "tokenizer.model").write_bytes(whole[:end_of_piece])
    with pytest.raises(UserError, match="cut off"):
        load_tokenizer(tmp_path)


def test_byte_level_folder(llama3_like: Path) -> None:
    found = load_tokenizer(llama3_like)
    assert found.is_byte_level
    assert found.has_fast_form
    assert (found.piece(found.bos_id or 0), found.piece(found.eos_id)) == ("<|begin_of_text|>", "<|end_of_text|>")
    for text in ("今天 text", " two  spaces", "", "🙂"):
        assert found.decode(found.encode(text)) == text
        assert b"".join(map(found.token_bytes, found.encode(text))) == text.encode()


def test_tokenizer_without_end_token_is_told(llama3_like: Path, tmp_path: Path) -> None:
    parts = json.loads((llama3_like / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**parts, "added_tokens": []}), encoding="utf-8")
    with pytest.raises(UserError, match="names no end-of-text token") as raised:
        load_tokenizer(tmp_path)
    assert "eos_token" in raised.value.fix


def test_ranks_load_as_file_and_as_llama3s_folder(
    small_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3's own download holds the ranks under the name tokenizer.model."""
    monkeypatch.setattr(ranks_module, "NUM_RANKS", len(small_ranks.read_bytes().splitlines()))
    (tmp_path / "tokenizer.model").write_bytes(small_ranks.read_bytes())
    by_file, by_folder = load_tokenizer(small_ranks), load_tokenizer(tmp_path)
    assert by_file.fingerprint == by_folder.fingerprint
    assert by_file.is_byte_level
    assert by_file.bos_id == ranks_module.NUM_RANKS
