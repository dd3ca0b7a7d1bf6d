"""A recipe: every knob of a run, as data.

Owns the sections (frozen, an unknown key is an error) and the meaning of each knob. Reading YAML, `extends`,
overrides and messages with line numbers live in `recipe_file.py`. Does not know what any step does with its
section. First stop of the road: `load_recipe` hands the sections on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    model_validator,
)


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _not_bool(value: Any) -> Any:
    # YAML reads `no` as false, and pydantic would go on to read false as 0.
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}")
    return value


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form `owner/name` of a model or data set on the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def _resolve(value: Any, info: ValidationInfo) -> Any:
    """Make a path relative to the recipe's folder absolute; leave hub ids as they are."""
    if not isinstance(value, str):
        return value
    folder = (info.context or {}).get("folder")
    candidate = Path(value).expanduser()
    if candidate.is_absolute() or folder is None:
        return value
    from_recipe = Path(folder) / candidate
    if looks_like_hub_id(value) and not from_recipe.exists():
        return value
    return str(from_recipe.resolve())


def _template(value: Any, info: ValidationInfo) -> Any:
    if value in ("card", "alpaca", "tokenizer") or not isinstance(value, str):
        return value
    if not value.endswith(".jinja"):
        raise ValueError(f"no template is called {value}: write card, alpaca, tokenizer, or the path of a .jinja file")
    return _resolve(value, info)


Number = Annotated[float, BeforeValidator(_not_bool)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[StrictInt, Field(gt=0)]
Location = Annotated[str, BeforeValidator(_resolve)]
"""A local path (relative to the recipe's file) or a hub id."""

StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
Init = Literal["normal", "mean", "subpiece-mean", "subpiece-mean-norm", "similarity"]


class Full(Section):
    """Every parameter learns."""

    kind: Literal["full"]


class Lora(Section):
    """Low-rank adapters learn; embedding and head with them as `rows` says. Source: arXiv 2106.09685."""

    kind: Literal["lora"]
    rank: Count = 64
    alpha: Positive = 32.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rslora: StrictBool = False
    dora: StrictBool = False
    rows: Literal["all", "new", "none"] = "all"


class NewRows(Section):
    """Only the rows of new pieces learn, in the input embedding and the output head."""

    kind: Literal["new-rows"]


Trains = Annotated[Full | Lora | NewRows, Field(discriminator="kind")]


class GroupSettings(Section):
    """What one group of parameters does differently from its stage."""

    peak_lr: Positive | None = None
    weight_decay: NotNegative | None = None


class Groups(Section):
    """Overrides by role: LoRA adapters, transformer body, rows of old pieces, rows of new pieces."""

    adapter: GroupSettings = GroupSettings()
    body: GroupSettings = GroupSettings()
    old_rows: GroupSettings = GroupSettings()
    new_rows: GroupSettings = GroupSettings()


class LossScale(Section):
    """The dynamic loss scale of fp16; defaults are those of torch's GradScaler.

    DeepSpeed's (the card's) are initial 65536, growth_interval 100, hysteresis 2, floor 1e-10.
    """

    initial: Positive = 65536.0
    growth_interval: Count = 2000
    hysteresis: Count = 1
    floor: Positive = 1e-4


# Knobs of a stage that change how it is computed, not what: they may be changed in the middle of one.
HOW_NOT_WHAT = frozenset(
    {"micro_batch_tokens", "gradient_checkpointing", "checkpoint_every", "recovery", "max_rollbacks"}
)
# Steps of every run, whose folders are found by these names.
STEP_NAMES = frozenset({"scratch", "tokenizer", "base", "data", "model", "heldout", "report"})


class Stage(Section):
    """One stretch of training with one set of trainable parameters and one schedule."""

    name: StageName
    trains: Trains
    objective: Literal["dialogue", "text"] = "dialogue"
    epochs: Positive = 1.0
    peak_lr: Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[StrictInt, Field(ge=0)] | None = None
    weight_decay: NotNegative = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    groups: Groups = Groups()
    batch_rows: Count = 128
    micro_batch_tokens: Count = 8192
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    loss_scale: LossScale = LossScale()
    gradient_checkpointing: StrictBool = False
    heldout_every: Count | None = None
    early_stop_after: Count | None = None
    keep: Literal["best", "last"] = "best"
    checkpoint_every: Count | None = None
    recovery: Literal["automatic", "advise", "off"] = "automatic"
    max_rollbacks: Count = 4
    seed: StrictInt = 0

    @model_validator(mode="after")
    def _one_warmup(self) -> Stage:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        if self.early_stop_after is not None and self.heldout_every is None:
            raise ValueError("early_stop_after counts held-out readings: give heldout_every too")
        return self


class Scratch(Section):
    """A small base built from nothing: its tokenizer is learned and its weights pre-trained on `text`."""

    text: tuple[Location, ...]
    heldout: tuple[Location, ...] = ()
    num_pieces: Count = 2000
    hidden_size: Count = 128
    intermediate_size: Count = 352
    num_layers: Count = 4
    num_heads: Count = 4
    max_positions: Count = 1024
    tied: StrictBool = False
    row_tokens: Count = 128
    training: Stage


class Base(Section):
    """Where the road starts: a published model, or a small one from scratch."""

    model: Location | None = None
    scratch: Scratch | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Base:
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give exactly one of model (a folder or hub id) and scratch")
        return self


class Tokenizer(Section):
    """How the new language's pieces are found and grafted; `keep` leaves the base's tokenizer as it is.

    `num_pieces`: 8,000 where pieces are learned, all where they are given. `auto` means, where pieces are learned: at
    most 4 characters a piece for Han alone, else no limit; the common characters of GB2312 for Han alone and at least
    8,000 pieces; a piece begins with the space before its word if the language sets words apart by spaces.
    """

    mode: Literal["continued", "merge", "card", "keep"] = "continued"
    text: tuple[Location, ...] = ()
    pieces: Location | None = None
    script: tuple[str, ...] = ("Han",)
    num_pieces: Count | None = None
    max_piece_chars: Count | Literal["auto", "none"] = "auto"
    common_characters: Literal["auto", "gb2312-1", "none"] | Location = "auto"
    leading_space: Literal["auto", "always", "never"] = "auto"
    pad_piece: StrictBool = True

    @model_validator(mode="after")
    def _sources(self) -> Tokenizer:
        if self.mode == "continued" and not self.text:
            raise ValueError("mode continued learns pieces from text: give text")
        if self.mode in ("merge", "card") and self.pieces is None:
            raise ValueError(f"mode {self.mode} takes an existing inventory: give pieces")
        return self


class Grow(Section):
    """How the rows of new pieces start, in the input embedding and in the output head."""

    embedding: Init = "subpiece-mean"
    head: Init = "subpiece-mean"
    vectors: Location | None = None
    seed: StrictInt = 0

    @model_validator(mode="after")
    def _vectors(self) -> Grow:
        if "similarity" in (self.embedding, self.head) and self.vectors is None:
            raise ValueError("init similarity needs vectors: a safetensors file of auxiliary vectors by piece")
        return self


class Source(Section):
    """One file, folder or data set of dialogues. `sample` draws that many of its rows by the data section's seed.

    `split` and `config` choose within a hub data set. Optional filters: `simplify` makes Traditional Chinese
    Simplified; with `script`, rows with less than `min_script_share` of their letters in it are dropped.
    """

    path: Location
    format: Literal["auto", "alpaca", "belle", "sharegpt", "messages", "text"] = "auto"
    language: Literal["new", "old"] = "new"
    sample: Count | None = None
    split: str | None = None
    config: str | None = None
    simplify: StrictBool = False
    script: str | None = None
    min_script_share: Fraction = 0.0

    @model_validator(mode="after")
    def _script(self) -> Source:
        if bool(self.min_script_share) != (self.script is not None):
            raise ValueError("script (the Unicode name of one, for example Han) and min_script_share go together")
        return self


class Data(Section):
    """Dialogues to learn from and to be judged by."""

    sources: tuple[Source, ...]
    heldout: tuple[Source, ...] = ()
    heldout_rows: Annotated[StrictInt, Field(ge=0)] = 0
    text: tuple[Source, ...] = ()
    template: Annotated[str, BeforeValidator(_template)] = "card"
    max_tokens: Count = 1024
    too_long: Literal["drop", "cut_at_turn"] = "cut_at_turn"
    near_duplicates: Annotated[Number, Field(gt=0, le=1)] | None = 0.9
    seed: StrictInt = 0

    @model_validator(mode="after")
    def _has_heldout(self) -> Data:
        if not self.heldout and not self.heldout_rows:
            raise ValueError("give heldout files or heldout_rows: a run without held-out rows cannot be judged")
        return self


class Export(Section):
    """How the finished model is written."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    max_shard_gb: Positive = 5.0


class Report(Section):
    """What the report shows besides what the run recorded."""

    num_samples: Annotated[StrictInt, Field(ge=0)] = 6
    max_answer_tokens: Count = 128
    exact_questions: Location | None = None
    questions_shown: Annotated[StrictInt, Field(ge=0)] = 3


class Card(Section):
    """What the model card says that no step can know. Licences are named as the hub names them (apache-2.0, llama2)."""

    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")] | None = None
    data_license: str | None = None


class Recipe(Section):
    """The whole road."""

    name: StageName
    seed: StrictInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    base: Base
    tokenizer: Tokenizer
    grow: Grow = Grow()
    data: Data
    stages: tuple[Stage, ...] = Field(min_length=1)
    export: Export = Export()
    report: Report = Report()
    card: Card = Card()

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are named {', '.join(twice)}: give each its own name")
        taken = sorted(STEP_NAMES.intersection(names))
        if taken:
            raise ValueError(f"a stage is named {taken[0]}, as a step of every run is: give it another name")
        if any(stage.objective == "text" for stage in self.stages) and not self.data.text:
            raise ValueError("a stage with objective text needs data.text")
        learns_new_rows = any(isinstance(stage.trains, NewRows) for stage in self.stages)
        if self.tokenizer.mode == "keep" and learns_new_rows:
            raise ValueError("a new-rows stage needs new pieces, and tokenizer.mode keep adds none")
        return self
