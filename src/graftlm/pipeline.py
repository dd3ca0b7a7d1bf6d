"""The road: every step in order, each skipped when what it was asked and given is unchanged.

Owns the order of steps, their folders and keys. Does not know how any step does its work: it hands each room its
section of the recipe and the folders it reads. Sees the whole recipe, which only `cli` does besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftlm.device import DTYPES, num_cores, pick_device
from graftlm.errors import UserError
from graftlm.model.causal import find_model, load_causal
from graftlm.model.grow import expand_model
from graftlm.recipe import Lora, Recipe, looks_like_hub_id
from graftlm.release.export import Manifest, export_adapter, export_model
from graftlm.release.judge import answer_exact, answer_samples, judge_states
from graftlm.release.report import write_report
from graftlm.run import RunFolder, Step, fingerprint, key_of, read_json, say
from graftlm.talk.generate import load_chatbot
from graftlm.text.corpus import prepare_data, read_conversations
from graftlm.text.dialogue import Conversation
from graftlm.text.rows import TokenRows
from graftlm.text.templates import Template, find_template
from graftlm.text.tokenizer import Tokenizer, graft_tokenizer, load_tokenizer
from graftlm.training.scratch import build_scratch_base
from graftlm.training.stage import StageRun, apply_stage, attach_stage

LANGUAGES = ("new", "old")


@dataclass(slots=True)
class StepResult:
    """What became of one step: `done` now, or `unchanged` since an earlier run."""

    name: str
    seconds: float
    status: str


@dataclass(slots=True)
class RunResult:
    """The finished road; `questions` holds the exact questions shown and their counts, where the recipe has any."""

    steps: list[StepResult] = field(default_factory=list)
    model: str = ""
    report: str = ""
    questions: dict[str, Any] | None = None


def run_recipe(recipe: Recipe, folder: Path) -> RunResult:
    """Walk the whole road in `folder`; what is finished and unchanged is kept, what was interrupted goes on.

    Raises UserError, NumericalStop, DiskError, Interrupted.
    """
    check_inputs(recipe)
    torch.set_num_threads(num_cores())
    with RunFolder(folder, recipe.name) as run:
        run.write_recipe(recipe.model_dump(mode="json"))
        return _Road(recipe, run.folder).walk()


def export_run(folder: Path, to: str, out: Path | None) -> Manifest:
    """Write a finished run's model again, merged (`hf`) or as its last stage's adapter on the model below it.

    `adapter` writes two folders: `adapter` and the `base` it belongs on. Raises UserError.
    """
    if to not in ("hf", "adapter"):
        raise UserError(f"--to {to} is not known.", "Choose hf (one merged folder) or adapter (base and PEFT adapter).")
    if not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} is no run folder: it holds no recipe.json.", "Give the folder of `graftlm run --out`."
        )
    recipe = Recipe.model_validate(read_json(folder / "recipe.json")["recipe"])
    out = out or folder / f"export-{to}"
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} already holds files.", "Give --out a new or empty folder.")
    with RunFolder(folder, recipe.name):
        road = _Road(recipe, folder)
        road.check_stages_done()
        return road.export_adapter(out) if to == "adapter" else road.export(road.model_before(len(recipe.stages)), out)


class _Road:
    """One walk along the road: the chain of keys, and the model in hand so that it is not loaded again."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = pick_device(recipe.device)
        self.result = RunResult()
        self.key = ""
        self.model: Any = None
        last = 4 + len(recipe.stages)
        self.model_folder, self.report_folder = folder / f"{last}-model", folder / f"{last + 1}-report"

    def walk(self) -> RunResult:
        recipe = self.recipe
        if recipe.base.scratch:
            scratch = recipe.base.scratch
            self._take(
                "0-scratch", scratch.model_dump(mode="json"), self._build_scratch, scratch.text + scratch.heldout
            )
        inputs = (recipe.base.model, recipe.tokenizer.pieces, *recipe.tokenizer.text)
        self._take("1-tokenizer", recipe.tokenizer.model_dump(mode="json"), self._graft_tokenizer, inputs)
        self._take("2-base", recipe.grow.model_dump(mode="json"), self._grow_base, (recipe.grow.vectors,))
        sources = tuple(source.path for source in (*recipe.data.sources, *recipe.data.heldout, *recipe.data.text))
        self._take("3-data", recipe.data.model_dump(mode="json"), self._prepare_data, sources)
        for number, stage in enumerate(recipe.stages):
            self._take(self._stage_folder(number).name, stage.model_dump(mode="json"), self._train_stage(number))
        self._take(self.model_folder.name, recipe.export.model_dump(mode="json"), self._export_model)
        questions = (recipe.report.exact_questions,)
        self._take(self.report_folder.name, recipe.report.model_dump(mode="json"), self._report, questions)
        self.result.model = str(self.model_folder)
        self.result.report = str(self.report_folder / "report.html")
        asked = self.report_folder / "questions.json"
        self.result.questions = read_json(asked) if asked.is_file() else None
        return self.result

    def _take(
        self,
        name: str,
        asked: dict[str, Any],
        work: Callable[[Step], dict[str, Any]],
        inputs: tuple[str | None, ...] = (),
    ) -> None:
        """Do one step, or find it done. Its key holds what it is asked, what it reads and every step before it."""
        given = [fingerprint(path) for path in inputs if path]
        self.key = key_of(name, asked, given, self.key, self.recipe.seed)
        step = Step(self.folder / name)
        if step.is_done(self.key):
            self.result.steps.append(StepResult(name, step.seconds(), "unchanged"))
            say(f"{name}: unchanged")
            return
        say(f"{name} ...")
        step.begin(self.key, asked)
        started = time.monotonic()
        facts = work(step)
        seconds = time.monotonic() - started
        step.finish(self.key, seconds, **facts)
        self.result.steps.append(StepResult(name, seconds, "done"))
        say(f"{name}: done in {seconds:.1f} s")

    def _stage_folder(self, number: int) -> Path:
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

    def _build_scratch(self, step: Step) -> dict[str, Any]:
        assert self.recipe.base.scratch is not None
        return build_scratch_base(self.recipe.base.scratch, self.recipe.seed, step.folder, self.device)

    def _graft_tokenizer(self, step: Step) -> dict[str, Any]:
        base = find_model(self._base)
        if self.recipe.tokenizer.mode == "keep":
            load_tokenizer(base).save(step.folder)
        else:
            graft_tokenizer(base, self.recipe.tokenizer, step.folder)
        return {}

    def _grow_base(self, step: Step) -> dict[str, Any]:
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
        )
        return {}

    def _prepare_data(self, step: Step) -> dict[str, Any]:
        prepare_data(self.recipe.data, self._tokenizer, self._template, step.folder)
        return {}

    def model_before(self, number: int) -> Any:
        """The plain float32 model that stage `number` begins with."""
        model = load_causal(self.folder / "2-base")
        for earlier in range(number):
            model = self._apply(model, earlier)
        return model

    def _apply(self, model: Any, number: int) -> Any:
        return apply_stage(model, self.recipe.stages[number], self._stage_folder(number), self._tokenizer.first_new_id)

    def _train_stage(self, number: int) -> Callable[[Step], dict[str, Any]]:
        def work(step: Step) -> dict[str, Any]:
            stage = self.recipe.stages[number]
            tokenizer = self._tokenizer
            data = self.folder / "3-data"
            rows = TokenRows.load(data / ("text" if stage.objective == "text" else "train"), tokenizer=tokenizer)
            held = {language: data / f"heldout-{language}" for language in LANGUAGES}
            heldout = {language: TokenRows.load(path) for language, path in held.items() if path.is_dir()}
            model = self.model if self.model is not None else self.model_before(number)
            self.model = None
            training = StageRun(model, stage, rows, heldout, step.folder, self.device, tokenizer.first_new_id)
            training.run()
            self.model = training.finished_model()
            return {"num_steps": training.step, "peak_memory_bytes": training.peak_memory_bytes()}

        return work

    def _export_model(self, step: Step) -> dict[str, Any]:
        model = self.model if self.model is not None else self.model_before(len(self.recipe.stages))
        self.model = None
        return {"max_logit_difference": self.export(model, step.folder).max_logit_difference}

    def export(self, model: Any, out: Path) -> Manifest:
        """Write one merged folder for plain transformers."""
        section = self.recipe.export
        dtype, max_shard = DTYPES[section.dtype], f"{section.max_shard_gb:g}GB"
        return export_model(model.cpu(), self._tokenizer, self._template.jinja, out, dtype=dtype, max_shard=max_shard)

    def export_adapter(self, out: Path) -> Manifest:
        """Write the last stage's adapter, and beside it the model it belongs on."""
        number = len(self.recipe.stages) - 1
        stage = self.recipe.stages[number]
        if not isinstance(stage.trains, Lora):
            raise UserError(
                f"The last stage, {stage.name}, trains {stage.trains.kind}: there is no adapter to export.",
                "Export with --to hf.",
            )
        below = self.model_before(number)
        export_model(below, self._tokenizer, self._template.jinja, out / "base", dtype=torch.float32)
        tokenizer = self._tokenizer
        adapted = attach_stage(below, stage, self._stage_folder(number), tokenizer.first_new_id)
        return export_adapter(adapted, tokenizer, self._template.jinja, out / "adapter", out / "base")

    def check_stages_done(self) -> None:
        """Refuse a run whose training has not ended. Raises UserError."""
        for number in range(len(self.recipe.stages)):
            if not (self._stage_folder(number) / "done.json").is_file():
                raise UserError(
                    f"Stage {self.recipe.stages[number].name} of {self.folder} is not finished.",
                    "Run its recipe again to continue it.",
                )

    def _report(self, step: Step) -> dict[str, Any]:
        section = self.recipe.report
        conversations = self._heldout_conversations()
        judge_states(self._states(), conversations, self._template, self.device, step.folder)
        chatbot = load_chatbot(self.model_folder, self.recipe.device)
        answer_samples(chatbot, conversations, section.num_samples, section.max_answer_tokens, step.folder)
        if section.exact_questions:
            answer_exact(
                chatbot, section.exact_questions, section.questions_shown, section.max_answer_tokens, step.folder
            )
        write_report(self.folder)
        return {}

    def _heldout_conversations(self) -> dict[str, list[Conversation]]:
        files = {language: self.folder / "3-data" / f"heldout-{language}.jsonl" for language in LANGUAGES}
        return {
            language: read_conversations(path, language=language)[0]
            for language, path in files.items()
            if path.is_file()
        }

    def _states(self) -> Iterator[tuple[str, Any, Tokenizer]]:
        """The model at every stop of the road, one in memory at a time."""
        tokenizer = self._tokenizer
        yield "base", load_causal(self._base).to(self.device), load_tokenizer(find_model(self._base))
        model = load_causal(self.folder / "2-base")
        yield "grown", model.to(self.device), tokenizer
        for number, stage in enumerate(self.recipe.stages):
            model = self._apply(model.cpu(), number)
            yield stage.name, model.to(self.device), tokenizer
        yield "model", load_causal(self.model_folder).to(self.device), tokenizer


def check_inputs(recipe: Recipe) -> None:
    """Every local path of the recipe must exist before the first step: told all at once. Raises UserError."""
    scratch = recipe.base.scratch
    base = (*scratch.text, *scratch.heldout) if scratch else (recipe.base.model,)
    sources = (*recipe.data.sources, *recipe.data.heldout, *recipe.data.text)
    tokenizer = (recipe.tokenizer.pieces, *recipe.tokenizer.text, recipe.tokenizer.common_characters)
    named = {"gb2312-1", "none"}
    paths = (*base, *tokenizer, *(s.path for s in sources), recipe.grow.vectors, recipe.report.exact_questions)
    missing = sorted(
        {
            path
            for path in paths
            if path and path not in named and not Path(path).exists() and not looks_like_hub_id(path)
        }
    )
    if missing:
        listed = "".join(f"\n  {path}" for path in missing)
        raise UserError(
            f"The recipe names {len(missing)} path{'s' if len(missing) > 1 else ''} that do not exist:{listed}",
            "Mend the recipe, or override the key on the command line (section.key=PATH).",
        )
