"""A first look at files before anything is made of them: are they there, readable, UTF-8, of a format we know?

Owns what can be told in seconds from the first rows of each file, so that hours of work do not end at its second
step. Does not read files whole: a row broken further down is found, and told, by the step that reads it. Data sets of
the hub are left to that step too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from graftlm.errors import UserError
from graftlm.recipe import Source
from graftlm.recipe_values import looks_like_hub_id
from graftlm.text.lines import read_lines
from graftlm.text.readers import NUM_ROWS_LOOKED_AT, Reading, read_source
from graftlm.text.tally import Tally
from graftlm.text.texts import read_texts

T = TypeVar("T")


def look_at_dialogues(learned: Sequence[Source], others: Sequence[Source]) -> list[str]:
    """What is wrong with the first rows of sources, a line for each: those dialogues are learned from (of these some
    row must be usable, where all were seen), and others."""
    found: list[str] = []
    readings = [_look(source.path, lambda source=source: _first_rows(source), found) for source in learned]
    for source in others:
        _look(source.path, lambda source=source: _first_rows(source), found)
    looked = [reading for reading in readings if reading is not None]
    if looked and len(looked) == len(learned) and all(_is_useless(reading) for reading in looked):
        dropped = Tally()
        for reading in looked:
            dropped.merge(reading.dropped)
        found.append(f"no row of data.sources can be learned from: {dropped.told or 'they are plain texts'}.")
    return found


def look_at_texts(paths: Iterable[str]) -> list[str]:
    """What is wrong with the first rows of files of text, a line for each."""
    found: list[str] = []
    for path in paths:
        _look(path, lambda path=path: list(islice(read_texts(path), NUM_ROWS_LOOKED_AT)), found)
    return found


def look_at_lines(paths: Iterable[str]) -> list[str]:
    """What is wrong with the first lines of files that are read as they stand, a line for each."""
    found: list[str] = []
    for path in paths:
        _look(path, lambda path=path: list(islice(read_lines(path), NUM_ROWS_LOOKED_AT)), found)
    return found


def _look(path: str, look: Callable[[], T], found: list[str]) -> T | None:
    if looks_like_hub_id(path) and not Path(path).exists():
        return None
    try:
        return look()
    except UserError as error:
        problem = f"{error.problem} {error.fix}"
        if problem not in found:
            found.append(problem)
        return None


def _first_rows(source: Source) -> Reading:
    return read_source(source, is_first_look=True)


def _is_useless(reading: Reading) -> bool:
    """Whether all rows of a source were seen, and none is a dialogue."""
    is_whole = reading.num_rows < NUM_ROWS_LOOKED_AT
    return is_whole and not any(found.messages[0].role != "text" for found in reading.conversations)
