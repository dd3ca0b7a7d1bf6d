"""Logs of training runs, ours and others', as one kind of record.

Owns how a run's curves are read: our `metrics.jsonl`, HF Trainer's `trainer_state.json`, and CSV files of step and
loss; pasted console logs are read in `console.py`. Does not judge what it reads (`curves.py`). A log reaches as far as
it reaches: what it does not tell is None, never a guess.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.health.console import read_console
from graftlm.health.records import LogRecord, RunLog, add_hf_line
from graftlm.run import read_metrics


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
        log = read_console(path.name, text)
    if not (log.records or log.scales or log.events):
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
        what = f"a line has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no metrics.jsonl of graftlm: {what}.", "Give the file as it was.") from None
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
        add_hf_line(log, line, int(line["step"]))


_BY_ROLE = ("grad_norms", "update_rms", "weight_rms", "zero_gradient_share")


def _record(line: dict[str, Any]) -> LogRecord:
    by_role = {key: line[key] for key in _BY_ROLE if key in line}
    return LogRecord(
        line["step"], line["loss"], line["lr"], line["grad_norm"], line["loss_scale"], line["skipped"], by_role=by_role
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
            add_hf_line(log, line, int(line["step"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no trainer_state.json of HF Trainer.", "Give the file from a checkpoint.") from None
    return log
