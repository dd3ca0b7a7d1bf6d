"""The report of a run: one self-contained HTML file a person enjoys reading.

Owns the page's order, its summary and the picture of the road. Reads only what the run's folder holds, and says "not
measured" where it holds nothing. Does not measure. Last step of the road.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.release.page import card, chapter, duration, facts, folded, number, page, percent, safe
from graftlm.release.record import RunRecord, read_run
from graftlm.release.report_parts import (
    data_chapter,
    graft_chapter,
    grow_chapter,
    health_chapter,
    stage_chapters,
)
from graftlm.release.report_results import exact_chapter, heldout_chapter, samples_chapter
from graftlm.run import disk_errors

# A rise of the old language beyond this is called forgetting.
FORGETTING_PERCENT = 10.0


def write_report(folder: Path) -> Path:
    """Write report.html into the run's `-report` folder; returns its path. Raises UserError, DiskError."""
    path = next(path for path in sorted(folder.glob("[0-9]*-report")) if path.is_dir()) / "report.html"
    with disk_errors(path.parent):
        path.write_text(report_page(read_run(folder)), encoding="utf-8")
    return path


def report_page(run: RunRecord) -> str:
    """The page of a run."""
    chapters = [
        ("road", "The road", _road(run)),
        ("heldout", "Held-out figures", heldout_chapter(run)),
        ("questions", "Questions with one right answer", exact_chapter(run)),
        ("samples", "Samples after each step", samples_chapter(run)),
        ("tokenizer", "Tokenizer graft", graft_chapter(run)),
        ("base", "Grown base", grow_chapter(run)),
        ("data", "Data", data_chapter(run)),
        ("training", "Training", stage_chapters(run)),
        ("health", "Health", health_chapter(run)),
        ("recipe", "Recipe and versions", _recipe(run)),
    ]
    links = "".join(f'<a href="#{mark}">{safe(title)}</a>' for mark, title, _ in chapters)
    name = run.recipe["name"]
    body = (
        f'<header><p class="soft">GraftLM, report of a run</p><h1>{safe(name)}</h1>{_summary(run)}</header>'
        f'<nav aria-label="Chapters">{links}</nav><main>'
        + "".join(chapter(mark, title, told) if told else chapter(mark, title) for mark, title, told in chapters)
        + "</main><footer>Written by graftlm. Held-out rows were never trained on. Every figure stands in "
        "full in the JSON files beside this page and in the steps' folders.</footer>"
    )
    return page(f"{name}: GraftLM report", body)


def _summary(run: RunRecord) -> str:
    told = "".join(f"<p>{line}</p>" for line in _sentences(run))
    cards = "".join(_cards(run))
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in _notes(run))
    return f'{told}<div class="cards">{cards}</div>{notes}'


def _sentences(run: RunRecord) -> list[str]:
    base = run.recipe["base"].get("model") or "a small base made from nothing"
    lines = [f"A new language was grafted onto <b>{safe(Path(base).name if '/' in base else base)}</b>: "]
    graft, grow = run.graft, run.grow
    if graft:
        lines[0] += (
            f"<b>{safe(graft['num_new'])}</b> pieces ({safe(run.scripts)}) joined its {safe(graft['num_old'])}, "
            "then it was trained on dialogues in "
        )
    else:
        lines[0] += "its own tokenizer was kept, and it was trained on dialogues in "
    num = len(run.recipe["stages"])
    lines[0] += f"{num} stage{'s' if num > 1 else ''}."
    if graft and grow:
        is_proved = not any(graft.get(key) for key in ("expand_violations", "engine_disagreements")) and grow.get(
            "old_logits_identical"
        )
        lines.append(
            '<span class="ok">Proved:</span> text of the old language is read as before, and before training the grown '
            "model gives every old piece the same logit on it, bit for bit. Its loss there may still rise at once: the "
            "new pieces take their part of the probability."
            if is_proved
            else '<span class="bad">Not proved:</span> see the chapters on tokenizer and base for what differs.'
        )
    return lines


def _cards(run: RunRecord) -> list[str]:
    cards = []
    if run.questions and run.questions["num_learnable"]:
        exact, asked = run.questions["num_exact_learnable"], run.questions["num_learnable"]
        cards.append(
            card(
                "Exactly right",
                f"{100 * exact / asked:.0f} %",
                f"{exact:,} of {asked:,} held-out questions, word for word",
            )
        )
    for language in run.languages:
        first, last = run.heldout[0][language], run.heldout[-1][language]
        low, high = last["interval"]
        cards.append(
            card(
                f"{language.capitalize()} language, bits per byte",
                f"{first['bits_per_byte']:.3g} → {last['bits_per_byte']:.3g}",
                f"{percent(last['change_percent'])} against the base; 95 % interval {low:.3g} to {high:.3g}; "
                "lower is better",
            )
        )
    cards += _compression_card(run)
    if run.graft:
        graft = run.graft
        told = (
            f"of {graft.get('num_old_texts', graft['num_texts_checked']):,} texts without the new script; and of all "
            f"{graft['num_texts_checked']:,}, new ones too, {graft['expand_violations']:,} where the new pieces, "
            "spelled out, are not the base's own encoding"
        )
        cards.append(card("Old text read differently", f"{graft['old_texts_changed']:,}", told))
    if run.grow:
        cards.append(
            card(
                "Largest change of an old logit",
                number(float(run.grow["max_old_logit_difference"])),
                f"by growing, through the whole head in {run.grow['dtype']}",
            )
        )
    seconds = sum(done["seconds"] for done in run.done.values())
    peak_bytes = max((done.get("peak_memory_bytes", 0) for done in run.done.values()), default=0)
    told = f"at most {peak_bytes / 2**30:.2f} GiB of memory in training" if peak_bytes else "memory not measured"
    cards.append(card("Time of all steps", duration(seconds), told))
    return cards


def _compression_card(run: RunRecord) -> list[str]:
    states = list(run.compression.values())
    if len(states) < 2 or "new" not in states[0]:
        return []
    before, after = states[0]["new"]["chars_per_token"], states[-1]["new"]["chars_per_token"]
    told = f"{before:.3g} → {after:.3g} characters a token on held-out dialogues of the new language"
    return [card("Fewer tokens", f"{after / before:.2g} ×", told)]


def _notes(run: RunRecord) -> list[str]:
    """What a reader should not miss."""
    notes = [f"{stage.name}: {note}" for stage in run.stages for note in stage.notes]
    for stage in run.stages:
        skipped = sum(bool(step["skipped"]) for step in stage.steps)
        if skipped:
            notes.append(f"{stage.name}: {skipped:,} of {len(stage.steps):,} steps were skipped: not finite gradients.")
    if "old" in run.languages and run.heldout[-1]["old"]["change_percent"] > FORGETTING_PERCENT:
        rise = run.heldout[-1]["old"]["change_percent"]
        notes.append(
            f"The old language got {rise:.1f} % worse: part of it was forgotten. A share of old-language rows in "
            "data.sources (language: old) or a lower peak_lr helps."
        )
    return notes


_TITLES = {
    "0-scratch": "Base from nothing", "1-tokenizer": "Tokenizer", "2-base": "Grown base", "3-data": "Data",
}  # fmt: skip


def _road(run: RunRecord) -> str:
    stops = "".join(
        f"<li><b>{safe(_title(name))}</b><span>{safe(_fact(run, name, done))}</span>"
        f'<span class="time">{duration(done["seconds"])}</span></li>'
        for name, done in run.done.items()
    )
    if not stops:
        return ""
    return f'<ol class="road">{stops}</ol>{_shares(run.done)}'


def _shares(done: dict[str, dict[str, Any]]) -> str:
    """Where the time went: one bar, a part a step."""
    total = sum(mark["seconds"] for mark in done.values()) or 1
    colours = ("plain", "new", "old", "train")
    parts, at, told = [], 0.0, []
    for place, (name, mark) in enumerate(done.items()):
        width = 480 * mark["seconds"] / total
        told.append(f"{_title(name)} {100 * mark['seconds'] / total:.0f} %")
        parts.append(
            f'<rect class="fill {colours[place % len(colours)]}" x="{at:.2f}" y="0" '
            f'width="{max(width - 1, 0.3):.2f}" height="14"/>'
        )
        at += width
    label = safe("Share of the time: " + ", ".join(told))
    return (
        f'<figure class="shares"><svg viewBox="0 0 480 14" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg><p class="soft">{label}.</p></figure>'
    )


def _title(name: str) -> str:
    rest = name.split("-", 1)[1]
    return _TITLES.get(name) or {"model": "Model", "heldout": "Judged", "report": "Report"}.get(rest, f"Stage {rest}")


def _fact(run: RunRecord, name: str, done: dict[str, Any]) -> str:
    """The one thing worth knowing about a step."""
    if name == "1-tokenizer":
        return f"{run.graft['num_new']:,} new pieces" if run.graft else "the base's own"
    if name == "2-base" and run.grow:
        return f"{run.grow['num_rows_new']:,} rows"
    if name == "3-data" and run.data:
        return f"{run.data['rows_kept']:,} rows to learn from"
    if "num_steps" in done:
        return f"{done['num_steps']:,} steps"
    if "max_logit_difference" in done:
        return f"re-loaded: logits within {done['max_logit_difference']:.2g}"
    return f"{len(run.heldout)} states" if name.endswith("-heldout") else ""


def _recipe(run: RunRecord) -> str:
    text = json.dumps(run.recipe, ensure_ascii=False, indent=1)
    versions: Sequence[tuple[str, Any]] = list(run.versions.items())
    return folded("The whole recipe", f'<pre tabindex="0">{safe(text)}</pre>') + facts(versions)
