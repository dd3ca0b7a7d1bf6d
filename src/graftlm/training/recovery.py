"""What is done when a step goes wrong: replayed, told, rolled back from; and when to give up.

Owns the decision and its budget: which skipped steps are replayed, what counts as trouble, where to go back to, how the
learning rate is cut. Does not run passes (`replay.py`) and does not touch weights: the stage rolls back, asked by a
`Trouble` raised here. `stage.recovery` says how far this goes: automatic, advise (replay and tell), or off.

The cure is the one that was measured to work (docs/why-lora-diverges.md): the last good state and a tenth of the rate;
`health/rates.py` says whose. Trouble again from that same state tells of the state alone, and not of the lower rate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from graftlm.device import random_states
from graftlm.errors import NumericalStop
from graftlm.health.incident import HOPELESS, HOPELESS_IN_A_ROW, Incident, finding_of
from graftlm.health.rates import RateCuts, hottest_first, rate_cuts_of
from graftlm.health.watch import LossWatch
from graftlm.recipe import Stage
from graftlm.run import Metrics, say
from graftlm.training.checkpoint import Stored, good_checkpoints, stored_checkpoint, whole_checkpoints
from graftlm.training.loop import StepRecord
from graftlm.training.replay import SkippedStep

REPLAYED_IN_A_ROW = (1, 3, 9, 27, 52)  # of an unbroken run of skipped steps: a falling scale needs no more looks
MOST_REPLAYS = 50


class Trouble(Exception):
    """The run should not go on as it is; the text says why."""


class Recovery:
    """A stage's doctor at the bedside: an observer of every step."""

    def __init__(
        self,
        stage: Stage,
        metrics: Metrics,
        take_again: Callable[[SkippedStep], Incident],
        blame: Callable[[int, float], tuple[str, ...]],
        keep_batch: Callable[[int], tuple[str, tuple[int, ...]]],
    ) -> None:
        self.stage, self.metrics, self._take_again, self._blame = stage, metrics, take_again, blame
        self._keep_batch = keep_batch
        self.watch = LossWatch()
        self.rates = RateCuts()
        self.num_rollbacks = 0
        self._in_a_row = self._num_replays = 0
        self._is_risen = False
        self._went_back_to = ""
        self._last: Incident | None = None
        self._random: Mapping[str, Tensor] = random_states()

    @property
    def is_calm(self) -> bool:
        """Whether the state of this moment is one to go back to."""
        return self._in_a_row == 0 and self.watch.is_calm

    def see(self, record: StepRecord) -> None:
        """Look at a finished step. Raises Trouble where the stage mends itself and should roll back."""
        self._in_a_row = self._in_a_row + 1 if record.skipped else 0
        eye = None if record.skipped else self.watch.see(record.loss)
        if self.stage.recovery == "off":
            return  # nothing is done, but which states were good is known
        if record.skipped:
            self._see_skipped(record.step, record.loss_scale)
        elif eye is not None:
            self._see_rise(record.step, eye.last, eye.best)
        else:
            self._is_risen = False
        self._random = random_states()

    def see_heldout(self, step: int, loss: float) -> None:
        """Look at a held-out reading (nats per answer token) after `step` steps. Raises Trouble as `see` does."""
        # Texts are another kind of row than the dialogues held out: learning them may cost a little there.
        if self.stage.recovery == "off" or self.stage.objective == "text":
            return
        if self.watch.see_heldout(loss) and self.watch.heldout_before is not None:
            self._see_rise(step, loss, self.watch.heldout_before)

    def _see_rise(self, step: int, loss: float, best: float) -> None:
        """The loss is far above its best: once for every rise, not for every step of it."""
        if self._is_risen:
            return
        self._is_risen = True
        culprits = self._blame(step - 1, best)
        self._note(Incident(step, "loss-rose", 1.0, culprits=culprits, loss=loss, best=best))
        self._trouble("the loss rose")

    def see_stop(self, stop: NumericalStop, step: int, loss_scale: float) -> None:
        """Look at the step (from 1) at which the loss scale or the skips reached their limit.

        Raises `stop` where nothing but the scale is to blame, or nobody asked why.
        """
        if self.stage.recovery == "off" or self._replay(step, loss_scale).cause == "scale-too-high":
            self.metrics.append("stopped", step=step, text=stop.problem)
            raise stop

    def _see_skipped(self, step: int, loss_scale: float) -> None:
        if self._in_a_row not in REPLAYED_IN_A_ROW or self._num_replays >= MOST_REPLAYS:
            return
        incident = self._replay(step, loss_scale)
        if incident.cause in HOPELESS and self._in_a_row >= HOPELESS_IN_A_ROW:
            self._trouble(f"{self._in_a_row} steps in a row were not finite, and no loss scale helps")

    def _replay(self, step: int, loss_scale: float) -> Incident:
        self._num_replays += 1
        incident = self._take_again(SkippedStep(step - 1, loss_scale, self._random))
        self._note(incident)
        return incident

    def _note(self, incident: Incident) -> None:
        incident = replace(incident, culprits=tuple(hottest_first(incident.culprits, self._own_rates())))
        finding = finding_of(incident)
        if finding.severity != "note":
            batch_file, batch_rows = self._keep_batch(incident.step)
            incident = replace(incident, batch_file=batch_file, batch_rows=batch_rows)
        self._last = incident
        self.metrics.append("incident", **asdict(incident))
        if finding.severity != "note":
            say(f"{self.stage.name}, step {incident.step}: {finding.evidence}")

    def _trouble(self, text: str) -> None:
        if self.stage.recovery == "automatic":
            raise Trouble(text)
        say(f"{self.stage.name}: {text}; advice: roll back and cut the rate (recovery: automatic does it)")

    def roll_back(self, why: str, step: int, checkpoints: Path) -> Stored:
        """The last good state, and the rate cut; what came after it is removed and the intervention written down.

        Where trouble came again from a state gone back to, that state was no good: the one before it is taken, and the
        rate, already cut for what that state did, is left.
        Raises NumericalStop when the budget is used up, or nothing good is left to go back to.
        """
        candidates = good_checkpoints(checkpoints)
        is_beyond_budget = self.num_rollbacks >= self.stage.max_rollbacks
        if not candidates or self.stage.recovery != "automatic" or is_beyond_budget:
            self._give_up(why, step)
        is_state_bad = len(candidates) > 1 and candidates[-1].name == self._went_back_to
        if is_state_bad:
            candidates.pop()
        good = candidates[-1]
        saved = stored_checkpoint(good)
        for later in (folder for folder in whole_checkpoints(checkpoints) if folder.name > good.name):
            shutil.rmtree(later, ignore_errors=True)
        before, number = self.rates, self.num_rollbacks + 1
        culprits = self._last.culprits if self._last else ()
        rates = before if is_state_bad else before.cut(culprits, self.stage.peak_lr, self._own_rates())
        self.restore(saved.values["recovery"])
        self.rates, self.num_rollbacks, self._in_a_row = rates, number, 0
        self._went_back_to = good.name
        since = ", since the later state was no good either" if is_state_bad else ""
        text = f"Step {step}: {self._told(why)} Rolled back to step {saved.values['step']}{since}; {rates.told()}."
        self.metrics.append(
            "intervention", step=saved.values["step"], number=number, at_step=step, action="rollback",
            cut=rates.roles_cut_since(before), **rates.state(), text=text,
        )  # fmt: skip
        say(f"{self.stage.name}: {text}")
        return saved

    def _own_rates(self) -> dict[str, float | None]:
        return {role: getattr(self.stage.groups, role).peak_lr for role in type(self.stage.groups).model_fields}

    def _told(self, why: str) -> str:
        """Why, and what the last replay found."""
        return f"{why.rstrip('.')}. {finding_of(self._last).evidence if self._last else ''}".strip()

    def _give_up(self, why: str, step: int) -> NoReturn:
        count = self.num_rollbacks
        tried = f" {count} rollback{'s' if count > 1 else ''} did not help." if count else ""
        text = f"{self.stage.name}, step {step}: {self._told(why)}{tried}"
        self.metrics.append("stopped", step=step, text=text)
        cure = finding_of(self._last).cure if self._last else "Lower peak_lr."
        raise NumericalStop(text, f"{cure} Evidence: graftlm autopsy {self.metrics.path.parent.parent}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {
            "watch": self.watch.state(),
            **self.rates.state(),
            "num_rollbacks": self.num_rollbacks,
            "in_a_row": self._in_a_row,
            "num_replays": self._num_replays,
            "is_risen": self._is_risen,
            "went_back_to": self._went_back_to,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned; random states are those of this moment, so restore them before."""
        self.watch.restore(state["watch"])
        self.rates, self.num_rollbacks = rate_cuts_of(state), state["num_rollbacks"]
        self._in_a_row, self._num_replays = state["in_a_row"], state["num_replays"]
        self._is_risen, self._went_back_to = state["is_risen"], state["went_back_to"]
        self._random = random_states()
