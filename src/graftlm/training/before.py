"""What is seen and refused before a stage's first step, on all its ranks at once.

Owns the order of these looks and what each verdict does. How they look is in `look.py` and `room.py`, how they judge in
`health/preflight.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftlm.device import Precision
from graftlm.errors import NumericalStop, UserError
from graftlm.health.autopsy import PREFLIGHT
from graftlm.health.finding import Finding
from graftlm.health.look import Look
from graftlm.health.preflight import preflight
from graftlm.health.probe import NameOf
from graftlm.model.causal import body_of
from graftlm.model.packed import refuse_longer_rows
from graftlm.recipe import Stage
from graftlm.run import Metrics, json_values, say, write_json
from graftlm.training.batches import Steps
from graftlm.training.look import take_look
from graftlm.training.ranks import Ranks
from graftlm.training.room import memory_finding


@dataclass(frozen=True, slots=True)
class BeforeFirstStep:
    """A stage prepared and not yet begun."""

    model: Any
    stage: Stage
    steps: Steps
    precision: Precision
    first_new_id: int | None
    name_of: NameOf
    ranks: Ranks

    def look(self) -> tuple[Look, list[Finding]]:
        """What one rank sees, and the findings; where weights come from several ranks, all must call it together."""
        tight = self._tight()
        look = take_look(
            self.model, self.steps, self.stage, self.precision, self.first_new_id, self.name_of, self.ranks
        )
        return look, [*([tight] if tight else []), *preflight(look)]

    def refuse(self, folder: Path, metrics: Metrics) -> None:
        """Keep what is seen in `folder`. Raises, on every rank, UserError for rows too long or too little memory, and
        NumericalStop on a fatal finding, the latter two unless the stage wants no doctor."""
        refuse_longer_rows(body_of(self.model), int(self.steps.rows.lengths.max(initial=0)))
        self._refuse_tight()
        seen = self.look() if self.ranks.mesh is not None else None
        self.ranks.from_first(lambda: self._refuse_fatal(folder, metrics, *(seen or self.look())))

    def _tight(self) -> Finding | None:
        return memory_finding(self.model, self.stage, self.steps, self.precision, self.first_new_id, self.ranks)

    def _refuse_tight(self) -> None:
        """Before a pass that may end in a kill; each machine has its own memory."""
        tight = self._tight()
        is_fatal = tight is not None and tight.severity == "fatal" and self.stage.recovery != "off"
        for told in self.ranks.gather([tight.evidence, tight.cure] if tight and is_fatal else None):
            if told:
                raise UserError(f"{self.stage.name}, before the first step: {told[0]}", told[1])

    def _refuse_fatal(self, folder: Path, metrics: Metrics, look: Look, findings: Sequence[Finding]) -> None:
        told = {"findings": [asdict(f) for f in findings], "look": asdict(look)}
        write_json(folder / PREFLIGHT, json_values(told))
        for finding in findings:
            if finding.severity == "fatal" and self.stage.recovery != "off":
                text = f"{self.stage.name}, before the first step: {finding.evidence}"
                metrics.append("stopped", step=0, text=text)
                raise NumericalStop(text, finding.cure)
            if finding.severity != "note":
                say(f"{self.stage.name}, before the first step: {finding.evidence} {finding.cure}")
