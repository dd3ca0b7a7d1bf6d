"""The report: characters and bytes per token by tokenizer and file, and its plot."""

from pathlib import Path

import pytest
from small_tokenizers import ENGLISH, sentences, write_lines

from graftlm.errors import UserError
from graftlm.text.tokenizer import load_tokenizer, tokenizer_report


def test_figures_are_characters_and_bytes_per_token(llama_like: Path, llama3_like: Path, tmp_path: Path) -> None:
    files = {"zh": sentences("Han"), "en": ENGLISH}
    paths = {name: write_lines(tmp_path / f"{name}.txt", lines) for name, lines in files.items()}
    found = tokenizer_report([llama_like, llama3_like], list(paths.values()))
    for folder in (llama_like, llama3_like):
        tokenizer = load_tokenizer(folder)
        assert found["num_pieces"][str(folder)] == tokenizer.num_pieces
        for name, lines in files.items():
            num_tokens = sum(map(len, tokenizer.encode_batch(lines)))
            assert found["num_tokens"][str(folder)][paths[name]] == num_tokens
            assert found["chars_per_token"][str(folder)][paths[name]] == round(sum(map(len, lines)) / num_tokens, 4)
            num_bytes = sum(len(line.encode()) for line in lines)
            assert found["bytes_per_token"][str(folder)][paths[name]] == round(num_bytes / num_tokens, 4)
    assert "plot" not in found


@pytest.mark.parametrize(("ending", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_plot(llama_like: Path, tmp_path: Path, ending: str, magic: bytes) -> None:
    text = write_lines(tmp_path / "en.txt", ENGLISH)
    plot = tmp_path / "new" / f"compression{ending}"
    assert tokenizer_report([llama_like], [text], plot)["plot"] == str(plot)
    assert plot.read_bytes().startswith(magic)


def test_what_cannot_be_measured_is_told(llama_like: Path, tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "empty.txt", ["", ""])
    text = write_lines(tmp_path / "en.txt", ENGLISH)
    with pytest.raises(UserError, match="no text to measure on"):
        tokenizer_report([llama_like], [])
    with pytest.raises(UserError, match="holds no text"):
        tokenizer_report([llama_like], [empty])
    with pytest.raises(UserError, match=r"\.svg, \.png or \.pdf"):
        tokenizer_report([llama_like], [text], tmp_path / "plot.txt")
