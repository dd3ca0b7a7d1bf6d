"""The report: told in plain words from what the folder holds, self-contained, and unable to act."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graftlm.release import plots
from graftlm.release.plots import Line, Reading, bars_plot, line_plot, readings_plot
from graftlm.release.report import write_report

NASTY = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>\x1b[2J&lt;"
VOID = {"meta", "br", "rect", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and notices a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def figures(bits: float, change: float) -> dict[str, Any]:
    return {
        "bits_per_byte": bits, "loss_per_answer_token": 2 * bits, "interval": [bits - 0.1, bits + 0.1], "num_rows": 40,
        "num_answer_tokens": 400, "num_left_out": 0, "change_percent": change,
    }  # fmt: skip


def step_line(step: int, loss: float) -> dict[str, Any]:
    return {
        "event": "step", "step": step, "num_updates": step, "loss": loss, "lr": 1e-3 / step, "grad_norm": 1.0 + step,
        "loss_scale": 1.0, "skipped": step == 2, "num_rows": 8, "num_tokens": 100, "num_targets": 50, "seconds": 0.5,
    }  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    """A run of which nothing but its recipe is there."""
    recipe = {
        "name": "small", "base": {"model": "folder/base-model", "scratch": None}, "tokenizer": {"script": ["Han"]},
        "stages": [{"name": "full", "trains": {"kind": "full"}, "epochs": 1.0, "peak_lr": 1e-3, "batch_rows": 8,
                    "precision": "bf16"}],
    }  # fmt: skip
    write(tmp_path / "recipe.json", {"recipe": recipe, "versions": {"graftlm": "0.1.0"}})
    (tmp_path / "7-report").mkdir()
    return tmp_path


@pytest.fixture
def full_run(empty_run: Path) -> Path:
    """A finished run whose every text tries to act."""
    for number, name in enumerate(("tokenizer", "base", "data", "full", "model", "heldout"), start=1):
        facts = {"num_steps": 3, "peak_memory_bytes": 2**30} if name == "full" else {}
        write(empty_run / f"{number}-{name}" / "done.json", {"key": "k", "seconds": 61.0 * number, **facts})
    write(empty_run / "1-tokenizer" / "graft.json", {
        "mode": "continued", "num_old": 32000, "num_new": 8001, "num_total": 40001, "num_texts_checked": 4020,
        "expand_violations": 0, "engine_disagreements": 0, "roundtrip_failures": 0, "old_texts_changed": 0,
        "dropped": {NASTY: 3}, "notes": [NASTY],
    })  # fmt: skip
    write(empty_run / "2-base" / "grow.json", {
        "num_rows_old": 32000, "num_rows_new": 40001, "embedding_init": "mean", "head_init": "mean", "dtype": "float32",
        "row_rms": {"embedding": {"old": 0.02, "new": None}}, "first_loss": {"uniform": 10.6},
        "hidden_states_identical": True, "old_logits_identical": True, "max_old_logit_difference": 1.5e-6,
        "old_logit_tolerance": 1e-5, "num_proof_tokens": 300,
    })  # fmt: skip
    write(empty_run / "3-data" / "data.json", {
        "rows_read": 100, "rows_kept": 90, "dropped": {"empty answer": 10}, "examples": {"empty answer": [NASTY]},
        "tokens": 9000, "labels": 4000, "heldout_rows": {"new": 5}, "cut": {"too long": 2},
        "files": {NASTY: {"format": "belle", "rows": 100}},
    })  # fmt: skip
    lines = [step_line(n, loss) for n, loss in ((1, 5.0), (2, math.nan), (3, 4.0))]
    lines += [{"event": "heldout", "step": n, "new": figures(3.0 / n, 0), "old": figures(2.0, 0)} for n in (1, 3)]
    lines.append({"event": "note", "step": 3, "text": "stopped early: held-out loss no longer improves"})
    (empty_run / "4-full" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(empty_run / "6-heldout" / "heldout.json", [
        {"state": "base", "new": figures(4.0, 0.0), "old": figures(1.5, 0.0)},
        {"state": "model", "new": figures(1.2, -70.0), "old": figures(1.8, 20.0)},
    ])  # fmt: skip
    write(empty_run / "6-heldout" / "samples.json", [
        {"language": "new", "prompt": [{"role": "user", "content": NASTY}], "reference": "好",
         "answers": {"base": NASTY, "full": "same", "model": "same"}},
    ])  # fmt: skip
    write(empty_run / "6-heldout" / "compression.json", {
        state: {"new": {"chars_per_token": chars, "bytes_per_token": 3 * chars}}
        for state, chars in (("base", 0.75), ("grown", 1.5))
    })  # fmt: skip
    question = {"messages": [{"role": "user", "content": NASTY}, {"role": "assistant", "content": "四"}]}
    write(empty_run / "7-report" / "questions.json", {
        "num_asked": 30, "num_exact": 20, "num_learnable": 24, "num_exact_learnable": 20, "rule": "by a rule.",
        "kinds": {
            "sums": {"asked": 24, "exact": 20, "learnable": True}, "free": {"asked": 6, "exact": 0, "learnable": False},
        },
        "shown": [{**question, "answer": NASTY, "is_exact": False}, {**question, "answer": "四", "is_exact": True}],
    })  # fmt: skip
    return empty_run


def test_the_summary_says_in_words_what_was_done_and_proved(full_run: Path) -> None:
    text = Page(write_report(full_run).read_text(encoding="utf-8")).text
    for told in (
        "8,001 pieces (Han) joined its 32,000", "base-model", "in 1 stage.", "Proved:", "20 of 24 held-out questions",
        "4 → 1.2", "−70.0 % against the base", "95 % interval 1.1 to 1.3", "2 ×", "0.75 → 1.5 characters a token",
        "Old text read differently0of 4,020 texts", "1.5e-06", "at most 1.00 GiB", "21 min 21 s",
        "full: stopped early", "full: 1 of 3 steps were skipped", "The old language got 20.0 % worse",
    ):  # fmt: skip
        assert told in text, told


def test_every_chapter_is_there_and_links_lead_to_it(full_run: Path) -> None:
    page = Page(write_report(full_run).read_text(encoding="utf-8"))
    marks = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{mark}" for mark in marks}
    assert "Not measured." not in page.text
    assert page.text.count("full, model") == 1


def test_nothing_in_the_page_acts_or_is_fetched(full_run: Path) -> None:
    """S8: model output, data and notes are text; even so a policy forbids scripts and fetching."""
    text = write_report(full_run).read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert not any(name.startswith("on") or name in ("src", "style") for _, a in page.tags for name in a)
    assert all(a["href"].startswith("#") for tag, a in page.tags if tag == "a")
    assert not re.search(r"https?://|url\(|@import|\x1b", text)
    policy = next(a for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy["content"]
    assert page.text.count("<script>alert('x')</script>") >= 7
    assert page.open == []


def test_what_was_not_measured_is_said(empty_run: Path) -> None:
    text = Page(write_report(empty_run).read_text(encoding="utf-8")).text
    assert text.count("Not measured.") == 8
    assert "own tokenizer was kept" in text


def test_plots_tell_their_numbers_in_words(full_run: Path) -> None:
    page = Page(write_report(full_run).read_text(encoding="utf-8"))
    told = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    loss = next(label for label in told if label and label.startswith("Loss"))
    assert "training: from 5 to 4" in loss
    assert "held-out, new language" in loss
    assert len(told) == 7


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    ys = [1.0 + (n == 5000) * 9 for n in range(11718)]
    drawn = line_plot("Norm", [Line("norm", range(len(ys)), ys)])
    means = re.search(r'polyline class="stroke plain" points="([^"]*)"', drawn)
    assert means is not None
    assert len(means[1].split()) <= plots.MAX_POINTS
    assert "greatest 10" in drawn
    assert 'class="band plain"' in drawn
    assert len(drawn) < 40_000


@pytest.mark.parametrize(
    "ys",
    [[0.0], [0.0, 0.0], [1e-9, 1e9], [-3.0, 2.0], [65536.0] * 5, [math.nan, math.inf], [], [1e-5, 2e-5], [7.0, 7.0]],
)
def test_odd_curves_do_not_break_a_plot(ys: list[float]) -> None:
    drawn = line_plot("Odd", [Line("odd", list(range(len(ys))), ys, marks=True)])
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert bool(drawn) == any(map(math.isfinite, ys))
    for place in re.findall(r'c[xy]="([^"]*)"', drawn):
        assert -1 <= float(place) <= plots.WIDTH + 1


def test_names_of_states_stand_below_every_value() -> None:
    low = [Reading(2, 1.8, 2.2), Reading(0.06, 0.04, 0.08), Reading(0.1, 0.08, 0.14)]
    high = [Reading(12, 11, 13), Reading(1.2, 0.8, 1.5), Reading(0.2, 0.1, 0.3)]
    for least in (low, [Reading(1.1, 1, 1.2), Reading(0.5, 0.4, 0.6), Reading(0.5, 0.4, 0.6)]):
        drawn = readings_plot("R", ["base", "full", "model"], [("new", "new", high), ("old", "old", least)])
        values = re.findall(r'class="value [^"]*" x="[^"]*" y="([^"]*)"', drawn)
        names = re.findall(r'y="([^"]*)"[^>]*>(?:base|full|model)<', drawn)
        assert (len(values), len(names)) == (6, 3)
        assert max(map(float, values)) <= min(map(float, names)) - 12


def test_states_judged_on_fewer_rows_and_the_rise_by_growing_are_explained(full_run: Path) -> None:
    states = [
        {"state": "base", "new": {**figures(4.0, 0.0), "num_left_out": 2}, "old": figures(1.5, 0.0)},
        {"state": "grown", "new": figures(2.0, -50.0), "old": figures(1.6, 6.7)},
    ]
    write(full_run / "6-heldout" / "heldout.json", states)
    text = Page(write_report(full_run).read_text(encoding="utf-8")).text
    assert "base, new language: judged on 40 of 42 rows" in text
    assert "grown, old language: +6.7 % although no old logit has changed" in text


def test_a_line_said_over_and_over_stands_once(full_run: Path) -> None:
    said = {"base": "It rains.\nIt rains.\nIt rains.\nIt ra", "full": "10\n1", "model": "a\n\n\nb"}
    sample = {"language": "new", "prompt": [], "reference": "", "answers": said}
    write(full_run / "6-heldout" / "samples.json", [sample])
    text = Page(write_report(full_run).read_text(encoding="utf-8")).text
    assert "It rains. said 4 times" in text
    assert text.count("It rains.") == 1
    assert "10\n1" in text
    assert "a\n\n\nb" in text


def test_how_many_right_answers_were_trained_on_is_said(full_run: Path) -> None:
    path = full_run / "7-report" / "questions.json"
    for known, told in ((24, "The right answers of all of them"), (3, "The right answers of 3 of them")):
        write(path, {**json.loads(path.read_text()), "num_learned_answers": known})
        assert told in Page(write_report(full_run).read_text(encoding="utf-8")).text


def test_readings_and_bars_carry_values_and_escape_names() -> None:
    drawn = readings_plot("R", [NASTY, "model"], [("new", "new", [Reading(2, 1, 3), Reading(1, 0.9, 1.1)])])
    assert "<script" not in drawn + bars_plot("B", [(NASTY, "new", 2.0), ("b", "old", 0.0)])
    assert "new: &lt;script" in drawn
    assert readings_plot("R", [], []) == ""
