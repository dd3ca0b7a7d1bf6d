"""The page of a comparison: one self-contained HTML file that says first which model is better, and how sure that is.

Owns the page's words and order. Does not measure. `compare` writes it, and `sweep` with chapters of its own before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.release.compare import Comparison
from graftlm.release.compare_plots import differences_plot, is_sure
from graftlm.release.page import card, chapter, folded, page, safe, table
from graftlm.release.plots import Reading, bars_plot, readings_plot
from graftlm.run import disk_errors

COLOURS = ("new", "old", "plain", "train")
NUM_OPEN = 6
"""Questions of a file that are seen at once; the others are folded."""

_TASK_NAMES = {
    "exact": "answered exactly", "per_byte": "right choice, by likelihood per byte",
    "per_token": "right choice, by likelihood per token",
}  # fmt: skip

Chapter = tuple[str, str, str]
"""An anchor, a title, and what stands under it."""


def write_comparison(found: Comparison, path: Path, title: str = "", before: Sequence[Chapter] = ()) -> None:
    """Write the page. Raises DiskError."""
    with disk_errors(path.absolute().parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(comparison_page(found, title, before), encoding="utf-8")


def comparison_page(found: Comparison, title: str = "", before: Sequence[Chapter] = ()) -> str:
    """The page; `before` are chapters put before the comparison's own."""
    labels = short_names(found.names)
    chapters = [
        *before,
        ("heldout", "Held-out dialogues", _heldout(found, labels)),
        ("questions", "Questions with a right answer", _tasks(found, labels)),
        ("samples", "Answers side by side", _samples(found, labels)),
        ("speed", "Size and speed", _speed(found, labels)),
    ]
    chapters = [one for one in chapters if one[2]]
    links = "".join(f'<a href="#{mark}">{safe(name)}</a>' for mark, name, _ in chapters)
    title = title or " against ".join(labels.values() if len(labels) < 4 else [f"{len(labels)} models"])
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in found.notes)
    body = (
        f'<header><p class="soft">GraftLM, comparison of models</p><h1>{safe(title)}</h1>{_summary(found, labels)}'
        f'{notes}</header><nav aria-label="Chapters">{links}</nav><main>'
        + "".join(chapter(mark, name, told) for mark, name, told in chapters)
        + "</main><footer>Written by graftlm. Every model answers the same rows in its own chat template, always with "
        "the likeliest piece. Intervals are 95 %; those of differences are paired: both models on the same rows."
        "</footer>"
    )
    return page(f"{title}: GraftLM comparison", body)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names as short as they stay apart: a path's last part, the run's name for the model inside a run."""
    found = {}
    for name in names:
        parts = [part for part in name.rstrip("/").split("/") if part not in ("", ".", "..")] or [name]
        is_inside = len(parts) > 1 and parts[-1].partition("-")[0].isdigit() and parts[-1].endswith("-model")
        says_nothing = len(parts) > 1 and parts[-1] == "model"
        found[name] = parts[-2] if is_inside else "/".join(parts[-2:]) if says_nothing else parts[-1]
    return found if len(set(found.values())) == len(found) else {name: name for name in names}


def _summary(found: Comparison, labels: Mapping[str, str]) -> str:
    """A sentence and cards: for each file of dialogues the best model, and whether the others are surely behind."""
    first = found.names[0]
    sentences, cards = [], []
    for file in _dialogue_files(found):
        best = min(found.names, key=lambda name: found.results[name][file]["bits_per_byte"])
        figures = found.results[best][file]
        low, high = figures["interval"]
        cards.append(card(
            f"Lowest on {Path(file).name}", labels[best],
            f"{figures['bits_per_byte']:.3g} bits per byte; 95 % interval {low:.3g} to {high:.3g}; lower is better",
        ))  # fmt: skip
        sentences += [_sentence(found, labels, name, file) for name in found.names[1:]]
    for file in _task_files(found):
        measures = [key for key in _TASK_NAMES if key in found.results[first][file]]
        best = max(found.names, key=lambda name: found.results[name][file][measures[0]] or 0)
        share = found.results[best][file][measures[0]]
        told = f"{_TASK_NAMES[measures[0]]}, of {found.results[best][file]['num_questions']:,} questions"
        cards.append(card(f"Most right on {Path(file).name}", labels[best], f"{_percent(share)} {told}"))
    for name in found.names[1:]:
        judged = [told["judged"] for told in found.results[name].values() if "judged" in told]
        if judged:
            wins, losses, ties = (sum(one[key] for one in judged) for key in ("wins", "losses", "ties"))
            told = f"wins, losses and ties against {labels[first]}, by the judge {judged[0]['judge']}"
            left = sum(one["not_judged"] for one in judged)
            told += f"; {left:,} not judged" if left else ""
            cards.append(card(f"Judged: {labels[name]}", f"{wins} / {losses} / {ties}", told))
    lines = "".join(f"<li>{line}</li>" for line in sentences[:8])
    return f'<ul class="told">{lines}</ul><div class="cards">{"".join(cards)}</div>'


def _sentence(found: Comparison, labels: Mapping[str, str], name: str, file: str) -> str:
    difference = found.results[name][file]["difference"]
    first = difference["against"]
    if difference["bits_per_byte"] is None:
        return f"{safe(labels[name])} and {safe(labels[first])} can read no row of {safe(Path(file).name)} both."
    reading = Reading(difference["bits_per_byte"], *difference["interval"])
    where = f"on {safe(Path(file).name)}"
    if not is_sure(reading):
        return f"<b>{safe(labels[name])}</b> and {safe(labels[first])} are not told apart {where}."
    share = abs(reading.value) / found.results[first][file]["bits_per_byte"]
    kind, word = ("ok", "less") if reading.value < 0 else ("bad", "more")
    return (
        f'<b>{safe(labels[name])}</b> is <span class="{kind}">{"better" if kind == "ok" else "worse"}</span> than '
        f"{safe(labels[first])} {where}: {_percent(share)} {word} bits per byte."
    )


def _dialogue_files(found: Comparison) -> list[str]:
    first = found.results[found.names[0]]
    return [file for file in found.files if "task" not in first[file]]


def _task_files(found: Comparison) -> list[str]:
    first = found.results[found.names[0]]
    return [file for file in found.files if "task" in first[file]]


def _heldout(found: Comparison, labels: Mapping[str, str]) -> str:
    files = _dialogue_files(found)
    if not files:
        return ""
    groups = []
    for place, file in enumerate(files[: len(COLOURS)]):
        readings = [
            Reading(found.results[n][file]["bits_per_byte"], *found.results[n][file]["interval"]) for n in labels
        ]
        groups.append((Path(file).name, COLOURS[place], readings))
    letters, key = _plot_names(labels)
    rows = [
        (
            Path(file).name, labels[name], told["bits_per_byte"], "{:.3f} to {:.3f}".format(*told["interval"]),
            told["loss_per_answer_token"], "{:.3f} to {:.3f}".format(*told["loss_interval"]),
            told["chars_per_token"], told["num_rows"],
        )
        for file in files for name, told in ((name, found.results[name][file]) for name in labels)
    ]  # fmt: skip
    head = (
        "file", "model", "bits per byte", "95 % interval", "nats per token", "95 % interval", "characters a token",
        "rows",
    )  # fmt: skip
    first = labels[found.names[0]]
    differences = [
        differences_plot(
            f"Bits per byte less those of {first}, {Path(file).name}",
            [
                (labels[name], Reading(told["bits_per_byte"], *told["interval"]))
                for name, told in ((n, found.results[n][file]["difference"]) for n in found.names[1:])
                if told["bits_per_byte"] is not None
            ],
            lower_is_better=True,
        )
        for file in files
    ]
    return (
        "<p>How surprised each model is by answers it never saw, in bits per byte of text: lower is better, and the "
        "measure is fair between tokenizers. Below, the same as differences on the same rows: a bar that does not "
        "touch the dashed line is no chance of which rows were picked.</p>"
        f"{readings_plot('Bits per byte of held-out answers', letters, groups)}{key}"
        f'<div class="plots">{"".join(differences)}</div>{table(head, rows)}'
    )


def _plot_names(labels: Mapping[str, str]) -> tuple[list[str], str]:
    """Names as they fit below a plot; letters, with a key, where they do not."""
    names = list(labels.values())
    if sum(map(len, names)) <= 56 and max(map(len, names)) <= 60 // len(names):
        return names, ""
    letters = [chr(65 + place % 26) for place in range(len(names))]
    told = ", ".join(f"<b>{letter}</b> {safe(name)}" for letter, name in zip(letters, names, strict=True))
    return letters, f'<p class="soft">{told}</p>'


def _tasks(found: Comparison, labels: Mapping[str, str]) -> str:
    parts = []
    for file in _task_files(found):
        first = found.results[found.names[0]][file]
        measures = [key for key in _TASK_NAMES if key in first]
        rows = []
        for name in found.names:
            told = found.results[name][file]
            for measure in measures:
                low, high = told[f"{measure}_interval"]
                rows.append((
                    labels[name], _TASK_NAMES[measure], _percent(told[measure]), f"{_percent(low)} to {_percent(high)}",
                    told["num_questions"],
                ))  # fmt: skip
        measure = measures[0]
        held = [(name, found.results[name][file]["difference"]) for name in found.names[1:]]
        differences = [
            (labels[name], Reading(*(100 * value for value in (told[measure], *told[f"{measure}_interval"]))))
            for name, told in held
            if told[measure] is not None
        ]
        title = f"{_TASK_NAMES[measure].capitalize()}: percentage points more than {labels[found.names[0]]}"
        plot = differences_plot(title, differences, lower_is_better=False)
        head = ("model", "measure", "right", "95 % interval", "questions")
        parts.append(f"<h3>{safe(Path(file).name)}</h3>{plot}{table(head, rows)}")
    return "".join(parts)


def _samples(found: Comparison, labels: Mapping[str, str]) -> str:
    if not found.samples:
        return ""
    told = "<p>Questions picked by a hash of their words, not by what the models make of them.</p>"
    for file in dict.fromkeys(sample["file"] for sample in found.samples):
        shown = [_sample(sample, labels) for sample in found.samples if sample["file"] == file]
        more = shown[NUM_OPEN:]
        told += f"<h3>{safe(Path(file).name)}</h3>{''.join(shown[:NUM_OPEN])}"
        told += folded(f"{len(more)} more", "".join(more)) if more else ""
    return told


def _sample(sample: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    said = "".join(
        f'<p><span class="who">{safe(turn["role"])}</span><bdi>{safe(turn["content"])}</bdi></p>'
        for turn in sample["prompt"]
    )
    boxes = "".join(
        f'<div><span class="who">{safe(labels[name])}{_verdict(sample, name)}</span>'
        f'<p dir="auto">{safe(text) or "<i>(nothing)</i>"}</p></div>'
        for name, text in sample["answers"].items()
    )
    reference = f'<p><span class="who">a good answer</span><bdi>{safe(sample["reference"])}</bdi></p>'
    return f'<article class="talk">{said}{reference}<div class="answers">{boxes}</div></article>'


def _verdict(sample: Mapping[str, Any], name: str) -> str:
    if name not in sample.get("verdicts", {}):
        return ""
    verdict = sample["verdicts"][name]
    kind = {"win": "ok", "loss": "bad"}.get(verdict, "soft")
    return f' <span class="{kind}">judged: {safe(verdict or "not judged")}</span>'


def _speed(found: Comparison, labels: Mapping[str, str]) -> str:
    files = _dialogue_files(found)
    rows, bars = [], []
    for name in found.names:
        facts = found.facts[name]
        speeds = [found.results[name][file]["answer_tokens_per_second"] for file in files]
        speeds = [speed for speed in speeds if speed]
        scoring = [found.results[name][file]["scoring_tokens_per_second"] for file in files]
        answering = sum(speeds) / len(speeds) if speeds else None
        rows.append((
            labels[name], facts["parameters"], facts["pieces"], facts["context_tokens"],
            round(sum(scoring) / len(scoring)) if scoring else "not measured",
            round(answering, 1) if answering else "not measured",
        ))  # fmt: skip
        if answering:
            bars.append((labels[name][-26:], "plain", answering))
    head = ("model", "parameters", "pieces", "context, tokens", "tokens read a second", "tokens said a second")
    plot = bars_plot("Tokens said a second, one answer at a time", bars) if bars else ""
    return f'{plot}{table(head, rows)}<p class="soft">Read in batches; measured once, on this machine as it was.</p>'


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
