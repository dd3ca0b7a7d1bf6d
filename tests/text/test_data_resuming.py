"""The data step killed anywhere ends, when it is begun again, in the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from row_files import alpaca, write_rows

from graftlm.recipe import Data
from graftlm.step import Order, Step
from graftlm.text import corpus
from graftlm.text.corpus import prepare_data
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import Tokenizer

KILLED = """
import importlib, json, os, signal, sys
from pathlib import Path
from graftlm.recipe import Data
from graftlm.text.corpus import prepare_data
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import load_tokenizer
section, tokenizer, out, module, owner, name, number = sys.argv[1:]
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
real, calls = getattr(place, name), 0
def planted(*given, **named):
    global calls
    calls += 1
    if calls == int(number): os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(place, name, planted)
prepare_data(Data.model_validate(json.loads(section)), load_tokenizer(tokenizer), CARD, Path(out))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """All that is left of a step, but its shelf."""
    names = (file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0] != corpus.SHELF)
    return {str(file.relative_to(folder)): file.read_bytes() for file in names}


def section_of(folder: Path) -> Data:
    rows = [alpaca(f"question {i}", "", "答案" * 9 + str(i)) for i in range(60)]
    rows += [*rows[:3], alpaca("question 70", "", ""), alpaca("long", "", "长" * 3000)]
    return Data.model_validate(
        {"sources": [{"path": str(write_rows(folder / "rows.jsonl", rows))}], "heldout_rows": 4, "max_tokens": 400}
    )


@pytest.mark.parametrize(
    ("place", "is_filled"),
    [
        (("graftlm.text.shelf", "Shelf", "put", "30"), False),
        (("graftlm.text.corpus", "", "drop_near_duplicates", "1"), False),
        (("graftlm.text.shelf", "", "write_json", "1"), False),
        (("graftlm.text.rows_file", "RowsFile", "add", "20"), True),
        (("graftlm.text.rows_file", "RowsFile", "finish", "2"), True),
        (("graftlm.text.corpus", "", "write_json", "1"), True),
    ],
)
def test_killed_anywhere_it_ends_in_the_same_bytes(
    tmp_path: Path,
    llama_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[str, str, str, str],
    is_filled: bool,
) -> None:
    section, out = section_of(tmp_path), tmp_path / "out"
    llama_tokenizer.save(tmp_path / "tokenizer")
    prepare_data(section, llama_tokenizer, CARD, tmp_path / "whole")
    given = [json.dumps(section.model_dump(mode="json")), str(tmp_path / "tokenizer"), str(out), *place]
    assert subprocess.run([sys.executable, "-c", KILLED, *given]).returncode == -signal.SIGKILL
    if is_filled:  # what was read is not read again
        monkeypatch.setattr(corpus, "dialogues_of", None)
    prepare_data(section, llama_tokenizer, CARD, out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_step_keeps_its_shelf_until_it_is_finished_and_only_for_its_key(tmp_path: Path) -> None:
    step, order = Step(tmp_path / "3-data"), Order({}, {}, "key")
    kept = step.folder / corpus.SHELF / "dialogues.jsonl"
    step.begin(order)
    kept.parent.mkdir()
    kept.write_text("x")
    step.begin(order)
    assert kept.exists()
    step.begin(Order({}, {}, "another"))
    assert not kept.parent.exists()
    kept.parent.mkdir()
    kept.write_text("x")
    step.finish("another", 1.0)
    assert not kept.parent.exists()
    shutil.rmtree(step.folder)
