"""Held-out readings in training: the best weights are kept, and training may stop when they no longer improve.

Owns when to read, what counts as better (bits per byte in the new language, or the only one there is; the weights a
stage of dialogues began with take part), the best weights on disk, and what of this must survive an interruption. Does
not know steps or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from graftlm.device import Precision
from graftlm.recipe import Stage
from graftlm.run import Metrics
from graftlm.text.rows import TokenRows
from graftlm.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, step_folder
from graftlm.training.heldout import heldout_losses
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.saving import Saver
from graftlm.training.saving_parts import PartSaver

READINGS_BY_DEFAULT = 5


class HeldoutWatch:
    """A stage's held-out readings. `is_over` turns true when `early_stop_after` of them in a row were not better."""

    def __init__(
        self,
        stage: Stage,
        heldout: Mapping[str, TokenRows],
        num_steps: int,
        folder: Path,
        metrics: Metrics,
        saver: Saver | PartSaver,
        ranks: Ranks = ALONE,
    ) -> None:
        self.saver, self.ranks = saver, ranks
        self.stage, self.heldout, self.num_steps, self.metrics = stage, heldout, num_steps, metrics
        self.folder = folder / "best"
        self.every = stage.heldout_every or math.ceil(num_steps / READINGS_BY_DEFAULT)
        self.best_loss = math.inf
        self.readings_since_best = 0

    def is_due(self, step: int) -> bool:
        """Whether to read after `step` steps: every so often, and at the end."""
        return step % self.every == 0 or step == self.num_steps

    @property
    def is_over(self) -> bool:
        """Whether training should stop here."""
        limit = self.stage.early_stop_after
        return limit is not None and self.readings_since_best >= limit

    def read(
        self, step: int, model: Any, precision: Precision, weights: Callable[[], dict[str, torch.Tensor]]
    ) -> float | None:
        """Read the held-out loss after `step` steps and note it; what `weights` returns is kept when it is the best:
        all ranks ask for it together.

        Returns nats per answer token in the language judged by, None without held-out rows.
        """
        readings = {}
        for language, rows in self.heldout.items():
            losses = heldout_losses(
                model, rows, precision, self.stage.micro_batch_tokens, f"held-out {language}", self.ranks
            )
            readings[language] = {
                "bits_per_byte": losses.bits_per_byte,
                "loss_per_answer_token": losses.loss_per_target,
                "num_rows": len(rows),
            }
        self.metrics.append("heldout", step=step, **readings)
        if not readings:
            return None
        judged = readings.get("new") or next(iter(readings.values()))
        if judged["bits_per_byte"] >= self.best_loss:
            self.readings_since_best += 1
            return judged["loss_per_answer_token"]
        self.best_loss, self.readings_since_best = judged["bits_per_byte"], 0
        if self.stage.keep == "best" and (step > 0 or self._start_counts):
            best = Checkpoint({"weights": weights()}, {"step": step})
            self.saver.save(step_folder(self.folder, step), best, num_kept=1)
        return judged["loss_per_answer_token"]

    @property
    def _start_counts(self) -> bool:
        """Whether the weights the stage began with may be the best. Not for texts: dialogues held out do not show what
        they teach, and a stage judged by them alone would often be undone."""
        return self.stage.objective == "dialogue"

    def best(self) -> Checkpoint | None:
        """The best weights and their step; None when the stage keeps its last ones or never got better."""
        folder = newest_checkpoint(self.folder) if self.stage.keep == "best" else None
        return load_checkpoint(folder) if folder is not None else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        best_loss = None if math.isinf(self.best_loss) else self.best_loss
        return {"best_loss": best_loss, "readings_since_best": self.readings_since_best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.readings_since_best = state["readings_since_best"]
