"""A recipe: every knob of a run, as data.

Owns the sections (frozen, an unknown key is an error) and the meaning of each knob. Reading YAML, `extends`,
overrides and messages with line numbers live in `recipe_file.py`. Does not know what any step does with its
section. First stop of the road: `load_recipe` hands the sections on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, ValidationInfo

from graftlm.recipe_values import (
    BelowOne,
    Count,
    Fraction,
    Location,
    NotNegative,
    Number,
    Place,
    Positive,
    ScriptName,
    Section,
    SourceLocation,
    StageName,
    resolve_path,
    values_of,
)

Init = Literal["normal", "mean", "subpiece-mean", "subpiece-mean-norm", "similarity"]


def _template(value: Any, info: ValidationInfo) -> Any:
    if value in ("card", "alpaca", "tokenizer") or not isinstance(value, str):
        return value
    if not value.endswith(".jinja"):
        raise ValueError(f"no template is called {value}: write card, alpaca, tokenizer, or the path of a .jinja file")
    return resolve_path(value, info)


def _pretraining(value: Any) -> Any:
    """Its folder is 0-scratch whatever its name, which only stands before its progress."""
    return {"name": "pretrain", **value} if isinstance(value, Mapping) else value


class Full(Section):
    """Every parameter learns."""

    kind: Literal["full"]


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear maps of a layer, by the names that all Llama-like models give them."""


class Lora(Section):
    """Low-rank adapters learn; embedding and head with them as `rows` says. Source: arXiv 2106.09685."""

    kind: Literal["lora"]
    rank: Count = 64
    alpha: Positive = 32.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = get_args(Projection)
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

    initial: Annotated[Positive, Field(le=2**126)] = 65536.0  # times a loss of some nats it must stay a float32
    growth_interval: Count = 2000
    hysteresis: Count = 1
    floor: Positive = 1e-4

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """The scale begins at its floor or above."""
        initial, floor = given["initial"], given["floor"]
        if isinstance(initial, int | float) and isinstance(floor, int | float) and initial < floor:
            yield ("initial",), f"{initial:g} lies below the floor, {floor:g}"


# Knobs of a stage that change how it is computed, not what: they may be changed in the middle of one.
HOW_NOT_WHAT = frozenset(
    {
        "micro_batch_tokens", "gradient_checkpointing", "compile", "split_master", "checkpoint_every", "recovery",
        "max_rollbacks",
    }
)  # fmt: skip
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
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    groups: Groups = Groups()
    batch_rows: Count = 128
    micro_batch_tokens: Count = 8192
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    loss_scale: LossScale = LossScale()
    gradient_checkpointing: StrictBool = False
    compile: StrictBool = False
    split_master: StrictBool = False
    fp8: StrictBool = False
    frozen_base: Literal["exact", "int8", "nf4"] = "exact"
    heldout_every: Count | None = None
    early_stop_after: Count | None = None
    keep: Literal["best", "last"] = "best"
    checkpoint_every: Count | None = None
    recovery: Literal["automatic", "advise", "off"] = "automatic"
    max_rollbacks: Count = 4
    seed: StrictInt = 0

    def as_ordered(self) -> dict[str, Any]:
        """What makes it this stage and no other: a run trains it anew when that has changed.

        A key that came later than the first runs is told where it is used: else those would all begin anew.
        """
        untold = HOW_NOT_WHAT if self.fp8 else HOW_NOT_WHAT | {"fp8"}
        return self.model_dump(mode="json", exclude=set(untold))

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """One warm-up; early stopping needs readings; a base that learns is exact; FP8 stands beside bf16 alone."""
        if given["warmup_steps"] is not None and given["warmup_ratio"]:
            yield ("warmup_steps",), "warmup_ratio is given too: choose one"
        if given["early_stop_after"] is not None and given["heldout_every"] is None:
            yield ("early_stop_after",), "it counts held-out readings, and heldout_every is not given"
        trains = values_of(given.get("trains"))
        if given["frozen_base"] != "exact" and (trains.get("kind") == "full" or trains.get("dora")):
            why = "all of it learns" if trains.get("kind") == "full" else "DoRA takes norms of exact matrices"
            yield ("frozen_base",), f"{given['frozen_base']} is for a base that stays as it is, and here {why}"
        if given["split_master"] is True:
            if given["precision"] in ("fp32", "fp16"):
                yield ("split_master",), f"it needs precision bf16, and here that is {given['precision']}: take bf16"
            if trains.get("kind") in ("lora", "new-rows"):
                yield ("split_master",), f"it is for full training, and this stage trains {trains['kind']}: take false"
            if given["fp8"] is True:
                yield ("split_master",), "fp8 is true too, which takes float32 weights: choose one of both"
        if given["fp8"] is True and given["precision"] in ("fp32", "fp16"):
            yield ("fp8",), f"it needs precision bf16, and here that is {given['precision']}: take bf16, or fp8 false"
        if given["fp8"] is True and given["frozen_base"] in ("int8", "nf4"):
            yield ("fp8",), f"frozen_base is {given['frozen_base']}: choose one of both, each rounds the same matrices"


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
    training: Annotated[Stage, BeforeValidator(_pretraining)]


class Base(Section):
    """Where the road starts: a published model, or a small one from scratch."""

    model: Location | None = None
    scratch: Scratch | None = None

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """One of both."""
        if (given["model"] is None) == (given["scratch"] is None):
            found = "neither" if given["model"] is None else "both"
            yield (), f"give exactly one of model (a folder or hub id) and scratch, found {found}"


class Tokenizer(Section):
    """How the new language's pieces are found and grafted; `keep` leaves the base's tokenizer as it is.

    `num_pieces`: 8,000 where pieces are learned, all where they are given. `auto` means, where pieces are learned: at
    most 4 characters a piece for Han alone, else no limit; the common characters of GB2312 for Han alone and at least
    8,000 pieces; a piece begins with the space before its word if the language sets words apart by spaces.
    """

    mode: Literal["continued", "merge", "card", "keep"] = "continued"
    text: tuple[SourceLocation, ...] = ()
    pieces: Location | None = None
    script: tuple[ScriptName, ...] = ("Han",)
    num_pieces: Count | None = None
    max_piece_chars: Count | Literal["auto", "none"] = "auto"
    common_characters: Literal["auto", "gb2312-1", "none"] | Location = "auto"
    leading_space: Literal["auto", "always", "never"] = "auto"
    pad_piece: StrictBool = True

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """Pieces come from text or from an inventory."""
        if given["mode"] == "continued" and not given["text"]:
            yield ("text",), "mode continued learns pieces from text, and none is given"
        if given["mode"] in ("merge", "card") and given["pieces"] is None:
            yield ("pieces",), f"mode {given['mode']} takes an existing inventory, and none is given"


class Grow(Section):
    """How the rows of new pieces start, in the input embedding and in the output head."""

    embedding: Init = "subpiece-mean"
    head: Init = "subpiece-mean"
    vectors: Location | None = None
    seed: StrictInt = 0

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """Similarity is that of vectors."""
        if "similarity" in (given["embedding"], given["head"]) and given["vectors"] is None:
            yield ("vectors",), "similarity needs a safetensors file of auxiliary vectors by piece, and none is given"


class Source(Section):
    """One file, folder, pattern of files or data set of dialogues.

    `sample` draws that many of its rows by the data section's seed. `split` and `config` choose within a hub data set.
    Optional filters: `simplify` makes Traditional Chinese Simplified; with `script`, rows with less than
    `min_script_share` of their letters in it are dropped.
    """

    path: SourceLocation
    format: Literal["auto", "alpaca", "belle", "sharegpt", "messages", "text"] = "auto"
    language: Literal["new", "old"] = "new"
    sample: Count | None = None
    split: str | None = None
    config: str | None = None
    simplify: StrictBool = False
    script: ScriptName | None = None
    min_script_share: Fraction = 0.0

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """A share is one of a script."""
        if bool(given["min_script_share"]) != (given["script"] is not None):
            found = "script" if given["min_script_share"] else "min_script_share"
            yield (
                (),
                f"script (for example Han) and min_script_share go together: {found} is missing",
            )


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

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """Something to be judged by."""
        is_zero = given["heldout_rows"] == 0 and given["heldout_rows"] is not False  # `no` is told as no number
        if not given["heldout"] and is_zero:
            yield (), "give heldout files or heldout_rows: a run without held-out rows cannot be judged"


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


Shard = Literal["none", "full", "hybrid", "zero2", "zero3"]


class RankSettings(Section):
    """How the processes of a run that trains on several devices share its weights, and how long they wait for one
    another. Changes no result but by the order of sums."""

    shard: Shard = "none"
    join_seconds: Count = 300
    timeout_seconds: Count = 600


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
    ranks: RankSettings = RankSettings()

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """Stages have names of their own, and find what they learn from."""
        stages = given.get("stages")
        stages = [values_of(stage) for stage in stages] if isinstance(stages, list | tuple) else []
        names = [stage.get("name") for stage in stages]
        shard = values_of(given.get("ranks")).get("shard", "none")
        for number, stage in enumerate(stages):
            where, name = ("stages", number), stage.get("name")
            if name is not None and name in names[:number]:
                yield (*where, "name"), f"an earlier stage is named {name} too: give each its own name"
            if isinstance(name, str) and name in STEP_NAMES:
                yield (*where, "name"), f"{name} is the name of a step of every run: give the stage another"
            frozen = stage.get("frozen_base", "exact")
            if frozen != "exact" and shard not in ("none", "zero2"):
                yield (
                    (*where, "frozen_base"),
                    f"{frozen} cannot be shared out over ranks: take exact, or ranks.shard none or zero2",
                )
            if stage.get("objective") == "text" and not values_of(given.get("data")).get("text"):
                yield (*where, "objective"), "a stage with objective text needs data.text"
            trains = values_of(stage.get("trains")).get("kind")
            if trains == "new-rows" and values_of(given.get("tokenizer")).get("mode") == "keep":
                yield (*where, "trains"), "a new-rows stage needs new pieces, and tokenizer.mode keep adds none"
        scratch = values_of(values_of(values_of(given.get("base")).get("scratch")).get("training"))
        places: list[tuple[Place, Mapping[str, Any]]] = [(("base", "scratch", "training"), scratch)]
        places += [(("stages", number), stage) for number, stage in enumerate(stages)]
        for where, stage in places if shard != "none" else ():
            if stage.get("fp8") is True:
                yield (*where, "fp8"), f"FP8 is built for ranks that hold all, not for ranks.shard {shard}: take none"
            if stage.get("split_master") is True:
                yield (*where, "split_master"), f"it is for ranks that hold all, not for ranks.shard {shard}: take none"
