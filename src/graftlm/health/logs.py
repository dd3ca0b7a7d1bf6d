"""Logs of training runs, ours and others', as one kind of record.

Owns how a run's curves are read: our `metrics.jsonl`, HF Trainer's `trainer_state.json` and console lines,
DeepSpeed's overflow lines, and CSV files of step and loss. Does not judge what it reads (`curves.py`). A log reaches as
far as it reaches: what it does not tell is None, never a guess.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.run import read_metrics

# DeepSpeed 0.9 to 0.17 print these, with and without a hysteresis left.
_OVERFLOW = re.compile(r"OVERFLOW! .*?Attempted loss scale: ([\d.e+-]+), (?:reducing to ([\d.e+-]+)|but hysteresis)")
_FLOOR = "Current loss scale already at minimum"
_PROGRESS = re.compile(r"(?:^|[\s|])(\d+)/(\d+) \[")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception): .+")
_HF_LINE = re.compile(r"\{'(?:loss|eval_loss)'.*?\}")


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One step (from 1) as far as it was logged: nats per target token, norm before clipping, scale before the step.

    `by_role` holds grad_norms, update_rms, weight_rms and zero_gradient_share, each by role (adapter, new_rows, …).
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    by_role: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def is_bad(self) -> bool:
        """Whether the loss was not finite. HF Trainer prints 0.0 for such a loss, and its norm as it is."""
        if self.loss == 0.0 and self.grad_norm is not None and math.isnan(self.grad_norm):
            return True
        return self.loss is not None and not math.isfinite(self.loss)


@dataclass(slots=True)
class RunLog:
    """A run's curves. `heldout` holds (step, loss) of the language judged by, `readings` the same of each language;
    `scales` (step, scale after) at each overflow; `ending` what was said last when the run stopped by itself: an
    error's text. `records` are the run's own course; attempts it rolled back from lie in `abandoned`, in order.
    `events` are what else happened, on those attempts too, as it was written: incidents, interventions, notes."""

    name: str
    records: list[LogRecord] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    readings: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    scales: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    abandoned: list[list[LogRecord]] = field(default_factory=list)
    ending: str = ""

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The steps that were replayed, as written."""
        return [line for line in self.events if line["event"] == "incident"]

    @property
    def interventions(self) -> list[dict[str, Any]]:
        """The times it was rolled back, as written."""
        return [line for line in self.events if line["event"] == "intervention"]

    @property
    def last_step(self) -> int:
        """The last step anything was logged of."""
        return max((*(r.step for r in self.records), *(step for step, _ in self.scales)), default=0)


def read_log(path: str | Path) -> RunLog:
    """The log in one file. Raises UserError when it is missing or holds no training log."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no log {path}.", "Give a run folder, metrics.jsonl, trainer_state.json, CSV or log.")
    text = _text_of(path)
    if path.suffix == ".jsonl":
        log = read_metrics_log(path)
    elif path.suffix == ".csv":
        log = _from_csv(path)
    elif path.suffix == ".json":
        log = _from_trainer_state(path, text)
    else:
        log = _from_console(path.name, text)
    if not log.records and not log.scales:
        raise UserError(
            f"{path} holds no training log: no loss and no overflow was found in it.",
            "Give metrics.jsonl, trainer_state.json, a CSV with the columns step and loss, or a console log.",
        )
    return log


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        # A line being written may end inside a character.
        if error.start < len(content) - 3:
            raise UserError(f"{path} is not a text file (byte {error.start}).", "Give the log itself.") from None
        return content[: error.start].decode("utf-8")


def own_and_abandoned(lines: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Lines of a metrics file apart: the run's own course, and the readings of every attempt it went back from.

    An intervention goes back to its `step`: readings (steps and held-out) beyond it that stand before it are of the
    abandoned attempt, not of the run. What was found on them, incidents, stays: it is why the run went back.
    """
    own: list[dict[str, Any]] = []
    attempts: list[list[dict[str, Any]]] = []
    for line in lines:
        if line.get("event") == "intervention":
            left = [read.get("event") in ("step", "heldout") and read["step"] > line["step"] for read in own]
            attempts.append([read for read, is_left in zip(own, left, strict=True) if is_left])
            own = [read for read, is_left in zip(own, left, strict=True) if not is_left]
        own.append(line)
    return own, attempts


def read_metrics_log(path: Path) -> RunLog:
    """A stage's `metrics.jsonl`, whole or still being written; empty where nothing was logged yet. Raises UserError."""
    lines = read_metrics(path) if path.is_file() else []
    own, attempts = own_and_abandoned(line for line in lines if isinstance(line, dict))
    log = RunLog(path.parent.name or path.name)
    try:
        log.abandoned = [[_record(line) for line in lines if line["event"] == "step"] for lines in attempts]
        for line in own:
            _add_line(log, line)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no metrics.jsonl of graftlm: {error!r}.", "Give the file as it was.") from None
    return log


def _add_line(log: RunLog, line: dict[str, Any]) -> None:
    event = line.get("event")
    if event == "step":
        log.records.append(_record(line))
        log.ending = ""  # it went on
        if line["skipped"]:
            log.scales.append((line["step"], line["loss_scale"]))
    elif event == "heldout":
        for language, reading in line.items():
            if isinstance(reading, dict):
                log.readings.setdefault(language, []).append((line["step"], reading["loss_per_answer_token"]))
        judged = line.get("new") or line.get("old")
        if judged:
            log.heldout.append((line["step"], judged["loss_per_answer_token"]))
    elif event == "stopped":
        log.ending = line["text"]
    elif event in ("incident", "intervention", "note"):
        log.events.append(line)
    elif event is None and "step" in line:
        _add_hf_line(log, line, int(line["step"]))


_BY_ROLE = ("grad_norms", "update_rms", "weight_rms", "zero_gradient_share")


def _record(line: dict[str, Any]) -> LogRecord:
    by_role = {key: line[key] for key in _BY_ROLE if key in line}
    return LogRecord(
        line["step"], line["loss"], line["lr"], line["grad_norm"], line["loss_scale"], line["skipped"], by_role
    )


def _from_csv(path: Path) -> RunLog:
    """A CSV of one curve and those beside it: NAME.train.csv, NAME.eval.csv and NAME.overflow.csv belong together."""
    name = path.name.removesuffix(".csv").rpartition(".")[0]
    parts = [path.with_name(f"{name}.{part}.csv") for part in ("train", "eval", "overflow")] if name else []
    log = RunLog(name or path.stem)
    for file in [part for part in parts if part.is_file()] or [path]:
        with file.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=2):
                _add_csv_row(log, row, f"{file}:{number}")
    return log


def _add_csv_row(log: RunLog, row: dict[str, Any], where: str) -> None:
    try:
        step = int(float(row["step"]))
        if row.get("scale_after"):
            log.scales.append((step, float(row["scale_after"])))
        elif row.get("eval_loss"):
            log.heldout.append((step, float(row["eval_loss"])))
        elif row.get("loss"):
            lr, norm = row.get("learning_rate") or row.get("lr"), row.get("grad_norm")
            log.records.append(
                LogRecord(step, float(row["loss"]), float(lr) if lr else None, float(norm) if norm else None)
            )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where}: not a row of a training log.",
            "The columns step and loss are needed; eval_loss, scale_after, learning_rate and grad_norm are understood.",
        ) from None


def _from_trainer_state(path: Path, text: str) -> RunLog:
    try:
        history = json.loads(text)["log_history"]
        log = RunLog(path.parent.name or path.name)
        for line in history:
            _add_hf_line(log, line, int(line["step"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no trainer_state.json of HF Trainer.", "Give the file from a checkpoint.") from None
    return log


def _add_hf_line(log: RunLog, line: dict[str, Any], step: int) -> None:
    if "eval_loss" in line:
        log.heldout.append((step, float(line["eval_loss"])))
    elif "loss" in line:
        norm = line.get("grad_norm")
        log.records.append(
            LogRecord(step, float(line["loss"]), line.get("learning_rate"), None if norm is None else float(norm))
        )


def _from_console(name: str, text: str) -> RunLog:
    """Lines as HF Trainer and DeepSpeed print them. Steps come from the progress bar where one was printed, else lines
    are counted."""
    log = RunLog(name)
    step, has_bar = 0, bool(_PROGRESS.search(text))
    for line in re.split(r"[\r\n]+", text):
        bar, overflow, losses = _PROGRESS.search(line), _OVERFLOW.search(line), _HF_LINE.findall(line)
        if bar:
            step = int(bar[1])
        elif not has_bar:
            step += bool(overflow or losses)
        if overflow:
            log.scales.append((step, float(overflow[2] or overflow[1])))
        for found in losses:
            _add_hf_line(log, _literal(found), step)
        if losses:
            log.ending = ""  # it went on
        if _FLOOR in line or _ERROR.match(line):
            log.ending = line.strip()
    return log


def _literal(text: str) -> dict[str, Any]:
    """A printed dict; `nan` and `inf` are numbers there and not Python."""
    try:
        return ast.literal_eval(re.sub(r"\b(nan|inf)\b", r"'\1'", text))
    except (ValueError, SyntaxError):
        return {}


def finite_losses(records: Iterable[LogRecord]) -> Iterator[tuple[int, float]]:
    """(step, loss) of every record that has a finite loss."""
    return ((r.step, r.loss) for r in records if r.loss is not None and not r.is_bad)
