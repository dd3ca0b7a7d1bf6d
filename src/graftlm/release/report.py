"""The report of a run: one self-contained HTML file a person can read.

Owns the page. Reads only what the run's folder holds, and says "not measured" where it holds nothing. Does not measure.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.release.plots import bars, curves
from graftlm.run import read_json, read_metrics

STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:auto;padding:1rem}
h2{margin-top:2.5rem;border-bottom:1px solid #8884}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.25rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid #8883}
svg{max-width:100%;height:auto;background:#fff;border-radius:6px}.qa{border-left:3px solid #888;padding-left:.8rem;margin:1rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.good{color:#2a8a3e}.bad{color:#c0392b}code,pre{background:#8882;padding:.1rem .3rem;border-radius:4px;overflow-x:auto}
"""


def write_report(folder: Path) -> Path:
    """Write report.html into the run's `-report` folder; returns its path."""
    report = next(path for path in sorted(folder.glob("*-report")) if path.is_dir())
    heldout = next(path for path in sorted(folder.glob("*-heldout")) if path.is_dir())
    recipe = read_json(folder / "recipe.json")
    parts = [
        f"<h1>{_safe(recipe['recipe']['name'])}</h1><p>What was done, what was proved, and how well it answers.</p>",
        _questions(_read(report / "questions.json")),
        _heldout(_read(heldout / "heldout.json")),
        _samples(_read(report / "samples.json")),
        _graft(_read(folder / "1-tokenizer" / "graft.json")),
        _grow(_read(folder / "2-base" / "grow.json")),
        _data(_read(folder / "3-data" / "data.json")),
        *(_stage(path.parent.name, read_metrics(path)) for path in sorted(folder.glob("*/metrics.jsonl"))),
        _steps(folder),
        f"<h2>Recipe and versions</h2><details><summary>show</summary><pre>"
        f"{_safe(json.dumps(recipe, ensure_ascii=False, indent=1))}</pre></details>",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>GraftLM report: {_safe(recipe['recipe']['name'])}</title><style>{STYLE}</style><body>{''.join(parts)}"
    )
    path = report / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _safe(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<td>{_safe(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_safe(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _fields(values: Mapping[str, Any]) -> str:
    return _table(("", ""), [(key.replace("_", " "), _short(value)) for key, value in values.items()])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _missing(title: str) -> str:
    return f"<h2>{title}</h2><p>Not measured.</p>"


def _questions(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    asked, exact = found["num_learnable"], found["num_exact_learnable"]
    share = f" ({exact / asked:.0%})" if asked else ""
    shown = "".join(_dialogue(row["messages"], row["answer"], row["is_exact"]) for row in found["shown"])
    kinds = [(name, k["asked"], k["exact"], "yes" if k["learnable"] else "no") for name, k in found["kinds"].items()]
    return (
        f"<h2>Questions with one right answer</h2><p><b>{exact} of {asked}{share}</b> held-out questions of the learnable "
        f"kinds are answered exactly; of all kinds {found['num_exact']} of {found['num_asked']}. Shown: "
        f"{_safe(found['rule'])}</p>{shown}{_table(('kind', 'asked', 'exact', 'learnable at this size'), kinds)}"
    )


def _dialogue(messages: Sequence[Mapping[str, str]], answer: str, is_exact: bool | None) -> str:
    lines = [f"<b>{_safe(m['role'])}</b> {_safe(m['content'])}" for m in messages[:-1]]
    mark = {True: ' <span class="good">exact</span>', False: ' <span class="bad">not exact</span>', None: ""}[is_exact]
    lines.append(f"<b>model</b> {_safe(answer)}{mark}")
    if not is_exact:
        lines.append(f"<i>expected</i> {_safe(messages[-1]['content'])}")
    return f'<div class="qa">{chr(10).join(lines)}</div>'


def _heldout(found: list[dict[str, Any]] | None) -> str:
    if not found:
        return _missing("Held-out figures")
    languages = [key for key in found[0] if key != "state"]
    rows = [
        (s["state"], language, s[language]["bits_per_byte"], "{:.4g} to {:.4g}".format(*s[language]["interval"]),
         s[language]["loss_per_answer_token"], f"{s[language]['change_percent']:+.1f} %", s[language]["num_rows"])
        for language in languages for s in found
    ]  # fmt: skip
    plot = bars(
        [s["state"] for s in found], {k: [s[k]["bits_per_byte"] for s in found] for k in languages}, "bits per byte"
    )
    head = ("state", "language", "bits per byte", "95 % interval", "nats per answer token", "against the base", "rows")
    return (
        "<h2>Held-out figures</h2><p>Bits per byte of the held-out answers, lower is better; they compare across "
        f"tokenizers. “old” is the base's language: a rise there is forgetting.</p>{plot}{_table(head, rows)}"
    )


def _samples(found: list[dict[str, Any]] | None) -> str:
    if not found:
        return ""
    said = [_dialogue([*s["prompt"], {"role": "", "content": s["reference"]}], s["answer"], None) for s in found]
    return "<h2>Samples</h2><p>Held-out prompts, picked by a hash.</p>" + "".join(said)


def _graft(found: dict[str, Any] | None) -> str:
    if not found:
        return "<h2>Tokenizer</h2><p>The base's own tokenizer was kept.</p>"
    clean = not any(found[k] for k in ("expand_violations", "engine_disagreements", "roundtrip_failures"))
    told = "Proved: on every text tried, expanding new pieces gives the base's own encoding." if clean else "Not exact."
    return f"<h2>Tokenizer graft</h2><p>{told}</p>{_fields(found)}"


def _grow(found: dict[str, Any] | None) -> str:
    return f"<h2>Grown base</h2>{_fields(found)}" if found else _missing("Grown base")


def _data(found: dict[str, Any] | None) -> str:
    return f"<h2>Data</h2>{_fields(found)}" if found else _missing("Data")


def _stage(name: str, lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if line["event"] == "step"]
    held = [line for line in lines if line["event"] == "heldout"]
    if not steps:
        return _missing(f"Stage {_safe(name)}")
    xs = [s["step"] for s in steps]
    series = {"training loss": (xs, [s["loss"] for s in steps])}
    for language in ("new", "old"):
        points = [(h["step"], h[language]["loss_per_answer_token"]) for h in held if language in h]
        if points:
            series[f"held-out {language}"] = ([p[0] for p in points], [p[1] for p in points])
    seconds = sum(s["seconds"] for s in steps)
    facts = {
        "steps": len(steps), "skipped": sum(s["skipped"] for s in steps), "seconds": seconds,
        "tokens per second": sum(s["num_tokens"] for s in steps) / max(seconds, 1e-9),
        "first loss": steps[0]["loss"], "last loss": steps[-1]["loss"],
    }  # fmt: skip
    norms = curves({"gradient norm": (xs, [s["grad_norm"] for s in steps])}, "gradient norm before clipping")
    rates = curves({"learning rate": (xs, [s["lr"] for s in steps])}, "learning rate")
    scales = ""
    if len({s["loss_scale"] for s in steps}) > 1 or facts["skipped"]:
        scales = curves({"loss scale": (xs, [s["loss_scale"] for s in steps])}, "loss scale")
    return f"<h2>Stage {_safe(name)}</h2>{curves(series, 'nats per token')}{norms}{rates}{scales}{_fields(facts)}"


def _steps(folder: Path) -> str:
    rows = [(p.parent.name, read_json(p)["seconds"]) for p in sorted(folder.glob("*/done.json"))]
    return f"<h2>Time</h2>{_table(('step', 'seconds'), rows)}"
