"""One stage around the loop: what learns, from which rows, watched and saved how.

Owns resuming, held-out readings, best weights, early stopping and interruption.
The loop knows none of it: everything hangs on `on_step`. A stage's result is one file of trained tensors;
`apply_stage` puts it onto the model the stage began with.
"""

from __future__ import annotations

import math
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graftlm.device import (
    DTYPES,
    LossScaler,
    Precision,
    fastest_precision,
    peak_memory_bytes,
    random_states,
    restore_random_states,
    seed_everything,
)
from graftlm.errors import Interrupted, NumericalStop, UserError
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed, attend_plain
from graftlm.recipe import Stage
from graftlm.run import Metrics, say
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Steps
from graftlm.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
)
from graftlm.training.heldout import heldout_losses
from graftlm.training.loop import StepRecord, train
from graftlm.training.optim import learning_rate_shape, make_optimizer
from graftlm.training.trainable import (
    copy_weights,
    learning_roles,
    prepare_model,
    restore_model,
    trainable_parameters,
)

TRAINED = "trained"
BEST = "best"
STATE_GROUPS = ("weights", "optimizer", "random")
EVALS_BY_DEFAULT = 5


class _EarlyStop(Exception):
    """Held-out loss has not improved for long enough."""


def apply_stage(model: Any, stage: Stage, folder: Path, first_new_id: int | None) -> Any:
    """Put the result of a finished stage onto the model it began with; returns a plain model in float32."""
    return restore_model(attach_stage(model, stage, folder, first_new_id), stage.trains, first_new_id)


def attach_stage(model: Any, stage: Stage, folder: Path, first_new_id: int | None) -> Any:
    """The model as it stood at the end of a finished stage: adapters attached, not merged."""
    model = prepare_model(model, stage.trains, first_new_id, stage.seed)
    copy_weights(model, load_checkpoint(folder / TRAINED).tensors["weights"])
    return model


def make_precision(stage: Stage, device: torch.device, begun_in: str | None = None) -> Precision:
    """The stage's dtype policy; `begun_in` is the precision of the checkpoint it continues, if any.

    Raises UserError for bf16 on a GPU without it.
    """
    name = begun_in or (fastest_precision(device) if stage.precision == "auto" else stage.precision)
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"Stage {stage.name} asks for bf16, which {torch.cuda.get_device_name(device)} does not compute.",
            "Set precision: fp16 (weights stay fp32, the loss is scaled) or fp32.",
        )
    rule = stage.loss_scale
    scaler = None
    if name == "fp16":
        scaler = LossScaler(rule.initial, rule.growth_interval, rule.hysteresis, rule.floor)
    return Precision(DTYPES[name], device, scaler)


class StageRun:
    """A stage in progress: the state that must survive an interruption, and the observers that keep it safe."""

    def __init__(
        self,
        model: Any,
        stage: Stage,
        rows: TokenRows,
        heldout: dict[str, TokenRows],
        folder: Path,
        device: torch.device,
        first_new_id: int | None,
    ) -> None:
        self.stage, self.folder, self.heldout, self.first_new_id = stage, folder, heldout, first_new_id
        self.checkpoints = folder / "checkpoints"
        self.metrics = Metrics(folder / "metrics.jsonl")
        seed_everything(stage.seed)
        self.model = prepare_model(model.float(), stage.trains, first_new_id, stage.seed).to(device)
        attend_packed(body_of(self.model))
        if stage.gradient_checkpointing:
            body_of(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.roles = learning_roles(self.model)
        self.optimizer = make_optimizer(self.roles, stage)
        self.precision = make_precision(stage, device)
        self.steps = Steps(
            rows,
            batch_rows=stage.batch_rows,
            micro_batch_tokens=stage.micro_batch_tokens,
            epochs=stage.epochs,
            seed=stage.seed,
        )
        self.heldout_every = stage.heldout_every or math.ceil(self.steps.num_steps / EVALS_BY_DEFAULT)
        self.checkpoint_every = stage.checkpoint_every or max(1, math.ceil(self.steps.num_steps / 10))
        self.step = self.num_updates = self.readings_since_best = 0
        self.best_loss = math.inf
        self.is_stopping = False

    def state(self) -> Checkpoint:
        """All that the next step depends on."""
        values = {
            "step": self.step,
            "num_updates": self.num_updates,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "readings_since_best": self.readings_since_best,
            "scaler": self.precision.scaler.state() if self.precision.scaler else None,
            "skips_in_a_row": self.precision.skips_in_a_row,
            "precision": self.precision.name,
        }
        tensors = {
            "weights": self._weights(),
            "optimizer": _optimizer_tensors(self.optimizer, self.model),
            "random": random_states(),
        }
        return Checkpoint(tensors, values)

    def resume(self) -> bool:
        """Go back to the newest complete checkpoint; returns whether there was one. Raises UserError."""
        saved = load_newest_checkpoint(self.checkpoints, STATE_GROUPS)
        if saved is None:
            self.metrics.cut_after(-1)
            return False
        # `auto` may mean something else on this machine: what was begun goes on as it was begun.
        self.precision = make_precision(self.stage, self.precision.device, saved.values["precision"])
        copy_weights(self.model, saved.tensors["weights"])
        _restore_optimizer(self.optimizer, self.model, saved.tensors["optimizer"])
        restore_random_states(saved.tensors["random"])
        values = saved.values
        self.step, self.num_updates = values["step"], values["num_updates"]
        self.best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
        self.readings_since_best = values["readings_since_best"]
        self.precision.skips_in_a_row = values["skips_in_a_row"]
        if self.precision.scaler and values["scaler"]:
            self.precision.scaler.restore(values["scaler"])
        self.metrics.cut_after(self.step)
        say(f"{self.stage.name}: continuing after step {self.step} of {self.steps.num_steps}")
        return True

    def run(self) -> None:
        """Train to the end, or raise Interrupted after saving."""
        if not self.resume():
            self._read_heldout(0)
        observers = [self._count, self._record, self._watch_heldout, self._save_regularly, self._stop_if_asked]
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            train(
                self.model,
                self.steps,
                first_step=self.step,
                num_updates=self.num_updates,
                lr_at=learning_rate_shape(self.stage, self.steps.num_steps),
                optimizer=self.optimizer,
                groups=self.roles,
                precision=self.precision,
                max_grad_norm=self.stage.max_grad_norm,
                on_step=observers,
            )
        except _EarlyStop:
            say(f"{self.stage.name}: held-out loss stopped improving; stopped after step {self.step}")
            self.metrics.append("note", step=self.step, text="stopped early: held-out loss no longer improves")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.num_updates == 0:
            raise NumericalStop(
                f"{self.stage.name}: each of its {self.step} steps had gradients that are not finite; nothing was "
                f"learned (loss scale {self.precision.loss_scale:g}).",
                "Lower loss_scale.initial or peak_lr, or use precision bf16 or fp32.",
            )
        self._keep_result()
        if self.is_stopping:
            raise Interrupted(f"{self.stage.name}: all {self.step} steps taken and saved; stopped before what follows")

    def finished_model(self) -> Any:
        """The plain model with what the kept weights learned, in float32 on the CPU.

        Merged there, so that a run continued through `apply_stage` goes on from the same bits.
        """
        model = self.model.cpu()
        copy_weights(model, load_checkpoint(self.folder / TRAINED).tensors["weights"])
        body_of(model).gradient_checkpointing_disable()
        model = restore_model(model, self.stage.trains, self.first_new_id)
        attend_plain(model)
        return model

    def peak_memory_bytes(self) -> int:
        """The most memory held so far, on the device that trains."""
        return peak_memory_bytes(self.precision.device)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu() for name, p in trainable_parameters(self.model).items()}

    def _count(self, record: StepRecord) -> None:
        self.step, self.num_updates = record.step, record.num_updates

    def _record(self, record: StepRecord) -> None:
        self.metrics.append("step", **asdict(record))

    def _watch_heldout(self, record: StepRecord) -> None:
        if record.step % self.heldout_every == 0 or record.step == self.steps.num_steps:
            self._read_heldout(record.step)
            limit = self.stage.early_stop_after
            if limit is not None and self.readings_since_best >= limit:
                raise _EarlyStop

    def _read_heldout(self, step: int) -> None:
        readings = {}
        for language, rows in self.heldout.items():
            losses = heldout_losses(self.model, rows, self.precision, self.stage.micro_batch_tokens)
            readings[language] = {
                "bits_per_byte": losses.bits_per_byte,
                "loss_per_answer_token": losses.loss_per_target,
                "num_rows": len(rows),
            }
        self.metrics.append("heldout", step=step, **readings)
        if not readings:
            return
        judged = readings.get("new") or next(iter(readings.values()))
        if judged["bits_per_byte"] < self.best_loss:
            self.best_loss, self.readings_since_best = judged["bits_per_byte"], 0
            if self.stage.keep == "best" and step > 0:
                best = Checkpoint({"weights": self._weights()}, {"step": step})
                save_checkpoint(step_folder(self.folder / BEST, step), best)
                prune_checkpoints(self.folder / BEST, num_kept=1)
        else:
            self.readings_since_best += 1

    def _save_regularly(self, record: StepRecord) -> None:
        if record.step % self.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        save_checkpoint(step_folder(self.checkpoints, self.step), self.state())
        prune_checkpoints(self.checkpoints)

    def _ask_to_stop(self, number: int, _: Any) -> None:
        if self.is_stopping:
            raise KeyboardInterrupt
        self.is_stopping = True
        say(f"{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)")

    def _stop_if_asked(self, record: StepRecord) -> None:
        if not self.is_stopping:
            return
        self._save()
        if record.step < self.steps.num_steps:
            raise Interrupted(f"{self.stage.name}: stopped after step {record.step} of {self.steps.num_steps}, saved")

    def _keep_result(self) -> None:
        best = newest_checkpoint(self.folder / BEST)
        if self.stage.keep == "best" and best is not None:
            kept = load_checkpoint(best)
        else:
            if self.stage.keep == "best" and self.heldout:
                say(f"{self.stage.name}: no held-out reading was better than before it; its last weights are kept")
            kept = Checkpoint({"weights": self._weights()}, {"step": self.step})
        save_checkpoint(self.folder / TRAINED, kept)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    return {
        f"{names[id(parameter)]}|{key}": value.detach().cpu()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    parameters = trainable_parameters(model)
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step count where its kernel wants it; moments lie beside their parameter.
        optimizer.state[parameter][key] = value.to(parameter.device)
