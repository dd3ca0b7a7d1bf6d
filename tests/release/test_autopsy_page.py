"""The autopsy's page: what happened told in words and drawn, self-contained and unable to act."""

import errno
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from logged_runs import crashed, good, incident, recovered, write_json, write_run, write_stage
from test_report import NASTY, Page

from graftlm import pipeline
from graftlm.errors import DiskError, NumericalStop
from graftlm.health.autopsy import autopsy
from graftlm.recipe_file import load_recipe
from graftlm.release.autopsy_page import autopsy_page, write_autopsy
from graftlm.release.plots import Events, Line, line_plot
from graftlm.release.report import write_report


@pytest.fixture
def nasty_run(tmp_path: Path) -> Path:
    """Two stages, the second gone back from and stopped; its texts try to act."""
    held = [{"event": "heldout", "step": n, "new": {"loss_per_answer_token": 3.0 - n / 50}} for n in (0, 20)]
    lines = [
        *crashed(),
        *held,
        incident(23, "backward-overflow", module=NASTY),
        {"event": "note", "step": 23, "text": NASTY},
    ]
    run = write_run(tmp_path / "run", [good(1, 60), lines])
    write_json(run / "4-lora" / "done.json", {})
    write_json(run / "4-lora" / "preflight.json", {"findings": [], "look": {"lora_factor": 0.5}})
    return run


def test_the_page_tells_and_draws_what_happened(nasty_run: Path) -> None:
    page = Page(autopsy_page(autopsy(nasty_run)))
    for told in (
        "Crashed.", "stopped at step 23", "finished, 60 steps", "The forward pass leaves the range of 16 bits",
        "stages.lora1.peak_lr=3e-07", "Pre-flight: green.", "2 incidents: forward-overflow",
        "Rolled back to step 20: the loss rose. The learning rate is 0.01", "Best held-out loss: 2.600",
        "2 rollbacks did not help.",
    ):  # fmt: skip
        assert told in page.text, told
    assert page.open == []
    labels = [str(a["aria-label"]) for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    drawn = [label.split(".")[0] for label in labels]
    assert drawn == [
        "Loss, nats a token", "Gradient norm before clipping", "Update against weights, rms by rms",
        "Share of gradients that are exactly zero", "Learning rate",
        "Loss, nats a token", "Held-out loss, nats a token", "Gradient norm before clipping",
        "Update against weights, rms by rms", "Share of gradients that are exactly zero", "Learning rate",
    ]  # fmt: skip
    assert "rollbacks at step 23" in labels[5]
    assert "incidents at steps 21, 23" in labels[5]
    assert "skipped steps at steps 21, 22, 23" in labels[5]
    assert "rows of old pieces" in labels[1]
    assert "transformer body" not in labels[1]  # it did not learn


def test_nothing_in_the_page_acts_or_is_fetched(nasty_run: Path) -> None:
    text = autopsy_page(autopsy(nasty_run))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert not any(name.startswith("on") or name in ("src", "style") for _, a in page.tags for name in a)
    assert all(str(a["href"]).startswith("#") for tag, a in page.tags if tag == "a")
    assert not re.search(r"https?://|url\(|@import|\x1b", text)
    assert page.text.count("<script>alert('x')</script>") >= 3


def test_an_attempt_gone_back_from_is_drawn_pale(tmp_path: Path) -> None:
    text = autopsy_page(autopsy(write_run(tmp_path, [recovered()])))
    assert "attempt 1, gone back from" in text
    assert 'class="stroke new pale"' in text
    assert "Recovered." in text


@pytest.mark.parametrize(
    ("best_at", "before"), [(0, "First loss logged"), (40, "Incident: loss-rose"), (90, "Last loss logged")]
)
def test_the_timeline_is_in_the_order_of_steps(tmp_path: Path, best_at: int, before: str) -> None:
    def held(step: int) -> dict[str, Any]:
        return {"event": "heldout", "step": step, "new": {"loss_per_answer_token": 2.0 if step == best_at else 4.0}}

    lines = [held(0), *recovered(), held(90)]
    lines.insert(41, held(40))
    page = Page(autopsy_page(autopsy(write_run(tmp_path, [lines]))))
    timeline = page.text[page.text.index("What happened, in order") :]
    assert timeline.index("Best held-out loss: 2.000") < timeline.index(before)
    if best_at:
        assert timeline.index("First loss logged") < timeline.index("Best held-out loss")


def test_a_long_line_to_type_wraps_on_a_narrow_screen(tmp_path: Path) -> None:
    text = autopsy_page(autopsy(write_run(tmp_path, [recovered()])))
    assert re.search(r'<pre class="wraps" tabindex="0">graftlm run RECIPE', text)
    assert re.search(r"pre\.wraps \{[^}]*white-space: ?pre-wrap", text)


def test_a_healthy_log_has_a_page_too(tmp_path: Path) -> None:
    log = tmp_path / "run.csv"
    log.write_text("step,loss\n" + "".join(f"{n},{3 - n / 100}\n" for n in range(1, 50)), encoding="utf-8")
    text = Page(autopsy_page(autopsy(log))).text
    assert "Nothing: no alarm" in text
    assert "49 steps logged" in text


def test_both_files_are_whole_or_absent(nasty_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = autopsy(nasty_run)
    page = write_autopsy(found, tmp_path / "out")
    assert json.loads((page.parent / "health.json").read_text(encoding="utf-8")) == found.to_json()
    assert sorted(path.name for path in page.parent.iterdir()) == ["autopsy.html", "health.json"]
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskError):
        write_autopsy(found, tmp_path / "full")
    assert not [path.name for path in (tmp_path / "full").iterdir() if not path.name.startswith(".")]


def test_events_are_marked_once_a_place_and_told() -> None:
    line = Line("loss", range(1, 1001), [1.0] * 1000)
    drawn = line_plot(
        "Loss", [line], events=[Events("skipped steps", range(1, 5000), is_small=True), Events("none", [])]
    )
    assert drawn.count('class="stroke bad" x1') < 4500
    assert "skipped steps at 4999 steps from 1 to 4,999" in drawn
    assert "none" not in drawn
    assert line_plot("Loss", [], events=[Events("skipped steps", [1])]) == ""


def test_the_report_has_a_chapter_on_health(tmp_path: Path) -> None:
    run = write_run(tmp_path, [recovered()])
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    recipe["recipe"]["tokenizer"] = {"script": ["Han"]}
    recipe["recipe"]["stages"][0] |= {"trains": {"kind": "full"}, "epochs": 1.0, "batch_rows": 8}
    write_json(run / "recipe.json", recipe)
    (run / "7-report").mkdir()
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    for told in ("Recovered.", "loss-rose", "Rollbacks", "back to step"):
        assert told in text, told


@pytest.fixture
def stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose training stops for numerical reasons as soon as it is walked."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    recipe = {
        "name": "small", "base": {"model": str(tmp_path)}, "tokenizer": {"mode": "keep"},
        "data": {"sources": [{"path": "rows.jsonl"}], "heldout_rows": 1},
        "stages": [{"name": "lora", "trains": {"kind": "lora"}}],
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def stop(walk: pipeline._Walk, orders: object) -> None:
        write_stage(walk.folder / "4-lora", crashed())
        raise NumericalStop("It stopped.", "Lower it. Evidence: graftlm autopsy run")

    monkeypatch.setattr(pipeline._Walk, "take_all", stop)
    return tmp_path / "small.yaml"


def test_a_run_that_stops_leaves_its_autopsy_and_names_the_page(
    stopping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N2: an overflow storm ends with the culprit named, on a page too."""
    recipe, folder = load_recipe(stopping), stopping.parent / "run"
    with pytest.raises(NumericalStop) as stop:
        pipeline.run_recipe(recipe, folder)
    assert stop.value.fix == f"Lower it. Evidence: graftlm autopsy run. Page: {folder / 'autopsy.html'}"
    assert json.loads((folder / "health.json").read_text(encoding="utf-8"))["verdict"] == "crashed"
    # Run again and gone on: what it left behind is of an end that is none any more.
    write_stage(folder / "4-lora", good(1, 90))
    monkeypatch.setattr(pipeline._Walk, "take_all", lambda walk, orders: pipeline.RunResult())
    pipeline.run_recipe(recipe, folder)
    assert json.loads((folder / "health.json").read_text(encoding="utf-8"))["verdict"] == "healthy"


def test_a_stop_is_told_even_where_no_page_can_be_written(stopping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise DiskError("No room.", "Free some.")

    monkeypatch.setattr(pipeline, "write_autopsy", full)
    with pytest.raises(NumericalStop, match="It stopped") as stop:
        pipeline.run_recipe(load_recipe(stopping), stopping.parent / "run")
    assert "Page:" not in stop.value.fix


def test_a_loss_that_is_no_number_is_told_in_words(nasty_run: Path) -> None:
    found = autopsy(nasty_run)
    last = found.courses[1].log.records
    last[-1] = replace(last[-1], loss=math.nan)
    assert "Last loss logged: not a finite number." in Page(autopsy_page(found)).text
