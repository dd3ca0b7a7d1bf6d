"""What each step of the road does: a section of the recipe and the folders before it, to one folder.

Owns which room does a step, what it is handed, and the model in hand between steps. Does not know when a step
is due (`pipeline.py`) or how any room works. Sees the whole recipe, which only `pipeline` and `cli` do besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from graftlm.device import DTYPES, pick_device
from graftlm.errors import UserError
from graftlm.feasible import refuse_what_surely_does_not_fit
from graftlm.health.finding import Finding
from graftlm.health.look import Look
from graftlm.inputs import new_language_texts
from graftlm.model.causal import find_model, load_causal
from graftlm.model.grow import NUM_NEW_TEXTS, expand_model
from graftlm.model.tensors import TensorSource, source_of_folder
from graftlm.recipe import Lora, Recipe, Stage
from graftlm.release.export import Also, Manifest, export_adapter, export_gguf, export_model
from graftlm.release.gguf_file import Quantization
from graftlm.release.judge import answer_exact, judge_states, learned_answers
from graftlm.release.merge import after_stage
from graftlm.release.report import write_report
from graftlm.run import DONE
from graftlm.step import Step
from graftlm.talk.generate import load_chatbot
from graftlm.text.corpus import prepare_data, read_conversations
from graftlm.text.dialogue import Conversation
from graftlm.text.rows import TokenRows
from graftlm.text.templates import Template, find_template
from graftlm.text.texts import first_texts
from graftlm.text.tokenizer import Tokenizer, graft_tokenizer, load_tokenizer
from graftlm.training.batches import refuse_rows_beyond
from graftlm.training.following import stage_for_all
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.scratch import build_scratch_base
from graftlm.training.stage import StageRun
from graftlm.training.trained import apply_stage, attach_stage

LANGUAGES: tuple[Literal["new", "old"], ...] = ("new", "old")

Facts = dict[str, Any]
"""Small values a step leaves in its done mark."""


class Road:
    """The steps of one recipe in one run folder."""

    def __init__(self, recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.folder = folder
        self.device = pick_device(recipe.device)
        number = 4 + len(recipe.stages)
        self.model_folder = folder / f"{number}-model"
        self.heldout_folder, self.report_folder = folder / f"{number + 1}-heldout", folder / f"{number + 2}-report"
        # The model before stage `number`, kept from the stage just trained so that it is not loaded again.
        self._in_hand: tuple[int, Any] | None = None

    def stage_folder(self, number: int) -> Path:
        """The folder of stage `number` (from 0)."""
        return self.folder / f"{4 + number}-{self.recipe.stages[number].name}"

    @property
    def _base(self) -> str | Path:
        return self.recipe.base.model or self.folder / "0-scratch" / "model"

    @property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "1-tokenizer")

    @property
    def _template(self) -> Template:
        return find_template(self.recipe.data.template, self._tokenizer)

    def build_scratch(self, step: Step) -> Facts:
        """Step 0: a small base from nothing."""
        assert self.recipe.base.scratch is not None
        return build_scratch_base(self.recipe.base.scratch, self.recipe.seed, step.folder, self.device, self.ranks)

    def graft_tokenizer(self, step: Step) -> Facts:
        """Step 1: the grafted tokenizer."""
        base = find_model(self._base)
        if self.recipe.tokenizer.mode == "keep":
            load_tokenizer(base).save(step.folder)
        else:
            graft_tokenizer(base, self.recipe.tokenizer, step.folder)
        return {}

    def grow_base(self, step: Step) -> Facts:
        """Step 2: the base with rows for the new pieces."""
        grow = self.recipe.grow
        tokenizer = self.folder / "1-tokenizer"
        expand_model(
            self._base,
            tokenizer,
            grow.embedding,
            step.folder,
            head_init=grow.head,
            vectors=grow.vectors,
            seed=grow.seed,
            new_texts=first_texts(new_language_texts(self.recipe), NUM_NEW_TEXTS),
        )
        return {}

    def prepare_data(self, step: Step) -> Facts:
        """Step 3: rows to learn from and to be judged by."""
        prepare_data(self.recipe.data, self._tokenizer, self._template, step.folder)
        return {}

    def model_before(self, number: int) -> Any:
        """The plain float32 model that stage `number` begins with."""
        in_hand, self._in_hand = self._in_hand, None
        if in_hand is not None and in_hand[0] == number:
            return in_hand[1]
        model = load_causal(self.folder / "2-base")
        for earlier in range(number):
            model = self._apply(model, earlier)
        return model

    def _apply(self, model: Any, number: int) -> Any:
        return apply_stage(model, self.recipe.stages[number], self.stage_folder(number), self._tokenizer.first_new_id)

    def look_at_stages(self) -> Iterator[tuple[str, Look, list[Finding]]]:
        """The pre-flight of every stage, on the model as far as it is trained: name, what was seen, findings."""
        model = load_causal(self.folder / "2-base")
        for number, stage in enumerate(self.recipe.stages):
            run = self._stage_run(number, model, self.stage_folder(number))
            yield stage.name, *run.look()
            model = run.untrained_model()
            if (self.stage_folder(number) / DONE).is_file():
                model = self._apply(model, number)

    def _rows_of(self, stage: Stage) -> TokenRows:
        return TokenRows.load(
            self.folder / "3-data" / ("text" if stage.objective == "text" else "train"),
            tokenizer=self._tokenizer,
            template_fingerprint=self._template.fingerprint,
        )

    def _stage_run(self, number: int, model: Any, folder: Path) -> StageRun:
        stage, tokenizer, data = self.recipe.stages[number], self._tokenizer, self.folder / "3-data"
        rows = self._rows_of(stage)
        held = {language: data / f"heldout-{language}" for language in LANGUAGES}
        heldout = {language: TokenRows.load(path) for language, path in held.items() if path.is_dir()}
        return stage_for_all(
            self.ranks, model, stage, rows, heldout, folder, self.device, tokenizer.first_new_id, tokenizer.name_of
        )

    def train_stage(self, number: int) -> Callable[[Step], Facts]:
        """The step that trains stage `number` (from 0)."""

        def work(step: Step) -> Facts:
            # Of the stages to come too: what is wrong with them is told before hours of this one.
            later = {f"stages.{stage.name}": stage for stage in self.recipe.stages[number + 1 :]}
            for stage in self.recipe.stages[number:]:
                refuse_rows_beyond(self._rows_of(stage), stage.micro_batch_tokens, f"stages.{stage.name}")
            refuse_what_surely_does_not_fit(self.recipe, later, self.device, self.ranks, self.folder)
            training = self._stage_run(number, self.model_before(number), step.folder)
            training.run()
            facts = training.facts()
            self._in_hand = (number + 1, training.finished_model())
            return facts

        return work

    def export_model(self, step: Step) -> Facts:
        """The finished model, as others load it."""
        self._in_hand = None  # it is read tensor by tensor: the whole of it need not be in memory any more
        return {"max_logit_difference": self.export_hf(step.folder).max_logit_difference}

    def model_after(self, number: int) -> TensorSource:
        """The model after the first `number` stages, read and merged one tensor at a time."""
        source = source_of_folder(self.folder / "2-base")
        for earlier in range(number):
            source = after_stage(source, self.recipe.stages[earlier], self.stage_folder(earlier))
        return source

    def export_hf(self, out: Path, also: Also | None = None) -> Manifest:
        """Write one merged folder for plain transformers."""
        return self._export_folder(len(self.recipe.stages), out, DTYPES[self.recipe.export.dtype], also)

    def _export_folder(self, num_stages: int, out: Path, dtype: torch.dtype, also: Also | None = None) -> Manifest:
        return export_model(
            self.model_after(num_stages), self._tokenizer, self._template.jinja, out,
            dtype=dtype, max_shard_bytes=int(self.recipe.export.max_shard_gb * 1e9), also=also,
        )  # fmt: skip

    def export_gguf(self, out: Path, quantization: Quantization, also: Also | None = None) -> Manifest:
        """Write one GGUF file for llama.cpp."""
        return export_gguf(
            self.model_after(len(self.recipe.stages)), self._tokenizer, self._template.jinja, out,
            name=self.recipe.name, quantization=quantization, also=also,
        )  # fmt: skip

    def export_adapter(self, out: Path, also: Also | None = None) -> Manifest:
        """Write the last stage's adapter, and beside it the model it belongs on, which it names as seen from itself."""
        number = len(self.recipe.stages) - 1
        stage = self.recipe.stages[number]
        if not isinstance(stage.trains, Lora):
            raise UserError(
                f"The last stage, {stage.name}, trains {stage.trains.kind}: there is no adapter to export.",
                "Export with --to hf.",
            )
        below = self._export_folder(number, out / "base", torch.float32)
        tokenizer = self._tokenizer
        adapted = attach_stage(load_causal(out / "base"), stage, self.stage_folder(number), tokenizer.first_new_id)
        adapter = export_adapter(
            adapted, tokenizer, self._template.jinja, out / "adapter", out / "base", "../base", also=also
        )
        files = {f"base/{name}": mark for name, mark in below.files.items()}
        return replace(adapter, files=files | {f"adapter/{name}": mark for name, mark in adapter.files.items()})

    def check_stages_done(self) -> None:
        """Refuse a run whose training has not ended. Raises UserError."""
        for number in range(len(self.recipe.stages)):
            if not (self.stage_folder(number) / DONE).is_file():
                raise UserError(
                    f"Stage {self.recipe.stages[number].name} of {self.folder} is not finished.",
                    "Run its recipe again to continue it.",
                )

    def judge(self, step: Step) -> Facts:
        """Held-out figures and samples at every stop of the road."""
        section = self.recipe.report
        judge_states(
            self._states(), 3 + len(self.recipe.stages), self._heldout_conversations(), self._template, self.device,
            section.num_samples, section.max_answer_tokens, step.folder,
        )  # fmt: skip
        return {}

    def report(self, step: Step) -> Facts:
        """Questions with one right answer, and the page."""
        section = self.recipe.report
        if section.exact_questions:
            chatbot = load_chatbot(self.model_folder, self.recipe.device)
            learned = learned_answers(TokenRows.load(self.folder / "3-data" / "train"), chatbot.tokenizer)
            answer_exact(
                chatbot, section.exact_questions, section.questions_shown, section.max_answer_tokens, step.folder,
                learned,
            )  # fmt: skip
        write_report(self.folder)
        return {}

    def _heldout_conversations(self) -> dict[str, list[Conversation]]:
        files: dict[Literal["new", "old"], Path] = {
            language: self.folder / "3-data" / f"heldout-{language}.jsonl" for language in LANGUAGES
        }
        return {
            language: read_conversations(path, language=language)[0]
            for language, path in files.items()
            if path.is_file()
        }

    def _states(self) -> Iterator[tuple[str, Any, Tokenizer]]:
        """The model at every stop of the road, one in memory at a time."""
        tokenizer = self._tokenizer
        model: Any = load_causal(self._base)
        yield "base", model.to(self.device), load_tokenizer(find_model(self._base))
        model = load_causal(self.folder / "2-base")
        yield "grown", model.to(self.device), tokenizer
        for number, stage in enumerate(self.recipe.stages):
            model = self._apply(model.cpu(), number)
            yield stage.name, model.to(self.device), tokenizer
        model = load_causal(self.model_folder)
        yield "model", model.to(self.device), tokenizer
