"""Chapters of the report on how well the model does: held-out figures, exact questions, samples.

Owns how results are told. Reads a `RunRecord` only; a chapter about nothing is empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.release.page import folded, percent, safe, table
from graftlm.release.plots import Reading, readings_plot
from graftlm.release.record import RunRecord

# Samples of a language that are seen at once; the others are folded.
NUM_SAMPLES_OPEN = 3


def heldout_chapter(run: RunRecord) -> str:
    """Bits per byte of every state in both languages, with intervals."""
    if not run.heldout or not run.languages:
        return ""
    states = [state["state"] for state in run.heldout]
    groups = [
        (
            f"{language} language",
            language,
            [Reading(s[language]["bits_per_byte"], *s[language]["interval"]) for s in run.heldout],
        )
        for language in run.languages
    ]
    rows = [
        (
            language, s["state"], s[language]["bits_per_byte"], "{:.3f} to {:.3f}".format(*s[language]["interval"]),
            percent(s[language]["change_percent"]), s[language]["loss_per_answer_token"], s[language]["num_rows"],
        )
        for language in run.languages
        for s in run.heldout
    ]  # fmt: skip
    head = ("language", "state", "bits per byte", "95 % interval", "against the base", "nats per token", "rows")
    return (
        "<p>How surprised each state of the model is by answers it never saw, in bits per byte of text: lower is "
        "better, and the measure is fair between tokenizers. A rise in the old language is forgetting; a fall says "
        "little about it where the stages learn rows of the same kind.</p>"
        f"{readings_plot('Bits per byte of held-out answers', states, groups)}{table(head, rows)}{_reservations(run)}"
    )


def _reservations(run: RunRecord) -> str:
    """What to know when two states' figures are compared."""
    told = []
    for language in run.languages:
        for state in run.heldout:
            left_out, num_rows = state[language]["num_left_out"], state[language]["num_rows"]
            if left_out:
                told.append(
                    f"{state['state']}, {language} language: judged on {num_rows:,} of {num_rows + left_out:,} rows; "
                    "the rest is longer than its context in its own tokens, or refused by its template."
                )
    grown = next((state["old"] for state in run.heldout if state["state"] == "grown" and "old" in state), None)
    if grown and grown["change_percent"] > 0:
        told.append(
            f"grown, old language: {percent(grown['change_percent'])} although no old logit has changed: the new "
            "pieces, not trained yet, take their part of the probability."
        )
    return "".join(f'<p class="soft">{safe(line)}</p>' for line in told)


def exact_chapter(run: RunRecord) -> str:
    """Questions with one right answer: the count, by kind, and a few shown."""
    found = run.questions
    if not found:
        return ""
    asked, exact = found["num_learnable"], found["num_exact_learnable"]
    share = f" ({exact / asked:.0%})".replace("%", " %") if asked else ""
    known, told = found.get("num_learned_answers", 0), ""
    if known:
        told = (
            f" The right answers of {'all' if known == asked else f'{known:,}'} of them stand word for word among the "
            "answers trained on: the facts are known, and only the wording of the question, or what is combined in it, "
            "is new."
        )
    shown = "".join(_asked(row) for row in found["shown"])
    kinds = [
        (name, kind["asked"], kind["exact"], round(100 * kind["exact"] / kind["asked"]), kind["learnable"])
        for name, kind in sorted(found["kinds"].items(), key=lambda item: -item[1]["exact"] / item[1]["asked"])
    ]
    rows = [(*row[:4], "yes" if row[4] else "no") for row in kinds]
    by_kind = table(("kind", "asked", "exact", "percent", "learnable at this size"), rows)
    return (
        f"<p><b>{exact:,} of {asked:,}{share}</b> held-out questions of the kinds a model of this size can learn are "
        f"answered exactly, word for word.{told} Of the questions of all kinds {found['num_exact']:,} of "
        f"{found['num_asked']:,} are answered exactly.</p>"
        f'{shown}<p class="soft">Shown {safe(found["rule"])}</p>'
        f"{folded('Counts by kind', by_kind)}"
    )


def _asked(row: Mapping[str, Any]) -> str:
    expected = row["messages"][-1]["content"]
    verdict = (
        '<span class="ok">✓ exact</span>'
        if row["is_exact"]
        else f'<span class="bad">✗ expected: <bdi>{safe(expected)}</bdi></span>'
    )
    answer = f'<p><span class="who">model</span><bdi>{safe(row["answer"])}</bdi> {verdict}</p>'
    return f'<div class="talk">{_said(row["messages"][:-1])}{answer}</div>'


def samples_chapter(run: RunRecord) -> str:
    """The same held-out prompts, answered by every state of the road, side by side."""
    if not run.samples:
        return ""
    told = (
        "<p>Held-out prompts, picked by a hash and not by their result, answered by the model after every step of the "
        "road, always with the likeliest piece.</p>"
    )
    for language in dict.fromkeys(sample["language"] for sample in run.samples):
        samples = [_sample(sample) for sample in run.samples if sample["language"] == language]
        more = samples[NUM_SAMPLES_OPEN:]
        told += "".join(samples[:NUM_SAMPLES_OPEN])
        told += folded(f"{len(more)} more in the {language} language", "".join(more)) if more else ""
    return told


def _sample(sample: Mapping[str, Any]) -> str:
    return (
        f'<article class="talk">{_said(sample["prompt"])}'
        f'<p><span class="who">a good answer</span><bdi>{safe(sample["reference"])}</bdi></p>'
        f"{_answers(sample['answers'])}</article>"
    )


def _answers(answers: Mapping[str, str]) -> str:
    """Answers by state; neighbours that say the same share a box."""
    boxes: list[tuple[list[str], str]] = []
    for state, text in answers.items():
        if boxes and boxes[-1][1] == text:
            boxes[-1][0].append(state)
        else:
            boxes.append(([state], text))
    told = "".join(
        f'<div{" class=last" if place == len(boxes) - 1 else ""}><span class="who">{safe(", ".join(states))}</span>'
        f'<p dir="auto">{_without_repeats(text) or "<i>(nothing)</i>"}</p></div>'
        for place, (states, text) in enumerate(boxes)
    )
    return f'<div class="answers">{told}</div>'


def _without_repeats(text: str) -> str:
    """The answer as shown: a line said over and over stands once, with how often; a last one may have been cut off."""
    said = text.split("\n")
    lines: list[tuple[str, int]] = []
    for place, line in enumerate(said, start=1):
        last, count = lines[-1] if lines else ("", 0)
        is_cut = place == len(said) and count > 1 and last.startswith(line)
        if line and (line == last or is_cut):
            lines[-1] = (last, count + 1)
        else:
            lines.append((line, 1))
    return "\n".join(
        safe(line) + (f' <span class="who">said {count} times</span>' if count > 1 else "") for line, count in lines
    )


def _said(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(
        f'<p><span class="who">{safe(message["role"])}</span><bdi>{safe(message["content"])}</bdi></p>'
        for message in messages
    )
