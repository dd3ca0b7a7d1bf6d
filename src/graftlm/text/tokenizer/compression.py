"""How many characters and bytes a token holds, by tokenizer and by text.

Owns the measure and its plot. Does not judge: a tokenizer with longer pieces has more rows to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.run import disk_errors, progress
from graftlm.text.texts import read_texts
from graftlm.text.tokenizer.load import load_tokenizer
from graftlm.text.tokenizer.tokenizer import Tokenizer

_TEXTS_AT_A_TIME = 2000


def tokenizer_report(
    tokenizers: Sequence[str | Path], texts: Sequence[str], plot: Path | None = None
) -> dict[str, Any]:
    """`chars_per_token` and `bytes_per_token` by tokenizer, then by file, and the sizes behind them.

    No control tokens are counted. With `plot`, bars of characters per token are drawn into that SVG, PNG or PDF file.
    Raises UserError when a file is missing, empty or holds other bytes than UTF-8, or the plot's ending is unknown.
    """
    if not texts:
        raise UserError("There is no text to measure on.", "Give files with --text, one for each language.")
    if plot is not None and plot.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise UserError(f"{plot}: a plot is written as .svg, .png or .pdf.", "Give --plot another ending.")
    loaded = {str(path): load_tokenizer(path) for path in tokenizers}
    given = {str(path): list(read_texts(path)) for path in texts}
    for path, lines in given.items():
        if not any(lines):
            raise UserError(f"{path} holds no text ({len(lines)} empty lines or rows).", "Give a file that holds text.")
    num_tokens = {
        name: {path: _count_tokens(tokenizer, lines, f"{Path(name).name} on {Path(path).name}")
               for path, lines in given.items()}
        for name, tokenizer in loaded.items()
    }  # fmt: skip
    chars = {path: sum(map(len, lines)) for path, lines in given.items()}
    size_bytes = {path: sum(len(line.encode()) for line in lines) for path, lines in given.items()}
    found = {
        "num_pieces": {name: tokenizer.num_pieces for name, tokenizer in loaded.items()},
        "chars_per_token": _ratios(chars, num_tokens),
        "bytes_per_token": _ratios(size_bytes, num_tokens),
        "num_tokens": num_tokens,
        "num_texts": {path: len(lines) for path, lines in given.items()},
    }
    if plot is not None:
        _draw(found["chars_per_token"], plot)
        found["plot"] = str(plot)
    return found


def _count_tokens(tokenizer: Tokenizer, lines: Sequence[str], label: str) -> int:
    starts = range(0, len(lines), _TEXTS_AT_A_TIME)
    parts = (lines[start : start + _TEXTS_AT_A_TIME] for start in progress(starts, len(starts), label))
    return sum(len(ids) for part in parts for ids in tokenizer.encode_batch(part))


def _ratios(sizes: dict[str, int], num_tokens: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    return {
        name: {path: round(sizes[path] / max(1, count), 4) for path, count in by_file.items()}
        for name, by_file in num_tokens.items()
    }


def _draw(chars_per_token: dict[str, dict[str, float]], plot: Path) -> None:
    """A group of bars for each text, a bar for each tokenizer."""
    from matplotlib.figure import Figure

    names, files = list(chars_per_token), list(next(iter(chars_per_token.values())))
    figure = Figure(figsize=(2.5 + 1.2 * len(files) * max(1, len(names)) ** 0.7, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [index + (number - (len(names) - 1) / 2) * width for index in range(len(files))]
        bars = axes.bar(places, [chars_per_token[name][path] for path in files], width * 0.95, label=_short(name))
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(files)), [Path(path).name for path in files])
    axes.set_ylabel("characters per token")
    axes.set_title("Compression by text and tokenizer")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    with disk_errors(plot.parent):
        plot.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(plot)


def _short(name: str) -> str:
    path = Path(name)
    return "/".join(path.parts[-2:])
