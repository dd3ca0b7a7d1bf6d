"""The model card: README.md of a finished model, bilingual, written from what the run recorded.

Owns the card's metadata, its parts in order and the picture of its curves; its wording lies in `card.*.jinja`, its
figures come from `card_facts.py`. Measures nothing. On the road it is written into `N-model` when all else is done, and
beside every export.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from graftlm.errors import UserError
from graftlm.model.causal import empty_causal, parameter_count
from graftlm.release import card_facts as facts
from graftlm.release.card_words import TOO_LONG, in_chinese
from graftlm.release.page import number
from graftlm.release.plots import Drawing, Line, draw_lines, picture
from graftlm.release.record import RunRecord, StageRecord, read_run
from graftlm.run import RECIPE, disk_errors
from graftlm.text.sandbox import TemplateRefused, compile_template
from graftlm.text.templates import find_template
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

CARD_FILE, CURVES_FILE = "README.md", "curves.svg"
_FRAME, _ENGLISH, _CHINESE = (f"card{name}.md.jinja" for name in ("", ".en", ".zh"))
Form = Literal["hf", "adapter", "gguf"]
"""What lies beside a card: a whole model, an adapter whose base lies in `../base`, or a file for llama.cpp."""

_LIBRARIES = {"hf": "transformers", "adapter": "peft", "gguf": None}
_LANGUAGE_OF_SCRIPT = {"Han": "zh", "Hiragana": "ja", "Katakana": "ja", "Hangul": "ko", "Thai": "th"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


class _Raw(str):
    """Text that goes into a card as it is."""


def card_text(folder: Path, to: Form = "hf", gguf: str = "") -> str:
    """The card of the run in `folder` as it stands in a folder of form `to`, `gguf` the file in it where there is one.

    Raises UserError when it is no run folder, or its training has not ended.
    """
    if not (folder / RECIPE).is_file():
        found = f"it holds no {RECIPE}" if folder.is_dir() else "there is no folder of that name"
        raise UserError(f"{folder} is no run folder: {found}.", "Give the folder of `graftlm run RECIPE --out DIR`.")
    run = read_run(folder)
    _refuse_untrained(run, folder)
    told = _told(run, folder) | {"to": to, "gguf": _Raw(gguf)}
    parts = {
        name: _environment(place).get_template(file).render(told)
        for place, (name, file) in enumerate((("english", _ENGLISH), ("chinese", _CHINESE)))
    }
    frame = _environment(0).get_template(_FRAME).render(told | {name: _Raw(text) for name, text in parts.items()})
    card = ModelCard(f"---\n{card_data(run, to).to_yaml()}\n---\n{frame}")
    return str(card.content)


def _refuse_untrained(run: RunRecord, folder: Path) -> None:
    """A card says what was trained: of a run whose stages have not all ended it would be a promise."""
    names = [f"{4 + number}-{stage['name']}" for number, stage in enumerate(run.recipe["stages"])]
    missing = next((name for name in names if name not in run.done), None)
    if missing:
        raise UserError(
            f"The run in {folder} has no finished model yet, so there is no card of it: {missing} has not ended.",
            "Run its recipe again to continue it.",
        )


def write_card(run_folder: Path, out: Path, to: Form = "hf") -> None:
    """Write README.md and curves.svg into `out`, a folder of form `to`; files that would not change are left alone.

    Raises UserError.
    """
    gguf = next((path.name for path in out.glob("*.gguf")), "")
    files = {CARD_FILE: card_text(run_folder, to, gguf), CURVES_FILE: curves(read_run(run_folder))}
    with disk_errors(out):
        for name, text in files.items():
            path = out / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                scratch = out / f".{name}.writing"
                scratch.write_text(text, encoding="utf-8")
                scratch.replace(path)


def card_data(run: RunRecord, to: Form = "hf") -> ModelCardData:
    """The metadata the hub reads: only what the recipe and the run say."""
    recipe = run.recipe
    base = recipe["base"].get("model")
    spoken = {_LANGUAGE_OF_SCRIPT.get(script) for script in recipe["tokenizer"].get("script", ())} - {None}
    languages = ["ja"] if "ja" in spoken else sorted(filter(None, spoken))
    sets = [s["path"] for s in recipe["data"]["sources"] if facts.is_hub_id(s["path"])]
    return ModelCardData(
        license=_licence(run, "license") or "unknown",
        language=languages or None,
        library_name=_LIBRARIES[to],
        pipeline_tag="text-generation",
        tags=["graftlm", "vocabulary-expansion", "conversational", *(["gguf"] if to == "gguf" else [])],
        base_model=base if base and facts.is_hub_id(base) else None,
        datasets=sets or None,
        model_name=recipe["name"],
        eval_results=_results(run) or None,
    )


def _licence(run: RunRecord, key: str) -> str | None:
    return (run.recipe.get("card") or {}).get(key)


def _results(run: RunRecord) -> list[EvalResult]:
    if not run.heldout:
        return []
    last = run.heldout[-1]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"heldout-{language}",  # the hub joins results of one type
            dataset_name=f"held-out dialogues, {language} language",
            metric_type="bits_per_byte",
            metric_name="bits per byte of the answers",
            metric_value=round(last[language]["bits_per_byte"], 4),
        )
        for language in run.languages
    ]


def _environment(place: int) -> jinja2.Environment:
    """`place` 0 tells in English, 1 in Chinese. A name the record lacks is a fault of ours, not an empty place."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftlm.release", "."), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        finalize=lambda value: _shown(value, place),
    )  # fmt: skip
    environment.filters |= {"code": _code, "in_chinese": in_chinese}
    return environment


def _shown(value: Any, place: int) -> str:
    """A value as text of a card: names and notes of a run must not become headings, links or HTML."""
    if isinstance(value, tuple):
        value = value[place]
    if isinstance(value, _Raw):
        return value
    if value is None:
        return ("not recorded", "未记录")[place]
    if isinstance(value, bool):
        return (("no", "yes"), ("否", "是"))[place][value]
    if isinstance(value, int | float):
        return number(value)
    text = _CONTROL.sub(" ", str(value))
    return _MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))


def _code(text: str, kind: str = "") -> _Raw:
    """A fenced block; the fence is longer than any run of backticks inside."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Raw(f"{fence}{kind}\n{text}\n{fence}")


def _told(run: RunRecord, folder: Path) -> dict[str, Any]:
    """Everything the templates may name."""
    tokenizer = load_tokenizer(folder / "1-tokenizer") if "1-tokenizer" in run.done else None
    model = next((path for path in sorted(folder.glob("[0-9]*-model")) if (path / "config.json").is_file()), None)
    config: Any = empty_causal(model).config if model else None
    return {
        "name": run.recipe["name"], "run": run, "recipe": run.recipe, "scripts": run.scripts, "graft": run.graft,
        "grow": run.grow, "data": run.data, "base": facts.base_name(run), "config": config,
        "num_parameters": parameter_count(empty_causal(model)) if model else None,
        "pad_piece": _pad_piece(tokenizer, run), "compression": _compression(run),
        "sources": facts.source_table(run), "stages": facts.stage_table(run), "stage_names": facts.stage_names(run),
        "heldout": facts.heldout_table(run), "languages": [facts.LANGUAGES[key] for key in run.languages],
        "judged": facts.judged(run), "has_unjudged_rows": facts.has_unjudged_rows(run),
        "data_rows": facts.data_rows(run), "too_long": TOO_LONG[run.recipe["data"]["too_long"]],
        "questions": run.questions, "troubles": facts.troubles(run), "machines": facts.machines(run),
        "time": facts.time_told(facts.total_seconds(run)), "samples": facts.samples(run), "example": _example(run),
        "forgetting": facts.forgetting_percent(run),
        "num_skipped": sum(bool(step["skipped"]) for stage in run.stages for step in stage.steps),
        "prompts": _prompts(run, tokenizer), "weights_license": _licence(run, "license"),
        "data_license": _licence(run, "data_license"), "versions": run.versions, "curves": CURVES_FILE,
        "has_curves": any(stage.steps for stage in run.stages),
        "difference": next((d["max_logit_difference"] for d in run.done.values() if "max_logit_difference" in d), None),
    }  # fmt: skip


def _example(run: RunRecord) -> _Raw:
    """A question to ask first, as a string of Python: a short held-out one where the run kept one."""
    asked = next((question for _, question, _ in facts.samples(run) if len(question) < 60), "Hello")
    return _Raw(json.dumps(asked if "`" not in asked else "Hello", ensure_ascii=False))


def _pad_piece(tokenizer: Tokenizer | None, run: RunRecord) -> str | None:
    """The padding piece, where the graft added one: it is counted among the new ones."""
    if tokenizer is None or run.graft is None or tokenizer.pad_id is None:
        return None
    return tokenizer.piece(tokenizer.pad_id) if tokenizer.pad_id >= run.graft["num_old"] else None


def _compression(run: RunRecord) -> list[tuple[facts.Told, float, float]]:
    """Characters a token before and after, by language."""
    states = list(run.compression.values())
    if len(states) < 2:
        return []
    return [
        (facts.LANGUAGES[key], states[0][key]["chars_per_token"], states[-1][key]["chars_per_token"])
        for key in states[0]
        if key in facts.LANGUAGES
    ]


def _prompts(run: RunRecord, tokenizer: Tokenizer | None) -> Mapping[str, str] | None:
    """The exact prompts: one turn, and with history. None where the template cannot be filled with placeholders."""
    if tokenizer is None:
        return None
    template = find_template(run.recipe["data"]["template"], tokenizer)
    names = {role: tokenizer.roles.get(role, "") for role in ("bos_token", "eos_token")}
    one = [{"role": "user", "content": "${content}"}]
    history = [
        {"role": "user", "content": "${previous question}"},
        {"role": "assistant", "content": "${previous answer}"},
        {"role": "user", "content": "${question}"},
    ]
    fill = compile_template(template.jinja)
    try:
        return {
            "name": template.name,
            **{
                key: fill(messages=messages, add_generation_prompt=True, **names)
                for key, messages in (("one", one), ("history", history))
            },
        }
    except TemplateRefused:
        return None


def curves(run: RunRecord) -> str:
    """The curves of every stage as one SVG file."""
    drawn = [drawing for stage in run.stages for drawing in _stage_curves(stage)]
    return picture(drawn)


def _stage_curves(stage: StageRecord) -> list[Drawing]:
    xs = [step["step"] for step in stage.steps]
    losses = [Line("training", xs, [step["loss"] for step in stage.steps], "train")]
    losses += _heldout(stage, "loss_per_answer_token")
    drawn = [
        draw_lines(f"{stage.name}: loss, nats per learned token", losses),
        draw_lines(f"{stage.name}: held-out bits per byte", _heldout(stage, "bits_per_byte")),
    ]
    return [drawing for drawing in drawn if drawing is not None]


def _heldout(stage: StageRecord, key: str) -> list[Line]:
    lines = []
    for language in ("new", "old"):
        read = [line for line in stage.heldout if language in line]
        xs, ys = [line["step"] for line in read], [line[language][key] for line in read]
        lines.append(Line(f"held-out, {language} language", xs, ys, language, marks=True))
    return lines
