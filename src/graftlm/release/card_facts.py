"""What a model card tells of a run, as values in both languages: everything read from the record, nothing typed in.

Owns which figures a card holds and how each is named in English and Chinese. Does not know the card's wording (the
`card.*.jinja` templates) or its metadata (`card.py`). What was not recorded is None and is called so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from graftlm.recipe_values import looks_like_hub_id
from graftlm.release.card_words import ACTIONS, in_chinese
from graftlm.release.record import RunRecord, StageRecord

ENDS_STEPS = 10
Told = tuple[str, str]
"""The same in English and in Chinese."""
Row = tuple[Told, list[Any]]
"""A line of a table: its name and its values."""

STATES: dict[str, Told] = {
    "base": ("base", "基座"),
    "grown": ("base with new rows, untrained", "扩词表后、训练前"),
    "model": ("finished model", "最终模型"),
}
LANGUAGES: dict[str, Told] = {"new": ("new language", "新语言"), "old": ("old language", "原语言")}
_TRAINS: dict[str, Told] = {
    "full": ("all parameters", "全部参数"),
    "lora": ("LoRA adapters", "LoRA 适配器"),
    "new-rows": ("only the rows of new pieces", "仅新词片的行"),
}
_OBJECTIVES: dict[str, Told] = {
    "dialogue": ("answers and their ends", "回答及其结束符"),
    "text": ("every token", "每个词元"),
}
_ROWS: dict[str, Told] = {
    "all": (" and all rows of embedding and head", "以及词嵌入与输出层的全部行"),
    "new": (" and the new rows of embedding and head", "以及词嵌入与输出层的新行"),
    "none": ("", ""),
}


def short_name(path_or_hub_id: str) -> str:
    """A hub id as it is; of a path only the last part: where it lay on somebody's disk is nobody's business."""
    return path_or_hub_id if is_hub_id(path_or_hub_id) else Path(path_or_hub_id).name


def is_hub_id(text: str) -> bool:
    """Whether a recipe's value names something on the hub."""
    return looks_like_hub_id(text) and not Path(text).suffix and not Path(text).exists()


def base_name(run: RunRecord) -> Told:
    """What the graft stands on."""
    model = run.recipe["base"].get("model")
    if model:
        return (short_name(model), short_name(model))
    return ("a small base trained from nothing in the same run", "同一次运行中从零训练的小基座")


def stage_table(run: RunRecord) -> list[Row]:
    """Every stage's real hyper-parameters and what it took, a column a stage; lines that say nothing are left out."""
    rows = [(name, [value(stage) for stage in run.stages]) for name, value in _STAGE_LINES]
    return [(name, values) for name, values in rows if any(value is not None for value in values)]


def stage_names(run: RunRecord) -> list[str]:
    """Names of the stages, in order."""
    return [stage.name.split("-", 1)[1] if stage.name != "0-scratch" else "0-scratch" for stage in run.stages]


def _trains(stage: StageRecord) -> Told:
    trains = stage.asked.get("trains", {})
    told = _TRAINS.get(trains.get("kind", ""), ("?", "?"))
    if trains.get("kind") != "lora":
        return told
    rows = _ROWS.get(trains.get("rows", "none"), ("", ""))
    extra = "".join(f", {name}" for name in ("rslora", "dora") if trains.get(name))
    size = f" r{trains['rank']} α{trains['alpha']:g}, dropout {trains.get('dropout', 0):g}{extra}"
    return (f"{told[0]}{size}{rows[0]}", f"{told[1]}{size}{rows[1]}")


def _objective(stage: StageRecord) -> Told | None:
    return _OBJECTIVES.get(stage.asked.get("objective", ""))


def _targets(stage: StageRecord) -> str | None:
    return ", ".join(stage.asked.get("trains", {}).get("targets", ())) or None


def _warm_up(stage: StageRecord) -> Any:
    steps = stage.asked.get("warmup_steps")
    if steps is not None:
        return (f"{steps} steps", f"{steps} 步")
    ratio = stage.asked.get("warmup_ratio")
    return None if ratio is None else (f"ratio {ratio:g}", f"比例 {ratio:g}")


def _groups(stage: StageRecord) -> str | None:
    told = [
        f"{group}: {key} {value:g}"
        for group, settings in (stage.asked.get("groups") or {}).items()
        for key, value in settings.items()
        if value is not None
    ]
    return "; ".join(told) or None


def _precision(stage: StageRecord) -> str | None:
    return stage.done.get("precision") or stage.asked.get("precision")


def _lossy(stage: StageRecord) -> Told | None:
    """What was rounded beyond the precision, on demand: these options are lossy."""
    base = stage.asked.get("frozen_base", "exact")
    if stage.asked.get("fp8"):
        return ("linear layers multiplied in FP8", "线性层以 FP8 相乘")
    return None if base == "exact" else (f"the frozen base held in {base}", f"冻结的基座以 {base} 存放")


def _loss_scale(stage: StageRecord) -> Any:
    scales = [step["loss_scale"] for step in stage.steps]
    if _precision(stage) != "fp16" or not scales:
        return None
    first, low, last = f"{scales[0]:g}", f"{min(scales):g}", f"{scales[-1]:g}"
    return (f"{first} at first, {low} at least, {last} at last", f"起始 {first}，最低 {low}，结束 {last}")


def _skipped(stage: StageRecord) -> int | None:
    return sum(bool(step["skipped"]) for step in stage.steps) if stage.steps else None


def _kept(stage: StageRecord) -> Any:
    step = stage.done.get("kept_step")
    if step is None:
        return None
    best = stage.asked.get("keep") == "best"
    return (f"step {step:,} ({'best' if best else 'last'})", f"第 {step:,} 步（{'最佳' if best else '最后'}）")


def _losses(stage: StageRecord) -> str | None:
    """Means over a tenth of the steps at either end, `ENDS_STEPS` at most: one step's rows may be easy or hard."""
    losses = [step["loss"] for step in stage.steps if math.isfinite(step["loss"])]
    num_steps = min(ENDS_STEPS, max(1, len(losses) // ENDS_STEPS))
    if not losses:
        return None
    return f"{fmean(losses[:num_steps]):.3f} → {fmean(losses[-num_steps:]):.3f}"


def _seconds(stage: StageRecord) -> float | None:
    return stage.done.get("training_seconds") or (sum(s["seconds"] for s in stage.steps) if stage.steps else None)


def _time(stage: StageRecord) -> Any:
    seconds = _seconds(stage)
    return None if seconds is None else time_told(seconds)


def time_told(seconds: float) -> Told:
    """Seconds as a card tells them."""
    if seconds >= 3600:
        return (f"{seconds / 3600:.1f} hours", f"{seconds / 3600:.1f} 小时")
    if seconds >= 60:
        return (f"{seconds / 60:.1f} minutes", f"{seconds / 60:.1f} 分钟")
    return (f"{seconds:.0f} seconds", f"{seconds:.0f} 秒")


def _speed(stage: StageRecord) -> int | None:
    seconds, tokens = _seconds(stage), sum(step["num_tokens"] for step in stage.steps)
    return round(tokens / seconds) if seconds else None


def _memory(stage: StageRecord) -> str | None:
    peak_bytes = stage.done.get("peak_memory_bytes")
    return f"{peak_bytes / 2**30:.2f} GiB" if peak_bytes else None


def _asked(key: str) -> Callable[[StageRecord], Any]:
    return lambda stage: stage.asked.get(key)


_STAGE_LINES: list[tuple[Told, Callable[[StageRecord], Any]]] = [
    (("what learns", "训练对象"), _trains),
    (("the loss counts", "计入损失的词元"), _objective),
    (("LoRA on", "LoRA 所在层"), _targets),
    (("parameters that learn", "可训练参数"), lambda stage: stage.done.get("num_learning_parameters")),
    (("epochs", "轮数"), _asked("epochs")),
    (("peak learning rate", "峰值学习率"), lambda stage: f"{stage.asked['peak_lr']:g}" if stage.asked else None),
    (("other rates by group", "各组的不同设置"), _groups),
    (("warm-up", "预热"), _warm_up),
    (("schedule", "学习率曲线"), _asked("schedule")),
    (("weight decay", "权重衰减"), _asked("weight_decay")),
    (("AdamW betas", "AdamW β"), lambda stage: ", ".join(f"{b:g}" for b in stage.asked.get("betas", ())) or None),
    (("gradient clipping", "梯度裁剪"), _asked("max_grad_norm")),
    (("rows a step (global batch)", "每步样本数（全局批量）"), _asked("batch_rows")),
    (("precision", "精度"), _precision),
    (("lossy, as asked", "按要求启用的有损选项"), _lossy),
    (("loss scale", "损失缩放"), _loss_scale),
    (("gradient checkpointing", "梯度检查点"), _asked("gradient_checkpointing")),
    (("seed", "随机种子"), _asked("seed")),
    (("seed of its first weights", "初始权重的随机种子"), lambda stage: stage.weights_seed),
    (("steps taken", "训练步数"), lambda stage: stage.done.get("num_steps") or len(stage.steps) or None),
    (("steps skipped (not finite)", "跳过的步（非有限值）"), _skipped),
    (("weights kept", "保留的权重"), _kept),
    (("tokens computed", "计算的词元数"), lambda stage: sum(s["num_tokens"] for s in stage.steps) or None),
    (("training loss, first and last (means of up to ten steps)", "首末训练损失（至多十步的平均）"), _losses),
    (("time in steps", "训练用时"), _time),
    (("tokens a second", "每秒词元数"), _speed),
    (("peak memory", "内存峰值"), _memory),
    (("machine", "硬件"), lambda stage: stage.done.get("machine")),
]


def source_table(run: RunRecord) -> list[list[Any]]:
    """What was read to learn from: name, language, rows drawn."""
    return [
        [
            short_name(source["path"]),
            LANGUAGES.get(source.get("language", "new"), ("?", "?")),
            source["sample"] if source.get("sample") else ("all", "全部"),
        ]
        for source in run.recipe["data"]["sources"]
    ]


@dataclass(frozen=True, slots=True)
class DataRows:
    """What became of all rows that were read: `num_read` = `num_kept` + `num_heldout` + `num_left_out`.

    `num_token_rows` is what the kept ones became for training, None where a run did not record it.
    """

    num_read: int
    num_kept: int
    num_heldout: int
    num_left_out: int
    num_token_rows: int | None


def data_rows(run: RunRecord) -> DataRows | None:
    """The account of the data step's rows, dialogues all."""
    if run.data is None:
        return None
    heldout, dropped = run.data.get("heldout_rows") or {}, run.data["dropped"]
    return DataRows(
        run.data["rows_read"], run.data["rows_kept"], sum(heldout.values()), sum(dropped.values()),
        run.data.get("token_rows"),
    )  # fmt: skip


def judged(run: RunRecord) -> list[tuple[Told, int | None, int]]:
    """What every state was to be judged by: language, dialogues, and the rows of tokens those are in."""
    dialogues = (run.data or {}).get("heldout_rows") or {}
    return [(LANGUAGES[key], dialogues.get(key), sum(_rows_judged(run.heldout[-1][key]))) for key in run.languages]


def has_unjudged_rows(run: RunRecord) -> bool:
    """Whether some state could not be judged by a row: longer than its context in its own tokens, or refused."""
    return any(_rows_judged(state[key])[1] for state in run.heldout for key in run.languages)


def _rows_judged(figures: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of tokens a state was judged by, and those it could not be."""
    return figures["num_rows"], figures.get("num_left_out", 0)


def heldout_table(run: RunRecord) -> list[list[Any]]:
    """Bits per byte at each state in each judged language, with interval and change against the base; rows."""
    rows = []
    for state in run.heldout:
        row: list[Any] = [STATES.get(state["state"], (f"after stage {state['state']}", f"阶段 {state['state']} 之后"))]
        for language in run.languages:
            figures = state[language]
            low, high = figures["interval"]
            row.append(f"{figures['bits_per_byte']:.3f} [{low:.3f}, {high:.3f}] ({figures['change_percent']:+.1f} %)")
            row.append(f"{figures['loss_per_answer_token']:.3f}")
            num_rows, num_left_out = _rows_judged(figures)
            whole = num_rows + num_left_out
            row.append((f"{num_rows:,} of {whole:,}", f"{num_rows:,} / {whole:,}") if num_left_out else num_rows)
        rows.append(row)
    return rows


def machines(run: RunRecord) -> list[str]:
    """The machines that took part, as recorded by the steps."""
    return list(dict.fromkeys(done["machine"] for done in run.done.values() if done.get("machine")))


def total_seconds(run: RunRecord) -> float:
    """Time of the steps that make the model; judging it and telling of it come after."""
    return sum(done["seconds"] for name, done in run.done.items() if not name.endswith(("-heldout", "-report")))


def samples(run: RunRecord, num_each: int = 2) -> list[tuple[Told, str, str]]:
    """Language, question and the finished model's answer, of the first samples of each language."""
    told = []
    for language in LANGUAGES:
        answered = [sample for sample in run.samples if sample["language"] == language and sample.get("answers")]
        for sample in answered[:num_each]:
            told.append((LANGUAGES[language], sample["prompt"][-1]["content"], list(sample["answers"].values())[-1]))
    return told


def troubles(run: RunRecord) -> list[tuple[str, Told]]:
    """What happened in training besides steps: stage, and what was done or noticed."""
    told: list[tuple[str, Told]] = []
    for stage in run.stages:
        told += [(stage.name, _intervention(line)) for line in stage.interventions]
        told += [(stage.name, (note, in_chinese(note))) for note in stage.notes]
    return told


def _intervention(line: Mapping[str, Any]) -> Told:
    action, text = str(line.get("action", "?")), str(line.get("text", ""))
    chinese = ACTIONS.get(action, action)
    return (f"{action}: {text}", f"{chinese}：{in_chinese(text)}") if text else (action, chinese)


def forgetting_percent(run: RunRecord) -> float | None:
    """By how much the old language's bits per byte changed from base to finished model."""
    return run.heldout[-1]["old"]["change_percent"] if "old" in run.languages else None
