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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.run import read_metrics

# DeepSpeed 0.9 to 0.17 print these, with and without a hysteresis left.
_OVERFLOW = re.compile(r"OVERFLOW! .*?Attempted loss scale: ([\d.e+-]+), (?:reducing to ([\d.e+-]+)|but hysteresis)")
_FLOOR = "Current loss scale already at minimum"
_PROGRESS = re.compile(r"(?:^|[\s|])(\d+)/(\d+) \[")
_HF_LINE = re.compile(r"\{'(?:loss|eval_loss)'.*?\}")


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One step (from 1) as far as it was logged: nats per target token, norm before clipping, scale before the step."""

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    loss_scale: float | None = None
    skipped: bool = False


@dataclass(slots=True)
class RunLog:
    """A run's curves. `heldout` holds (step, loss); `scales` (step, scale after) at each overflow; `ending` what was
    said last when the run stopped by itself: an error's text."""

    name: str
    records: list[LogRecord] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    scales: list[tuple[int, float]] = field(default_factory=list)
    interventions: list[dict[str, Any]] = field(default_factory=list)
    ending: str = ""

    @property
    def last_step(self) -> int:
        """The last step anything was logged of."""
        return max((*(r.step for r in self.records), *(step for step, _ in self.scales)), default=0)


def read_log(path: str | Path) -> RunLog:
    """The log in one file. Raises UserError when it is missing or holds no training log."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no log {path}.", "Give a run folder, metrics.jsonl, trainer_state.json, CSV or log.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (byte {error.start}).", "Give the log itself.") from None
    if path.suffix == ".jsonl":
        log = _from_metrics(path)
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


def _from_metrics(path: Path) -> RunLog:
    log = RunLog(path.parent.name or path.name)
    for line in read_metrics(path):
        event = line.get("event")
        if event == "step":
            log.records.append(
                LogRecord(
                    line["step"], line["loss"], line["lr"], line["grad_norm"], line["loss_scale"], line["skipped"]
                )
            )
            if line["skipped"]:
                log.scales.append((line["step"], line["loss_scale"]))
        elif event == "heldout":
            reading = line.get("new") or line.get("old")
            if reading:
                log.heldout.append((line["step"], reading["loss_per_answer_token"]))
        elif event == "intervention":
            log.interventions.append(line)
        elif event == "stopped":
            log.ending = line["text"]
    return log


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
        if _FLOOR in line:
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
    return ((r.step, r.loss) for r in records if r.loss is not None and math.isfinite(r.loss))
