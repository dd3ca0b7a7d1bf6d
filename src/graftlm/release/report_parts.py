"""Chapters of the report on what was built: tokenizer, grown base, data, training.

Owns how each step's own figures are told. Reads a `RunRecord` only; a chapter about nothing is empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.health.rates import rate_cuts_of
from graftlm.release.page import duration, facts, safe, table
from graftlm.release.plots import Line, bars_plot, line_plot
from graftlm.release.record import RunRecord, StageRecord

_PROOFS = (
    ("expand_violations", "texts whose new pieces, expanded, are not the base's own encoding"),
    ("old_texts_changed", "texts of the old language that encode differently"),
    ("engine_disagreements", "texts on which two engines disagree"),
    ("roundtrip_failures", "texts that do not come back as they were"),
)


def graft_chapter(run: RunRecord) -> str:
    """What was added, what was proved of it, how much shorter text became."""
    graft = run.graft
    if not graft:
        return "<p>The base's own tokenizer was kept.</p>"
    proofs = [(name, graft[key]) for key, name in _PROOFS if isinstance(graft.get(key), int)]
    is_clean = not any(value for _, value in proofs)
    verdict = (
        '<span class="ok">Proved</span> on every text tried: old text reads as before.'
        if is_clean
        else '<span class="bad">Not exact:</span> the counts say how often.'
    )
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in graft.get("notes", ()))
    tried = f"of {graft['num_texts_checked']:,} texts tried"
    dropped = [(reason, count) for reason, count in (graft.get("dropped") or {}).items()]
    return (
        f"<p>{safe(graft['num_new'])} pieces ({safe(run.scripts)}) were added to the base's {safe(graft['num_old'])} "
        f"by mode {safe(graft['mode'])}; together {safe(graft['num_total'])}. {verdict}</p>{notes}"
        f"{table((tried, 'count'), proofs)}{_compression(run)}"
        + (f"<h3>Pieces left out</h3>{table(('reason', 'pieces'), dropped)}" if dropped else "")
    )


def _compression(run: RunRecord) -> str:
    if not run.compression:
        return ""
    bars, rows = [], []
    for language in next(iter(run.compression.values())):
        for state, by_language in run.compression.items():
            found = by_language[language]
            bars.append((f"{language} language, {state}", language, found["chars_per_token"]))
            rows.append((language, state, found["chars_per_token"], found["bytes_per_token"]))
    return (
        f"<h3>Compression of held-out dialogues</h3>{bars_plot('Characters a token: more is shorter', bars)}"
        f"{table(('language', 'tokenizer', 'characters a token', 'bytes a token'), rows)}"
    )


def grow_chapter(run: RunRecord) -> str:
    """How rows were added and what growing left unchanged."""
    grow = run.grow
    if not grow:
        return ""
    is_same = grow.get("hidden_states_identical") and grow.get("old_logits_identical")
    verdict = (
        '<span class="ok">Proved:</span> hidden states and logits over old pieces are the same bits as before, taken '
        "through the old rows."
        if is_same
        else '<span class="bad">Old text is not treated as before.</span>'
    )
    rows = [
        (matrix, rms.get("old") if rms.get("old") is not None else "none", _or_none(rms.get("new")))
        for matrix, rms in grow.get("row_rms", {}).items()
    ]
    losses = [(name.replace("_", " "), value) for name, value in grow.get("first_loss", {}).items()]
    told = [
        ("rows before and after", f"{grow['num_rows_old']:,} → {grow['num_rows_new']:,}"),
        ("new rows start as", f"{grow.get('embedding_init')} (embedding), {grow.get('head_init')} (head)"),
        ("largest change of an old logit through the grown head", grow["max_old_logit_difference"]),
        ("allowed by rounding", grow.get("old_logit_tolerance", "not measured")),
        ("tokens of the proof", grow.get("num_proof_tokens", "not measured")),
    ]
    return (
        f"<p>{verdict}</p>{facts(told)}<h3>Size of rows</h3>{table(('matrix', 'old rows, rms', 'new rows, rms'), rows)}"
        f"<h3>Loss before any training</h3>{table(('tokens', 'nats per token'), losses)}"
    )


def data_chapter(run: RunRecord) -> str:
    """Rows read, kept and dropped, each with its reason."""
    data = run.data
    if not data:
        return ""
    told: list[tuple[str, Any]] = [
        ("rows read", data["rows_read"]),
        ("dialogues kept to learn from", data["rows_kept"]),
        ("rows of tokens made of them", data.get("token_rows", "not measured")),
        ("tokens", data.get("tokens", "not measured")),
        ("tokens that are learned (answers and their ends)", data.get("labels", "not measured")),
    ]
    told += [(f"held-out dialogues, {name} language", count) for name, count in data.get("heldout_rows", {}).items()]
    told += [
        (f"dialogues to learn from, {name} language", count) for name, count in data.get("by_language", {}).items()
    ]
    told += [(f"row length in tokens, {name}", length) for name, length in data.get("length_quantiles", {}).items()]
    examples = data.get("examples") or {}
    fates = [("dropped", "Rows dropped"), ("cut", "Rows cut at a turn"), ("cleaned", "Rows cleaned and kept")]
    lost = ""
    for key, title in fates:
        rows = [(reason, count, _places(examples.get(reason))) for reason, count in data.get(key, {}).items()]
        if rows:
            lost += f"<h3>{title}</h3>{table(('reason', 'rows', 'for example'), rows)}"
    files = [(name, of.get("format", "?"), of.get("rows", "?")) for name, of in data.get("files", {}).items()]
    read = f"<h3>Files read</h3>{table(('file', 'format', 'rows'), files)}" if files else ""
    return (
        "<p>A dialogue of several turns may give several rows of tokens, one for each answer.</p>"
        f"{facts(told)}{lost or '<p>No row was dropped.</p>'}{read}"
    )


def stage_chapters(run: RunRecord) -> str:
    """Every stage with its curves."""
    return "".join(f"<h3>{safe(stage.name)}</h3>{_stage(stage)}" for stage in run.stages)


def _stage(stage: StageRecord) -> str:
    if not stage.steps:
        return "<p>Not measured.</p>"
    steps, asked = stage.steps, stage.asked
    xs = [step["step"] for step in steps]
    losses = [Line("training", xs, [step["loss"] for step in steps], "train")]
    losses += _heldout_lines(stage, "loss_per_answer_token")
    plots = [
        line_plot("Loss, nats per learned token", losses),
        line_plot("Held-out bits per byte", _heldout_lines(stage, "bits_per_byte")),
        line_plot("Gradient norm before clipping", [Line("gradient norm", xs, [s["grad_norm"] for s in steps])]),
        line_plot("Learning rate", [Line("learning rate", xs, [s["lr"] for s in steps])], may_be_log=False),
    ]
    if asked.get("precision") == "fp16" or len({step["loss_scale"] for step in steps}) > 1:
        plots.append(line_plot("Loss scale (fp16)", [Line("loss scale", xs, [s["loss_scale"] for s in steps])]))
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in stage.notes)
    return f'{notes}<div class="plots">{"".join(plots)}</div>{facts(_stage_facts(stage))}'


def _heldout_lines(stage: StageRecord, key: str) -> list[Line]:
    languages = dict.fromkeys(k for line in stage.heldout for k, v in line.items() if isinstance(v, dict))
    lines = []
    for language in languages:
        read = [line for line in stage.heldout if language in line]
        colour = language if language in ("new", "old") else "plain"
        xs, ys = [line["step"] for line in read], [line[language][key] for line in read]
        lines.append(Line(f"held-out, {language} language", xs, ys, colour, marks=True))
    return lines


def _stage_facts(stage: StageRecord) -> list[tuple[str, Any]]:
    steps, asked = stage.steps, stage.asked
    seconds = sum(step["seconds"] for step in steps)
    peak_bytes = stage.done.get("peak_memory_bytes")
    trains = asked.get("trains", {})
    learns = ", ".join(f"{key} {value}" for key, value in trains.items() if key in ("rank", "alpha", "rows"))
    return [
        ("what learns", f"{trains.get('kind', '?')}{f' ({learns})' if learns else ''}"),
        ("asked for", f"epochs {asked.get('epochs'):g}, peak learning rate {asked.get('peak_lr'):g}, "
                      f"{asked.get('batch_rows')} rows a step, {asked.get('precision')}"),
        ("steps taken", len(steps)),
        ("steps skipped", sum(bool(step["skipped"]) for step in steps)),
        ("time in steps", duration(seconds)),
        ("tokens per second", round(sum(step["num_tokens"] for step in steps) / max(seconds, 1e-9))),
        ("first and last loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"),
        ("peak memory", f"{peak_bytes / 2**30:.2f} GiB" if peak_bytes else "not measured"),
        ("attention", stage.done.get("attention", "not told")),
        ("saving", _saving(stage.done)),
    ]  # fmt: skip


def _saving(done: dict[str, Any]) -> str:
    if not done.get("num_saves"):
        return "not measured"
    return (
        f"{done['num_saves']} times, at most {done['largest_save_bytes'] / 1e6:,.1f} MB; "
        f"training waited {done['waited_for_saves_seconds']:.2g} s for {done['written_saves_seconds']:.2g} s of writing"
    )


def health_chapter(run: RunRecord) -> str:
    """What the doctor says: verdict, what asked for a person, and where training went back."""
    health = run.health
    if health is None:
        return ""
    kind = "ok" if health.verdict in ("healthy", "recovered") else "bad"
    told = f'<p><b class="{kind}">{safe(health.verdict.capitalize())}.</b> {safe(health.told)}</p>'
    found = [
        (told.stage, "" if told.finding.step is None else told.finding.step, told.finding.cause, told.finding.evidence)
        for told in health.diagnoses
    ]
    if found:
        told += table(("stage", "step", "finding", "evidence"), found)
    looked = [course for course in health.courses if course.look]
    if looked and not any(course.preflight for course in looked):
        told += "<p>Pre-flight found nothing before the first step of any stage.</p>"
    back = [
        (course.name, line["at_step"], line["step"], rate_cuts_of(line).short())
        for course in health.courses
        for line in course.log.interventions
    ]
    if back:
        told += f"<h3>Rollbacks</h3>{table(('stage', 'at step', 'back to step', 'share of the rate from there'), back)}"
    return f"{told}<p>With curves and recipe lines: <code>graftlm autopsy</code> on the run's folder.</p>"


def _or_none(value: float | None) -> float | str:
    return "none" if value is None else value


def _places(value: Any) -> str:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(str, value[:3]))
    return str(value or "")
