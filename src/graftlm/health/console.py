"""Console logs as HF Trainer and DeepSpeed print them, pasted into a file.

Owns the lines that are understood and how their steps are counted. Where a progress bar was printed, steps come from
it. Else every loss line and every overflow line is a step, a loss line behind overflows tells of the last of those, and
DeepSpeed's own reports say where the count stands.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from graftlm.health.records import LogRecord, RunLog, add_hf_line

# DeepSpeed 0.9 to 0.17 print these, with and without a hysteresis left.
_OVERFLOW = re.compile(r"OVERFLOW! .*?Attempted loss scale: ([\d.e+-]+), (?:reducing to ([\d.e+-]+)|but hysteresis)")
_FLOOR = "Current loss scale already at minimum"
_PROGRESS = re.compile(r"(?:^|[\s|])(\d+)/(\d+) \[")
_REPORT = re.compile(r"\bstep=(\d+), skipped=(\d+), lr=\[([\d.e+-]+)")
_LOSS_REPORT = re.compile(r"\bsteps: (\d+) loss: ([\d.e+-]+|nan|inf) iter time")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception): .+")
_HF_LINE = re.compile(r"\{'(?:loss|eval_loss)'.*?\}")


def read_console(name: str, text: str) -> RunLog:
    """The curves in a console log's text."""
    console = _Console(RunLog(name), has_bar=bool(_PROGRESS.search(text)))
    for line in re.split(r"[\r\n]+", text):
        console.see(line)
    return console.log


@dataclass(slots=True)
class _Console:
    """Where reading stands: the step, and what DeepSpeed's last report said (steps, steps skipped)."""

    log: RunLog
    has_bar: bool
    step: int = 0
    reported: tuple[int, int] = (0, 0)
    num_overflows: int = 0  # since the last loss line

    def see(self, line: str) -> None:
        """Take in one line."""
        if bar := _PROGRESS.search(line):
            self.step = int(bar[1])
        if overflow := _OVERFLOW.search(line):
            self._count(1)
            self.num_overflows += 1
            self.log.scales.append((self.step, float(overflow[2] or overflow[1])))
        if report := _REPORT.search(line):
            self._see_report(int(report[1]), int(report[2]), float(report[3]))
        if report := _LOSS_REPORT.search(line):
            self.step = max(self.step, int(report[1]))
            self._add(LogRecord(self.step, float(report[2])))
        if losses := _HF_LINE.findall(line):
            self._count(not self.num_overflows)
            self.num_overflows = 0
            for found in losses:
                add_hf_line(self.log, _literal(found), self.step)
            self.log.ending = ""  # it went on
        if _FLOOR in line or _ERROR.match(line):
            self.log.ending = line.strip()

    def _count(self, num_steps: int) -> None:
        self.step += 0 if self.has_bar else num_steps

    def _see_report(self, step: int, num_skipped: int, lr: float) -> None:
        before, skipped_before = self.reported
        self.reported = step, num_skipped
        self.step = max(self.step, step)
        if 0 < step - before == num_skipped - skipped_before and not self.log.scales:
            for skipped in range(before + 1, step + 1):  # all of them; of a part nobody knows which
                self._add(LogRecord(skipped, skipped=True))
        else:
            self._add(LogRecord(step, lr=lr))

    def _add(self, record: LogRecord) -> None:
        self.log.records.append(record)
        self.log.ending = ""


def _literal(text: str) -> dict[str, Any]:
    """A printed dict; `nan` and `inf` are numbers there and not Python."""
    try:
        return ast.literal_eval(re.sub(r"\b(nan|inf)\b", r"'\1'", text))
    except (ValueError, SyntaxError):
        return {}
