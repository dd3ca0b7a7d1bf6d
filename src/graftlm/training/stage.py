"""One stage around the loop: what learns, from which rows, saved and resumed how.

Owns resuming and what surrounds the steps. The loop knows none of it: everything hangs on `on_step`. A stage's result
is one file of trained tensors, kept and put back by `trained.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graftlm.device import (
    forget_peak_memory,
    peak_memory_bytes,
    random_states,
    restore_random_states,
    seed_everything,
)
from graftlm.errors import Interrupted, NumericalStop, UserError
from graftlm.health.finding import Finding
from graftlm.health.incident import Incident
from graftlm.health.look import Look
from graftlm.health.probe import NameOf, no_name
from graftlm.malloc import HeapTrim
from graftlm.model.causal import body_of
from graftlm.model.halves import joined_by_name
from graftlm.model.packed import attention_in_words
from graftlm.recipe import Stage
from graftlm.run import Metrics, read_metrics, say
from graftlm.text.rows import TokenRows
from graftlm.training.ablation import blame_for_rise
from graftlm.training.batches import Steps
from graftlm.training.before import BeforeFirstStep
from graftlm.training.best import HeldoutWatch
from graftlm.training.checkpoint import (
    Checkpoint,
    Stored,
    load_checkpoint,
    newest_good_weights,
    newest_stored,
    precision_begun_in,
    save_checkpoint,
    step_folder,
)
from graftlm.training.engine import make_engine
from graftlm.training.evidence import keep_batch
from graftlm.training.loop import StepRecord, train
from graftlm.training.optim import cut_peak_rates, learning_rate_shape
from graftlm.training.precision import make_precision
from graftlm.training.prepared import prepared, sparing_of
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.recorder import Recorder
from graftlm.training.recovery import Recovery, Trouble
from graftlm.training.replay import SkippedStep, replay
from graftlm.training.room import holds_copy
from graftlm.training.saving import facts_of_saves
from graftlm.training.saving_parts import PartSaver, make_saver
from graftlm.training.show import steps_shown
from graftlm.training.stopping import StopAsked
from graftlm.training.together import checkpoint_from_first, gravest
from graftlm.training.trainable import trainable_parameters
from graftlm.training.trained import TRAINED

STATE_GROUPS = ("weights", "optimizer", "random")
CHECKPOINTS_BY_DEFAULT = 10


class _EarlyStop(Exception):
    """Held-out loss has not improved for long enough."""


class StageRun:
    """A stage in progress: the state that must survive an interruption, and the observers that keep it safe.

    `saves_beside`: checkpoints are written while training goes on, where memory allows; the same bytes either way.
    """

    def __init__(
        self,
        model: Any,
        stage: Stage,
        rows: TokenRows,
        heldout: dict[str, TokenRows],
        folder: Path,
        device: torch.device,
        first_new_id: int | None,
        name_of: NameOf = no_name,
        ranks: Ranks = ALONE,
        saves_beside: bool = True,
    ) -> None:
        self.stage, self.folder, self.ranks = stage, folder, ranks
        self.first_new_id, self.name_of = first_new_id, name_of
        self.checkpoints = folder / "checkpoints"
        self.metrics = Metrics(folder / "metrics.jsonl", ranks.is_first)
        seed_everything(stage.seed)
        self.precision = make_precision(stage, device, self._begun_in(), ranks.hold_all)
        self.prepared = prepared(model.float(), stage, self.precision.compute_dtype, device, first_new_id, ranks)
        self.model = self.prepared.model
        self.attention = attention_in_words(body_of(self.model), device, self.precision.compute_dtype)
        self.num_learning = sum(p.numel() for p in trainable_parameters(self.model).values())
        self.engine = make_engine(self.model, stage, ranks, self.prepared.halves.low_of)
        self.parts, self.optimizer = self.engine.parts, self.engine.optimizer
        self.steps = Steps(
            rows,
            batch_rows=stage.batch_rows,
            micro_batch_tokens=stage.micro_batch_tokens,
            epochs=stage.epochs,
            seed=stage.seed,
            sparing=sparing_of(stage, self.model, self.precision, ranks),
            rank=ranks.rank,
            num_ranks=ranks.count,
            is_even=ranks.pass_together,
        )
        num_steps = self.steps.num_steps
        self.step = self.num_updates = 0
        self.ranks.draw_apart(self.stage.seed, self.step)
        in_hand = (self.model, stage, self.steps, self.precision, first_new_id, ranks)
        self.saver = make_saver(
            self.metrics, self.parts, folder, lambda num_savers: saves_beside and holds_copy(*in_hand, num_savers)
        )
        self.watch = HeldoutWatch(stage, heldout, num_steps, folder, self.metrics, self.saver, ranks)
        self.recorder = Recorder(self.parts.recorded, self.parts.mean, self.prepared.halves.low_of)
        self.recovery = Recovery(stage, self.metrics, self._take_again, self._blame, self._keep_batch)
        self.checkpoint_every = stage.checkpoint_every or max(1, math.ceil(num_steps / CHECKPOINTS_BY_DEFAULT))
        self.stop = StopAsked()

    def state(self) -> Checkpoint:
        """All that the next step depends on, as far as this rank saves it; all ranks must call it together."""
        values = {
            "step": self.step,
            "num_updates": self.num_updates,
            "heldout": self.watch.state(),
            "scaler": self.precision.scaler.state() if self.precision.scaler else None,
            "skips_in_a_row": self.precision.skips_in_a_row,
            "precision": self.precision.name,
            "recovery": self.recovery.state(),
            "is_good": self.recovery.is_calm,
        }
        tensors = {
            "weights": self._weights(),
            "optimizer": self.saver.taken(self.parts, self.engine.moments()),
            "random": random_states() if self.ranks.is_first else {},
        }
        return Checkpoint(tensors, values)

    def resume(self) -> bool:
        """Go back to the newest complete checkpoint; returns whether there was one. Raises UserError."""
        saved = self._from_first(lambda: newest_stored(self.checkpoints, STATE_GROUPS))
        if saved is None:
            self.metrics.cut_after(-1)
            return False
        self._go_back_to(saved)
        self.recovery.restore(saved.values["recovery"])
        self.metrics.cut_after(self.step, self.recovery.num_rollbacks)
        say(f"{self.stage.name}: continuing after step {self.step} of {self.steps.num_steps}")
        return True

    def _go_back_to(self, saved: Checkpoint) -> None:
        # `auto` may mean something else on this machine: what was begun goes on as it was begun.
        begun_in, is_whole = saved.values["precision"], self.ranks.hold_all
        self.precision = make_precision(self.stage, self.precision.device, begun_in, is_whole)
        self.prepared.hold_for(self.precision.compute_dtype, self.precision.device)
        self.engine.put_back(saved.tensors["weights"], saved.tensors["optimizer"])
        restore_random_states(saved.tensors["random"])
        values = saved.values
        self.step, self.num_updates = values["step"], values["num_updates"]
        self.watch.restore(values["heldout"])
        self.precision.skips_in_a_row = values["skips_in_a_row"]
        if self.precision.scaler and values["scaler"]:
            self.precision.scaler.restore(values["scaler"])
        self.ranks.draw_apart(self.stage.seed, self.step)
        self.recorder.read()  # what moved here was no step

    def run(self) -> None:
        """Train to the end, or raise Interrupted after saving. Raises UserError, NumericalStop, DiskError too."""
        with self.ranks.passes_answered(), self.saver.settled():
            self._run()

    def _run(self) -> None:
        if not self.saver.in_background:
            say(f"{self.stage.name}: a step waits while a checkpoint is written: memory holds no copy of it")
        where = self.precision.device.type + self.ranks.in_words()
        how = f"attention by {self.attention}{self.prepared.in_words()}"
        say(f"{self.stage.name}: {self.precision.name} on {where}, {how}")
        forget_peak_memory(self.precision.device)
        if not self.resume():
            with self.engine.whole_weights():
                self._before().refuse(self.folder, self.metrics)
            self._read_heldout(0)
            if self.stage.recovery != "off":
                self._save()  # the first state to go back to, or to put back for a moment to tell who is to blame
        try:
            with self.stop.heard():
                while self.step < self.steps.num_steps:
                    self._train_or_roll_back()
        except _EarlyStop:
            say(f"{self.stage.name}: held-out loss stopped improving; stopped after step {self.step}")
            self.metrics.append("note", step=self.step, text="stopped early: held-out loss no longer improves")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.stage.name}: out of memory after step {self.step}: {str(error).splitlines()[0]}",
                f"Lower micro_batch_tokens (now {self.stage.micro_batch_tokens}) or set gradient_checkpointing: true; "
                "neither starts the stage anew: it goes on from its last checkpoint.",
            ) from None
        if self.num_updates == 0:
            text = (
                f"{self.stage.name}: each of its {self.step} steps had gradients that are not finite; nothing was "
                f"learned (loss scale {self.precision.loss_scale:g})."
            )
            self.metrics.append("stopped", step=self.step, text=text)
            raise NumericalStop(text, "Lower loss_scale.initial or peak_lr, or use precision bf16 or fp32.")
        self._keep_result()
        if self.stop.is_asked:
            raise Interrupted(f"{self.stage.name}: all {self.step} steps taken and saved; stopped before what follows")

    def look(self) -> tuple[Look, list[Finding]]:
        """The pre-flight of a stage not yet begun: what was seen, and the findings."""
        return self._before().look()

    def _before(self) -> BeforeFirstStep:
        return BeforeFirstStep(
            self.model, self.stage, self.steps, self.precision, self.first_new_id, self.name_of, self.ranks
        )

    def untrained_model(self) -> Any:
        """The plain model as the stage found it: for a stage that was only looked at."""
        return self.prepared.untrained()

    def _keep_batch(self, step: int) -> tuple[str, tuple[int, ...]]:
        return keep_batch(self.folder, self.steps, step) if self.ranks.is_first else ("", ())

    def _train_or_roll_back(self) -> None:
        try:
            self._train()
        except Trouble as trouble:
            self._roll_back(str(trouble))
        except NumericalStop as stop:
            self.recovery.see_stop(stop, self.step + 1, self.precision.loss_scale)
            self._roll_back(stop.problem)

    def _roll_back(self, why: str) -> None:
        self.saver.wait()
        saved = self._from_first(lambda: self.recovery.roll_back(why, self.step, self.checkpoints))
        assert saved is not None
        self._go_back_to(saved)
        self.recovery.restore(self.ranks.from_first(self.recovery.state))
        self._save()  # so that a run killed from here on goes on with the rate cut

    def _take_again(self, skipped: SkippedStep) -> Incident:
        good = self._last_good()
        given = (self.steps, skipped, self.precision, good, self.first_new_id, self.name_of, self.ranks)
        with self.engine.whole_weights():
            own = replay(self.model, *given)
        return gravest(self.ranks, own)

    def _blame(self, step: int, best: float) -> tuple[str, ...]:
        good = self._last_good()
        with self.engine.whole_weights():
            return blame_for_rise(self.model, self.steps, step, self.precision, good, best, self.ranks)

    def _last_good(self) -> dict[str, torch.Tensor] | None:
        self.saver.wait()
        saved = self._from_first(lambda: newest_good_weights(self.checkpoints))
        return None if saved is None else saved.tensors["weights"]

    def _train(self) -> None:
        num_steps = self.steps.num_steps
        shape = learning_rate_shape(self.stage, num_steps)
        cut_peak_rates(self.optimizer, self.recovery.rates.of_roles)
        with steps_shown(self.stage.name, num_steps, self.step) as show:
            train(
                self.model,
                self.steps,
                first_step=self.step,
                num_updates=self.num_updates,
                lr_at=lambda updates: self.recovery.rates.of_all * shape(updates),
                optimizer=self.optimizer,
                parts=self.parts,
                take_passes=self.engine.take_passes,
                precision=self.precision,
                max_grad_norm=self.stage.max_grad_norm,
                on_step=[
                    self._count, self._record, show, self.recovery.see, self._watch_heldout, self._save_regularly,
                    self._stop_if_asked, HeapTrim(),
                ],
            )  # fmt: skip

    def finished_model(self) -> Any:
        """The plain model with what the kept weights learned, in float32 on the CPU; of several ranks, rank 0's.

        Merged there, so that a run continued through `apply_stage` goes on from the same bits.
        """
        return self.prepared.finished(load_checkpoint(self.folder / TRAINED).tensors["weights"])

    def facts(self) -> dict[str, Any]:
        """What the finished stage took: steps, tokens, seconds in steps (of every process that took part), memory."""
        lines = read_metrics(self.metrics.path)
        steps = [line for line in lines if line["event"] == "step"]
        num_tokens, seconds = (sum(line[key] for line in steps) for key in ("num_tokens", "seconds"))
        return {
            "num_steps": self.step,
            "num_updates": self.num_updates,
            "num_rollbacks": self.recovery.num_rollbacks,
            "kept_step": load_checkpoint(self.folder / TRAINED).values["step"],
            "num_tokens": num_tokens,
            "training_seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 1),
            "peak_memory_bytes": peak_memory_bytes(self.precision.device),
            "num_learning_parameters": self.num_learning,
            "precision": self.precision.name,
            "device": self.precision.device.type,
            "attention": self.attention,
            "num_ranks": self.ranks.count,
            **facts_of_saves(lines),
        }

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.saver.taken(self.parts, self.parts.weights)

    def _from_first(self, find: Callable[[], Stored | None]) -> Checkpoint | None:
        return checkpoint_from_first(self.parts, find, isinstance(self.saver, PartSaver))

    def _begun_in(self) -> str | None:
        """The precision a stage that continues was begun in, where it must be known before it is prepared for good."""
        if not self.ranks.pass_together:
            return None
        return self.ranks.from_first(lambda: precision_begun_in(self.checkpoints))

    def _count(self, record: StepRecord) -> None:
        self.step, self.num_updates = record.step, record.num_updates
        self.ranks.draw_apart(self.stage.seed, self.step)

    def _record(self, record: StepRecord) -> None:
        self.metrics.append("step", **asdict(record), **self.recorder.read())

    def _watch_heldout(self, record: StepRecord) -> None:
        if self.watch.is_due(record.step):
            self._read_heldout(record.step)
            if self.watch.is_over:
                raise _EarlyStop

    def _read_heldout(self, step: int) -> None:
        with self.engine.whole_weights():
            loss = self.watch.read(step, self.model, self.precision, self._weights)
        if loss is not None:
            self.recovery.see_heldout(step, loss)

    def _save_regularly(self, record: StepRecord) -> None:
        self.saver.look()
        if record.step % self.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        self.parts.refuse_different("The weights")
        self.saver.save(step_folder(self.checkpoints, self.step), self.state())

    def _stop_if_asked(self, record: StepRecord) -> None:
        if not self.ranks.any(self.stop.is_heard()):
            return
        self.stop.is_asked = True
        if record.step % self.checkpoint_every != 0:
            self._save()
        self.saver.wait()
        if record.step < self.steps.num_steps:
            raise Interrupted(f"{self.stage.name}: stopped after step {record.step} of {self.steps.num_steps}, saved")

    def _keep_result(self) -> None:
        self.parts.refuse_different("The trained weights")
        self.saver.wait()
        kept = self.watch.best() if self.ranks.is_first else None
        last = self.parts.wholes(self.parts.weights) if self.ranks.from_first(lambda: kept is None) else {}
        if not self.ranks.is_first:
            return
        if kept is not None and kept.values["step"] == 0:
            say(f"{self.stage.name}: no held-out reading was better than before it; the weights it began with are kept")
        if kept is None:
            if self.stage.keep == "best" and self.watch.heldout:
                say(f"{self.stage.name}: no held-out reading was better than before it; its last weights are kept")
            # On the host, where there is room: beside training there is none for both halves and what they make.
            kept = Checkpoint({"weights": joined_by_name({n: t.cpu() for n, t in last.items()})}, {"step": self.step})
        save_checkpoint(self.folder / TRAINED, kept)
