"""A finding: one thing that is wrong with a run, the evidence for it and the cure.

Owns the words the doctor speaks in. Does not look at anything itself: pre-flight, curves and autopsy make findings,
the command line and the report show them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "fatal"]
Verdict = Literal["healthy", "recovered", "damaged", "diverged", "crashed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`cause` is a short fixed name, `where` a layer, module, row or recipe key, `step` the optimizer step (from 1).

    A note is worth reading and no alarm; a warning costs quality or time; a fatal one ends or ruins the run.
    """

    cause: str
    severity: Severity
    where: str
    step: int | None
    evidence: str
    cure: str


def alarms(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that ask for a person: everything but notes."""
    return [finding for finding in findings if finding.severity != "note"]
