"""The road: every step in order, each skipped when what it was asked and given is unchanged.

Owns the order of steps, their folders and keys. Does not know how any step does its work: it hands each room its
section of the recipe and the folders it reads. Sees the whole recipe, which only `cli` does besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.device import DTYPES, num_cores, pick_device
from graftlm.model.causal import load_causal, new_causal, save_causal
from graftlm.model.grow import expand_model
from graftlm.recipe import Recipe, Source, Stage
from graftlm.release.export import export_model
from graftlm.release.report import write_report
from graftlm.road_data import data_spec, graft_spec
from graftlm.road_judging import judge_run
from graftlm.run import RunFolder, Step, fingerprint, key_of, read_json, say
from graftlm.text.corpus import prepare_data
from graftlm.text.dialogue import Template, find_template
from graftlm.text.rows import TokenRows
from graftlm.text.tokenizer import graft_tokenizer, load_tokenizer, train_base_tokenizer
from graftlm.training.stage import StageRun, apply_stage


@dataclass(slots=True)
class StepResult:
    """What became of one step: `done` now, or `unchanged` since an earlier run."""

    name: str
    seconds: float
    status: str


@dataclass(slots=True)
class RunResult:
    """The finished road."""

    steps: list[StepResult] = field(default_factory=list)
    model: str = ""
    report: str = ""


def run_recipe(recipe: Recipe, folder: Path) -> RunResult:
    """Walk the whole road in `folder`; what is finished and unchanged is kept, what was interrupted goes on.

    Raises UserError, NumericalStop, DiskError, Interrupted.
    """
    _check_inputs(recipe)
    with RunFolder(folder, recipe.name) as run:
        run.write_recipe(recipe.model_dump(mode="json"))
        return _Road(recipe, run).walk()


class _Road:
    """One walk along the road: the chain of keys, and the model in hand so that it is not loaded again."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        import torch

        torch.set_num_threads(num_cores())
        self.recipe = recipe
        self.run = run
        self.device = pick_device(recipe.device)
        self.result = RunResult()
        self.key = ""
        self.model: Any = None

    def walk(self) -> RunResult:
        recipe = self.recipe
        if recipe.base.scratch:
            self._take("0-scratch", recipe.base.scratch.model_dump(mode="json"), self._build_scratch)
        inputs = [recipe.base.model, recipe.tokenizer.pieces, *recipe.tokenizer.text]
        self._take("1-tokenizer", recipe.tokenizer.model_dump(mode="json"), self._graft_tokenizer, inputs)
        self._take("2-base", recipe.grow.model_dump(mode="json"), self._grow_base, [recipe.grow.vectors])
        sources = [source.path for source in (*recipe.data.sources, *recipe.data.heldout, *recipe.data.text)]
        self._take("3-data", recipe.data.model_dump(mode="json"), self._prepare_data, sources)
        for number, stage in enumerate(recipe.stages):
            self._take(self._stage_name(number), stage.model_dump(mode="json"), self._train_stage(number))
        number = 4 + len(recipe.stages)
        self._take(f"{number}-model", recipe.export.model_dump(mode="json"), self._export)
        questions = [recipe.report.exact_questions]
        self._take(f"{number + 1}-report", recipe.report.model_dump(mode="json"), self._report, questions)
        self.result.model = str(self.run.folder / f"{number}-model")
        self.result.report = str(self.run.folder / f"{number + 1}-report" / "report.html")
        return self.result

    def _take(
        self, name: str, asked: dict[str, Any], work: Callable[[Step], dict[str, Any]], inputs: list[Any] | None = None
    ) -> None:
        """Do one step, or find it done. Its key holds what it is asked, what it reads and every step before it."""
        given = {str(path): fingerprint(path) for path in inputs or [] if path}
        self.key = key_of(name, asked, given, self.key, self.recipe.seed)
        step = self.run.step(name)
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

    def _path(self, name: str) -> Path:
        return self.run.folder / name

    def _stage_name(self, number: int) -> str:
        return f"{4 + number}-{self.recipe.stages[number].name}"

    @property
    def _base(self) -> str | Path:
        return self.recipe.base.model or self._path("0-scratch") / "model"

    @property
    def _template(self) -> Template:
        return find_template(self.recipe.data.template, load_tokenizer(self._path("1-tokenizer")))

    def _build_scratch(self, step: Step) -> dict[str, Any]:
        scratch = self.recipe.base.scratch
        assert scratch is not None
        tokenizer_folder = step.folder / "tokenizer"
        texts = [Path(path).read_text(encoding="utf-8") for path in scratch.text]
        train_base_tokenizer(texts, scratch.num_pieces, tokenizer_folder)
        tokenizer = load_tokenizer(tokenizer_folder)
        model = new_causal(
            num_rows=tokenizer.num_pieces,
            hidden_size=scratch.hidden_size,
            num_layers=scratch.num_layers,
            num_heads=scratch.num_heads,
            intermediate_size=scratch.intermediate_size,
            is_tied=scratch.tied,
            max_positions=scratch.max_positions,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            seed=self.recipe.seed,
        )
        rows = text_token_rows(scratch.text, tokenizer, scratch.row_tokens)
        heldout = {"old": text_token_rows(scratch.heldout, tokenizer, scratch.row_tokens)} if scratch.heldout else {}
        training = StageRun(model, scratch.training, rows, heldout, step.folder, self.device, first_new_id=None)
        training.run()
        model = training.finished_model()
        save_causal(model.cpu(), step.folder / "model", also=tokenizer.save)
        return {"num_pieces": tokenizer.num_pieces}

    def _graft_tokenizer(self, step: Step) -> dict[str, Any]:
        section = self.recipe.tokenizer
        if section.mode == "keep":
            load_tokenizer(self._base).save(step.folder)
            return {}
        graft_tokenizer(self._base, graft_spec(section), step.folder)
        return {}

    def _grow_base(self, step: Step) -> dict[str, Any]:
        section = self.recipe.grow
        expand_model(
            self._base,
            self._path("1-tokenizer"),
            section.embedding,
            step.folder,
            head_init=section.head,
            vectors=section.vectors,
            seed=section.seed,
        )
        return {}

    def _prepare_data(self, step: Step) -> dict[str, Any]:
        tokenizer = load_tokenizer(self._path("1-tokenizer"))
        prepare_data(data_spec(self.recipe.data), tokenizer, self._template, step.folder)
        return {}

    def model_before(self, number: int) -> Any:
        """The plain float32 model that stage `number` begins with."""
        model = load_causal(self._path("2-base"))
        for earlier in range(number):
            folder = self._path(self._stage_name(earlier))
            model = apply_stage(model, self.recipe.stages[earlier], folder, self._first_new_id)
        return model

    @property
    def _first_new_id(self) -> int | None:
        return load_tokenizer(self._path("1-tokenizer")).first_new_id

    def _train_stage(self, number: int) -> Callable[[Step], dict[str, Any]]:
        def work(step: Step) -> dict[str, Any]:
            stage: Stage = self.recipe.stages[number]
            tokenizer = load_tokenizer(self._path("1-tokenizer"))
            data = self._path("3-data")
            rows = TokenRows.load(data / ("text" if stage.objective == "text" else "train"), tokenizer=tokenizer)
            heldout = heldout_rows(data)
            model = self.model if self.model is not None else self.model_before(number)
            self.model = None
            training = StageRun(model, stage, rows, heldout, step.folder, self.device, tokenizer.first_new_id)
            training.run()
            self.model = training.finished_model()
            return {"num_steps": training.step, "peak_memory_bytes": training.peak_memory_bytes()}

        return work

    def _export(self, step: Step) -> dict[str, Any]:
        model = self.model if self.model is not None else self.model_before(len(self.recipe.stages))
        self.model = None
        section = self.recipe.export
        tokenizer = load_tokenizer(self._path("1-tokenizer"))
        manifest = export_model(
            model.cpu(),
            tokenizer,
            self._template.jinja,
            step.folder,
            dtype=DTYPES[section.dtype],
            max_shard=f"{section.max_shard_gb:g}GB",
        )
        return {"max_logit_difference": manifest.max_logit_difference}

    def _report(self, step: Step) -> dict[str, Any]:
        states = [("base", self._base, None), ("grown", self._path("2-base"), None)]
        stages = [(s.name, s, self._path(self._stage_name(i))) for i, s in enumerate(self.recipe.stages)]
        model_folder = self._path(f"{4 + len(stages)}-model")
        judge_run(self.recipe, states, stages, self._path("3-data"), model_folder, step.folder, self.device)
        write_report(self.run.folder)
        return {}


def text_token_rows(paths: tuple[str, ...], tokenizer: Any, row_tokens: int) -> TokenRows:
    """Rows of plain text files: one document a blank-line-separated paragraph block, every token a target."""
    from graftlm.text.rows import RowsBuilder, text_rows

    builder = RowsBuilder(tokenizer.num_pieces)
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        documents = [document for document in text.split("\n\n") if document.strip()]
        for number, rows in enumerate(text_rows(documents, tokenizer, row_tokens), start=1):
            for row in rows:
                builder.add(row, f"{path}:{number}")
    return builder.rows()


def heldout_rows(data: Path) -> dict[str, TokenRows]:
    """Held-out rows by language (`new`, `old`), as far as the data step made them."""
    found = {language: data / f"heldout-{language}" for language in ("new", "old")}
    rows = {language: TokenRows.load(folder) for language, folder in found.items() if folder.is_dir()}
    return {language: held for language, held in rows.items() if len(held)}


def _check_inputs(recipe: Recipe) -> None:
    """Every local path of the recipe must exist before the first step: told all at once."""
    from graftlm.errors import UserError
    from graftlm.recipe import looks_like_hub_id

    base = [recipe.base.model] if recipe.base.model else [*recipe.base.scratch.text, *recipe.base.scratch.heldout]
    tokenizer = [recipe.tokenizer.pieces, *recipe.tokenizer.text]
    sources: tuple[Source, ...] = (*recipe.data.sources, *recipe.data.heldout, *recipe.data.text)
    paths = [*base, *tokenizer, *(s.path for s in sources), recipe.grow.vectors, recipe.report.exact_questions]
    missing = sorted({p for p in paths if p and not Path(p).exists() and not looks_like_hub_id(p)})
    if missing:
        listed = "".join(f"\n  {path}" for path in missing)
        raise UserError(
            f"The recipe names {len(missing)} path{'s' if len(missing) > 1 else ''} that do not exist:{listed}",
            "Mend the recipe, or override the key on the command line (section.key=PATH).",
        )


__all__ = ["RunResult", "StepResult", "heldout_rows", "read_json", "run_recipe", "text_token_rows"]
