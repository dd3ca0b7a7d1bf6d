"""The data step: what is kept, held out, cut or dropped, and that the account adds up."""

import gc
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_files import alpaca, write_rows

from graftlm.errors import DiskError, UserError
from graftlm.recipe import Data
from graftlm.text.corpus import DataReport, prepare_data, read_conversations
from graftlm.text.counting import quantile
from graftlm.text.dialogue import Conversation, Rendered
from graftlm.text.rows import TokenRows
from graftlm.text.rows_file import RowsFile
from graftlm.text.templates import CARD, Template
from graftlm.text.tokenizer import Tokenizer


def prepare(folder: Path, tokenizer: Tokenizer, template: Template = CARD, **section: Any) -> DataReport:
    """Run the step with rows given as lists; they are written to files named by their section."""
    section = {"near_duplicates": None, **section}
    for name in ("sources", "heldout", "text"):
        rows = section.get(name)
        if rows and "path" not in rows[0]:
            section[name] = ({"path": write_rows(folder / f"{name}.jsonl", rows)},)
    return prepare_data(Data(**section), tokenizer, template, folder / "out")


def check_account(report: DataReport) -> None:
    """The law of the account: every row read is kept, held out or dropped, and told once."""
    assert report.rows_read == report.rows_kept + sum(report.heldout_rows.values()) + sum(report.dropped.values())
    assert set(report.examples) == {*report.dropped, *report.cut, *report.cleaned}
    assert all(1 <= len(places) <= 3 and all(":" in place for place in places) for places in report.examples.values())
    assert report.rows_kept == sum(report.by_language.values())


def numbered(number: int, language: str = "q") -> list[dict[str, Any]]:
    return [alpaca(f"{language} {i}", "", f"answer {i} of {language}") for i in range(number)]


def test_every_row_of_a_mixed_bag_is_accounted_for(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    """B2 B3 B7: broken, empty, duplicate, leaking, too long rows; one row cut at a turn."""
    several = {
        "messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " + "w " * 30} for i in range(8)]
    }
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_rows(
        mixed / "a.jsonl",
        [*numbered(20), "{", alpaca(answer=""), alpaca("q 3", "", "answer 3 of q"), alpaca("held", "", "x"),
         alpaca("long " * 300), alpaca("nul\x00")],
    )  # fmt: skip
    write_rows(mixed / "b.jsonl", [several, {"messages": [*several["messages"], {"role": "user", "content": "and?"}]}])
    report = prepare(
        tmp_path, llama_tokenizer, sources=({"path": str(mixed)},), heldout=[alpaca("Held!", "", "y")],
        max_tokens=250,
    )  # fmt: skip
    check_account(report)
    assert report.dropped == {
        "not JSON": 1,
        "an empty answer": 1,
        "exact duplicate": 2,
        "also held out": 1,
        "its prompt alone is longer than 250 tokens": 1,
    }
    assert report.cut == {"a last question without an answer": 1, "longer than the limit: cut at a turn": 1}
    assert report.cleaned == {"NUL removed": 1}
    assert (report.rows_kept, report.token_rows, report.heldout_rows) == (22, 25, {"new": 1})
    assert report.format == "alpaca, messages"
    assert json.loads((tmp_path / "out" / "data.json").read_text())["rows_kept"] == 22


def test_what_is_written_is_what_is_told(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    report = prepare(tmp_path, llama_tokenizer, sources=numbered(40), heldout_rows=3)
    rows = TokenRows.load(tmp_path / "out" / "train", tokenizer=llama_tokenizer, template_fingerprint=CARD.fingerprint)
    assert (report.token_rows, report.tokens, report.labels) == (len(rows), rows.num_tokens, rows.num_targets)
    assert report.heldout_rows == {"new": 3}
    held = TokenRows.load(tmp_path / "out" / "heldout-new")
    shown = read_conversations(tmp_path / "out" / "heldout-new.jsonl")[0]
    assert (len(held), len(shown)) == (3, 3)
    trained = {f"q {int(source.rsplit(':', 1)[1]) - 1}" for source in rows.sources}
    assert {c.messages[0].content for c in shown} | trained == {f"q {i}" for i in range(40)}


def test_a_held_out_dialogue_of_several_answers_is_shown_once(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i}"} for i in range(6)]
    report = prepare(tmp_path, llama_tokenizer, sources=numbered(3), heldout=[{"messages": turns}])
    assert report.heldout_rows == {"new": 1}
    assert len(TokenRows.load(tmp_path / "out" / "heldout-new")) == 3
    (shown,) = read_conversations(tmp_path / "out" / "heldout-new.jsonl")[0]
    assert [m.content for m in shown.messages] == [f"turn {i}" for i in range(6)]


def test_an_instructions_input_survives_being_held_out(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    rows = [alpaca("a question", given) for given in ("one", "two", "two")]
    report = prepare(tmp_path, llama_tokenizer, sources=rows, heldout=[alpaca("a question", "three")])
    assert (report.rows_kept, report.dropped) == (2, {"exact duplicate": 1})
    (again,) = read_conversations(tmp_path / "out" / "heldout-new.jsonl")[0]
    assert (again.messages[0].content, again.messages[0].input) == ("a question", "three")


def test_near_duplicates_go_across_the_split(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    """B7: near to another training row, near to a held-out one."""
    dice = random.Random(1)

    def words() -> str:
        return " ".join("".join(dice.choices("abcdefgh", k=4)) for _ in range(40))

    first, held = words(), words()
    rows = [alpaca("a", "", first), alpaca("a", "", f"{first}."), alpaca("b", "", f"{held}."), alpaca("c", "", words())]
    heldout = [alpaca("b", "", held), alpaca("e", "", words())]
    report = prepare(tmp_path, llama_tokenizer, sources=rows, heldout=heldout, near_duplicates=0.9)
    assert (report.rows_kept, report.dropped) == (2, {"near duplicate": 1, "also held out": 1})
    check_account(report)


def test_sampling_is_by_seed_and_by_source_alone(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    paths = [write_rows(tmp_path / f"{name}.jsonl", numbered(50, name)) for name in "ab"]

    def drawn(order: tuple[int, ...], seed: int) -> dict[str, list[str]]:
        sources = tuple({"path": paths[i], "sample": 10} for i in order)
        report = prepare(tmp_path, llama_tokenizer, sources=sources, heldout=numbered(1, "h"), seed=seed)
        check_account(report)
        assert report.dropped["not drawn into the sample"] == 40 * len(order)
        found: dict[str, list[str]] = {}
        for source in TokenRows.load(tmp_path / "out" / "train").sources:
            found.setdefault(Path(source).name[0], []).append(source)
        return found

    both = drawn((0, 1), 7)
    assert [len(rows) for rows in both.values()] == [10, 10]
    assert [place.rsplit(":", 1)[1] for place in both["a"]] != [place.rsplit(":", 1)[1] for place in both["b"]]
    assert drawn((1, 0), 7) == both
    assert drawn((0,), 7)["a"] == both["a"]
    assert drawn((0, 1), 8) != both


def test_held_out_rows_are_drawn_by_language_and_at_most_a_tenth(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    paths = [write_rows(tmp_path / f"{name}.jsonl", numbered(number, name)) for name, number in (("n", 100), ("o", 30))]
    sources = ({"path": paths[0]}, {"path": paths[1], "language": "old"})
    report = prepare(tmp_path, llama_tokenizer, sources=sources, heldout_rows=6)
    assert report.heldout_rows == {"new": 6, "old": 3}
    assert report.by_language == {"new": 94, "old": 27}
    check_account(report)


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    def meta(folder: Path) -> str:
        folder.mkdir()
        prepare(folder, llama_tokenizer, sources=numbered(60), heldout_rows=5, near_duplicates=0.9)
        return json.loads((folder / "out" / "train" / "meta.json").read_text())["sha256"]["ids.npy"]

    assert meta(tmp_path / "one") == meta(tmp_path / "two")


def test_shards_are_one_source_and_many_chunks_are_as_one(
    tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in one file and in shards of a folder: the same ids, whatever fits in a chunk."""
    rows = [*numbered(90), *numbered(7), *numbered(30, "other")]
    (tmp_path / "shards").mkdir()
    for begin in range(0, len(rows), 20):
        write_rows(tmp_path / "shards" / f"{begin:03}.jsonl", rows[begin : begin + 20])
    found = []
    for path, chunk in ((write_rows(tmp_path / "whole.jsonl", rows), 8192), (str(tmp_path / "shards"), 16)):
        for module in ("corpus", "shelf", "duplicates", "near"):
            monkeypatch.setattr(f"graftlm.text.{module}.CHUNK", chunk)
        report = prepare(tmp_path, llama_tokenizer, sources=({"path": path},), heldout_rows=5, near_duplicates=0.95)
        check_account(report)
        digests = json.loads((tmp_path / "out" / "train" / "meta.json").read_text())["sha256"]
        found.append((digests["ids.npy"], digests["offsets.npy"], report.dropped, report.length_quantiles))
    assert found[0] == found[1]
    assert found[0][2]["exact duplicate"] == 7


def test_no_list_of_all_dialogues_is_kept(
    tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When token rows are finished, of 500 dialogues no more are alive than a batch of them."""
    monkeypatch.setattr("graftlm.text.fit.BATCH_DIALOGUES", 50)
    alive: list[int] = []
    finish = RowsFile.finish

    def count_and_finish(file: RowsFile, meta: dict[str, Any]) -> None:
        alive.append(sum(isinstance(found, Conversation | Rendered) for found in gc.get_objects()))
        finish(file, meta)

    monkeypatch.setattr(RowsFile, "finish", count_and_finish)
    report = prepare(tmp_path, llama_tokenizer, sources=numbered(500), heldout_rows=5, near_duplicates=1.0)
    assert report.rows_kept == 495
    assert max(alive) <= 3 * 50


def test_an_interrupted_step_leaves_only_what_it_goes_on_from(
    tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while rows are rendered: no half file, only the dialogues as they were read."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sources = numbered(30)
    with monkeypatch.context() as patched:
        patched.setattr("graftlm.text.fit.render_many", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, llama_tokenizer, sources=sources, heldout_rows=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shelf"]
    check_account(prepare(tmp_path, llama_tokenizer, sources=sources, heldout_rows=2))
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "out" / "shelf").exists()


def test_quantiles_of_counts_are_those_of_the_numbers() -> None:
    dice = random.Random(0)
    for size in (1, 2, 7, 200):
        numbers = [dice.randrange(40) for _ in range(size)]
        counted = Counter(numbers)
        for share in (0.0, 0.5, 0.9, 0.99, 1.0):
            assert quantile(counted, share) == int(np.quantile(numbers, share) + 1e-9)


def test_text_rows_of_documents_and_dialogues(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    (tmp_path / "plain.txt").write_text("one document\nof two lines\n\nanother\n", encoding="utf-8")
    text = (
        {"path": str(tmp_path / "plain.txt")},
        {"path": write_rows(tmp_path / "rows.jsonl", [alpaca("a", "", "b")])},
    )
    prepare(tmp_path, llama_tokenizer, sources=numbered(2), heldout=numbered(1, "h"), text=text, max_tokens=200)
    rows = TokenRows.load(tmp_path / "out" / "text")
    assert [llama_tokenizer.decode(rows.row(i)[0].tolist()) for i in range(3)] == [
        "one document\nof two lines", "another", "a\nb",
    ]  # fmt: skip
    assert [Path(source).name for source in rows.sources] == ["plain.txt:1", "plain.txt:4", "rows.jsonl:1"]


def test_plain_text_among_the_dialogues_is_counted(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "a.jsonl", numbered(2))
    (folder / "b.txt").write_text("a document")
    report = prepare(tmp_path, llama_tokenizer, sources=({"path": str(folder)},), heldout=numbered(1, "h"))
    assert (report.rows_kept, report.dropped) == (2, {"a plain text, not a dialogue": 1})


def test_nothing_left_is_told_with_the_counts(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    """B3: every row dropped, every held-out row dropped."""
    long = [alpaca("a question", "", "answer " * 80)]
    with pytest.raises(UserError, match=r"No row is left.*longer than 200 tokens \(1\)"):
        prepare(tmp_path, llama_tokenizer, sources=long, heldout=numbered(1), max_tokens=200)
    with pytest.raises(UserError, match="No held-out row is usable"):
        prepare(tmp_path, llama_tokenizer, sources=numbered(3), heldout=long, max_tokens=200)


def test_a_full_disk_is_told(tmp_path: Path, llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1 for the data step: what was read and counted stays, anything less does not."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    places = {"shelf.np.concatenate": [], "piles.np.argsort": [], "rows_file._write_header": ["shelf"]}
    for place, left in places.items():
        with monkeypatch.context() as patched:
            patched.setattr(f"graftlm.text.{place}", fail)
            with pytest.raises(DiskError, match="No space left"):
                prepare(tmp_path, llama_tokenizer, sources=numbered(3), heldout=numbered(1, "h"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == left


@pytest.mark.slow
def test_the_real_rows_are_accounted_for(shared_real: Path, tmp_path: Path) -> None:
    from graftlm.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_real / "tokenizers" / "llama2.model")
    sources = tuple(
        {"path": str(shared_real / name), "language": language}
        for name, language in (
            ("alpaca_zh.parquet", "new"),
            ("alpaca_en.parquet", "old"),
            ("belle_seed_tasks_zh.jsonl", "new"),
        )
    )
    report = prepare_data(Data(sources=sources, heldout_rows=300, max_tokens=512), tokenizer, CARD, tmp_path / "out")
    check_account(report)
    assert report.rows_read == 90_175
    assert report.rows_kept > 88_000
    assert all(295 <= number <= 300 for number in report.heldout_rows.values())
