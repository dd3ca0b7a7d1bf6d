"""The catalogue of planted faults: cause, place and cure right for every one; healthy runs raise no alarm at all.

`pytest -s tests/training/test_catalogue.py` prints the table.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import EOS, FIRST_NEW_ID, FULL, LORA_ALL, NUM_ROWS, spoken_rows, stage_of, tiny_model, weights_sha256

from graftlm.device import random_states
from graftlm.errors import NumericalStop
from graftlm.health.curves import diagnose_curves
from graftlm.health.finding import Finding, alarms
from graftlm.health.incident import Incident, finding_of
from graftlm.health.logs import read_log
from graftlm.health.preflight import preflight
from graftlm.model.causal import body_of
from graftlm.model.packed import attend_packed
from graftlm.recipe import Stage
from graftlm.run import read_json, read_metrics
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Steps
from graftlm.training.look import take_look
from graftlm.training.precision import make_precision
from graftlm.training.replay import SkippedStep, replay
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model

LORA = {"kind": "lora", "rank": 4, "alpha": 4, "rows": "new"}
NEW = {"kind": "new-rows"}
TABLE: list[tuple[str, ...]] = []


@pytest.fixture(scope="module", autouse=True)
def printed_table() -> Iterator[None]:
    yield
    print("\n| fault | cause | where | cure |\n|---|---|---|---|")
    for row in TABLE:
        print(f"| {' | '.join(row)} |")


def looked_at(
    stage: Stage, rows: TokenRows | None = None, plant: Callable[[Any], object] = lambda model: None
) -> list[Finding]:
    """Pre-flight findings of a stage over a tiny model, with a fault planted after the stage prepared it."""
    model = prepare_model(tiny_model(), stage.trains, FIRST_NEW_ID, 0)
    attend_packed(body_of(model))
    plant(model)
    steps = Steps(rows or spoken_rows(), batch_rows=8, micro_batch_tokens=256, epochs=1, seed=0)
    precision = make_precision(stage, torch.device("cpu"))
    return preflight(take_look(model, steps, stage, precision, FIRST_NEW_ID, lambda row: f"piece {row}"))


def expect(fault: str, findings: list[Finding], cause: str, where: str, cure: str) -> Finding:
    """It is found, nothing graver is, and it says where and how it is cured."""
    found = next((f for f in findings if f.cause == cause), None)
    assert found is not None, f"{fault}: found {[(f.cause, f.where) for f in findings]}"
    assert found.severity == findings[0].severity, f"{fault}: {findings[0]} is graver"
    assert where in found.where, f"{fault}: {found}"
    assert cure in found.cure, f"{fault}: {found}"
    TABLE.append((fault, found.cause, found.where, found.cure))
    return found


def embedding_rows(model: Any) -> torch.nn.Parameter:
    return model.get_input_embeddings().parametrizations.weight.original1


def set_rows(factor: float, place: int | None = None) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        with torch.no_grad():
            rows = embedding_rows(model)
            (rows if place is None else rows[place]).mul_(factor)

    return plant


def scale_old_row(row: int, factor: float) -> Callable[[Any], None]:
    return lambda model: model.get_input_embeddings().parametrizations.weight.original0.data[row].mul_(factor)


def scale_embedding(factor: float) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        for part in model.get_input_embeddings().parameters():
            part.data.mul_(factor)

    return plant


def scale_module(name: str, factor: float) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).weight.data.mul_(factor)


def scale_attention(model: Any) -> None:
    for name in ("q_proj", "k_proj"):
        scale_module(f"model.layers.1.self_attn.{name}", 1e21)(model)


def masked(mask: Callable[[TokenRows], np.ndarray]) -> TokenRows:
    return dataclasses.replace(spoken_rows(), is_target=mask(spoken_rows()))


def share_a_weight(model: Any) -> None:
    first, second = (model.get_submodule(f"model.layers.{n}.mlp.up_proj") for n in (0, 1))
    second.weight = torch.nn.Parameter(first.weight.detach())  # another parameter over the same memory


def freeze_new_rows(model: Any) -> None:
    embedding_rows(model).requires_grad_(False)


DOWN = "model.layers.1.mlp.down_proj"
BEFORE: dict[str, tuple[Callable[[], list[Finding]], str, str, str]] = {
    "16-bit weights without a master": (
        lambda: looked_at(stage_of(precision="fp16"), plant=lambda model: model.half()),
        "no-fp32-master", "body", "fp32 masters",
    ),
    "Adam's eps is 0 in the weights' dtype": (
        lambda: looked_at(stage_of(precision="fp16"), plant=lambda model: model.half()),
        "eps-underflow", "eps", "Raise eps",
    ),
    "eps below the smallest fp32": (
        lambda: looked_at(stage_of(eps=1e-60)), "eps-underflow", "eps", "Raise eps",
    ),
    "alpha/r and rate of the adapter": (
        lambda: looked_at(stage_of({**LORA, "alpha": 256}, peak_lr=1e-3)),
        "adapter-push-high", "trains.alpha", "alpha/rank",
    ),
    "huge new rows": (
        lambda: looked_at(stage_of(), plant=set_rows(1e3)), "huge-new-rows", "embedding", "grow.embedding",
    ),
    "tiny new rows": (
        lambda: looked_at(stage_of(), plant=set_rows(1e-4)), "tiny-new-rows", "embedding", "grow.embedding",
    ),
    "one old row far too large": (
        lambda: looked_at(stage_of(), plant=scale_old_row(7, 3000)),
        "outlier-row", "row 7 of the embedding", "another copy of the base",
    ),
    "one new row far too large": (
        lambda: looked_at(stage_of(), plant=set_rows(3000, 3)),
        "huge-new-rows", f"row {FIRST_NEW_ID + 3} of the embedding", "grow.embedding",
    ),
    "an embedding far too small": (
        lambda: looked_at(stage_of(), plant=scale_embedding(1e-4)), "tiny-embedding", "embedding", "another copy",
    ),
    "an embedding far too large": (
        lambda: looked_at(stage_of(), plant=scale_embedding(1e30)), "huge-embedding", "embedding", "another copy",
    ),
    "a rate beyond the weights' own size": (
        lambda: looked_at(stage_of(FULL, peak_lr=3.0)), "rate-too-high", "body", "Lower peak_lr",
    ),
    "a group's rate beyond its weights' own size": (
        lambda: looked_at(stage_of(LORA, groups={"new_rows": {"peak_lr": 0.5}})),
        "rate-too-high", "new_rows", "groups.new_rows.peak_lr",
    ),
    "a loss scale that may not fall": (
        lambda: looked_at(stage_of(precision="fp16", loss_scale={"initial": 2.0**32, "floor": 1e9})),
        "scale-floor-too-high", "loss_scale.floor", "Lower loss_scale.floor",
    ),
    "a loss scale that begins too high": (
        lambda: looked_at(stage_of(precision="fp16", loss_scale={"initial": 2.0**120})),
        "scale-starts-too-high", "loss_scale.initial", "Lower loss_scale.initial",
    ),
    "new rows left as they were grafted": (
        lambda: looked_at(stage_of({**LORA, "rows": "none"})), "new-rows-fixed", "trains.rows", "new or all",
    ),
    "a new row of NaN": (
        lambda: looked_at(stage_of(), plant=set_rows(float("nan"), 3)),
        "weights-not-finite", f"row {FIRST_NEW_ID + 3}", "grow.embedding",
    ),
    "a poisoned layer": (
        lambda: looked_at(stage_of(), plant=scale_module(DOWN, float("inf"))),
        "weights-not-finite", DOWN, "another copy of the base",
    ),
    "a layer far too large": (
        lambda: looked_at(stage_of(), plant=scale_attention),
        "not-finite-at-start", "model.layers.1", "too large",
    ),
    "an activation near 65,504": (
        lambda: looked_at(stage_of(precision="fp16"), plant=scale_module("model.layers.1.mlp.up_proj", 5e6)),
        "no-forward-headroom", "model.layers.1.mlp", "bf16",
    ),
    "rows without labels": (
        lambda: looked_at(stage_of(), rows=masked(lambda rows: rows.is_target & False)),
        "no-labels", "data", "empty answers",
    ),
    "a label outside the vocabulary": (
        lambda: looked_at(stage_of(), rows=spoken_rows(rare=NUM_ROWS, rare_row=17)),
        "label-outside-vocabulary", "row 17", "graftlm expand",
    ),
    "a template that scores the prompt": (
        lambda: looked_at(stage_of(), rows=masked(lambda rows: rows.is_target | True)),
        "prompt-is-scored", "data.template", "only answers",
    ),
    "a template without ends": (
        lambda: looked_at(stage_of(), rows=masked(lambda rows: rows.is_target & (rows.ids != EOS))),
        "answers-without-end", "data.template", "end token",
    ),
    "new rows frozen that should train": (
        lambda: looked_at(stage_of(NEW), plant=freeze_new_rows), "frozen", "embed_tokens", "requires_grad",
    ),
    "a module counted twice": (
        lambda: looked_at(stage_of(), plant=share_a_weight), "counted-twice", "up_proj", "one parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BEFORE)
def test_told_before_the_first_step(fault: str) -> None:
    plant, cause, where, cure = BEFORE[fault]
    expect(fault, plant(), cause, where, cure)


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "rate", "is_told"),
    [
        (64, 64, True, 1e-3, False),
        (64, 64, True, 4e-3, True),
        (64, 512, False, 1e-3, True),
        (64, 64, False, 4e-3, False),
    ],
)
def test_the_push_of_an_adapter_is_told_where_it_was_measured_to_ruin(
    rank: int, alpha: int, rslora: bool, rate: float, is_told: bool
) -> None:
    """Rank-stabilized LoRA has the same push at a lower rate, and stands more of it."""
    trains = {"kind": "lora", "rank": rank, "alpha": alpha, "rslora": rslora, "rows": "new"}
    found = looked_at(stage_of(trains, peak_lr=rate, groups={"new_rows": {"peak_lr": 1e-4}}))
    assert [f.cause for f in found] == ["adapter-push-high"] * is_told


def test_a_loss_scale_nothing_uses_is_a_note() -> None:
    [found] = looked_at(stage_of(precision="fp32", loss_scale={"initial": 1024.0}))
    assert (found.cause, found.severity) == ("loss-scale-unused", "note")


def test_new_rows_that_were_trained_before_may_stay(base: Any) -> None:
    stage = stage_of({**LORA, "rows": "none"})
    run = StageRun(copy.deepcopy(base), stage, spoken_rows(), {}, Path(), torch.device("cpu"), FIRST_NEW_ID)
    assert run.look()[1] == []


def test_a_row_that_stands_out_is_named_with_its_piece_and_nothing_else_is_blamed() -> None:
    [found] = looked_at(stage_of(), plant=scale_old_row(7, 3000))
    assert "Row 7 of the embedding ('piece 7'), of an old piece" in found.evidence
    [found] = looked_at(stage_of(), plant=set_rows(3000, 3))
    assert f"Row {FIRST_NEW_ID + 3} of the embedding ('piece {FIRST_NEW_ID + 3}'), of a new piece" in found.evidence
    [found] = looked_at(stage_of(), plant=set_rows(float("nan"), 3))
    assert found.where.endswith(f"row {FIRST_NEW_ID + 3} ('piece {FIRST_NEW_ID + 3}')")


def trained(tmp_path: Path, stage: Stage, model: Any, rows: TokenRows | None = None, plant: Any = None) -> StageRun:
    run = StageRun(model, stage, rows or spoken_rows(), {}, tmp_path, torch.device("cpu"), FIRST_NEW_ID)
    if plant:
        plant(run.model)
    run.run()
    return run


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("fault", "role", "trains"),
    [
        ("rate too high at the adapter", "adapter", LORA_ALL),
        ("rate too high at the new rows", "new_rows", LORA_ALL),
        ("rate too high at the body", "body", FULL),
    ],
)
def test_told_while_it_trains(
    tmp_path: Path, base: Any, fault: str, role: str, trains: dict[str, Any], precision: str
) -> None:
    """N2: the loss rises or the forward pass overflows, and the role whose rate it was is named; then exit 3."""
    stage = stage_of(
        trains, precision=precision, epochs=6, batch_rows=8, peak_lr=1e-4, groups={role: {"peak_lr": 30.0}},
        max_rollbacks=1,
    )  # fmt: skip
    with pytest.raises(NumericalStop) as error:
        trained(tmp_path, stage, copy.deepcopy(base))
    assert error.value.exit_code == 3
    grave = [f for f in incidents_of(tmp_path) if f.severity == "fatal"]
    words = {"adapter": "the adapter", "new_rows": "the new rows", "body": "the transformer body"}[role]
    assert grave
    # Where it breaks first depends on the processor's rounding; in float32 nothing overflows, and the loss tells.
    where = {"loss-rose": "loss"} if precision == "fp32" else {"loss-rose": "loss", "forward-overflow": "model.layers."}
    assert grave[0].cause in where, grave[0]
    assert words in grave[0].evidence, grave[0]
    expect(f"{fault}, {precision}", grave[:1], grave[0].cause, where[grave[0].cause], f"groups.{role}.peak_lr")


def incidents_of(folder: Path) -> list[Finding]:
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "incident"]
    return [finding_of(Incident(**{k: v for k, v in line.items() if k != "event"})) for line in lines]


def test_a_loss_scale_that_a_short_stage_cannot_bring_down() -> None:
    """Fewer skips than would stop a run, and yet more than the stage has steps: nothing would be learned."""
    found = looked_at(stage_of(precision="fp16", loss_scale={"initial": 2.0**40}))
    told = expect("a short stage", found, "scale-starts-too-high", "loss_scale.initial", "Lower loss_scale.initial")
    assert told.severity == "fatal"
    assert "the stage has 8." in told.evidence


def test_a_bad_batch_now_and_then(tmp_path: Path) -> None:
    """N1: one row of sixty breaks the step it is in; the row is named, weights stay finite, the run goes on."""
    rare = 45

    def plant(model: Any) -> None:
        with torch.no_grad():
            embedding_rows(model)[rare - FIRST_NEW_ID] = 3e38  # finite itself; no sum with it is

    rows = spoken_rows(rare=rare, rare_row=33)
    keep = rows.ids == rare
    ids = np.where(keep & (np.repeat(np.arange(60), rows.lengths) != 33), 5, rows.ids).astype(np.uint16)
    stage = stage_of(LORA, epochs=4, batch_rows=4, groups={"new_rows": {"peak_lr": 1e-30}}, recovery="automatic")
    run = trained(tmp_path, stage, tiny_model(), dataclasses.replace(rows, ids=ids), plant)
    found = [f for f in incidents_of(tmp_path) if f.severity != "note"]
    assert found
    assert all("row 33" in f.evidence for f in found), found
    causes = {f.cause for f in found}
    assert causes <= {"forward-not-finite", "backward-overflow"}, found
    expect("a bad batch now and then", found, found[0].cause, "model.", "Drop or mend the rows named")
    assert run.recovery.num_rollbacks == 0
    skipped = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("skipped")]
    assert len(skipped) == 4  # once an epoch


HEALTHY = [
    (FULL, "fp32", False), (FULL, "bf16", True), (FULL, "fp16", False), (LORA, "fp32", True), (LORA, "fp16", False),
    (LORA_ALL, "bf16", False), (LORA_ALL, "fp16", True), (NEW, "fp32", False), (NEW, "fp16", True),
    ({**LORA, "rslora": True, "dropout": 0.1}, "fp32", False),
]  # fmt: skip


@pytest.mark.parametrize(("trains", "precision", "tied"), HEALTHY)
def test_healthy_runs_raise_no_alarm(tmp_path: Path, trains: dict[str, Any], precision: str, tied: bool) -> None:
    no_alarm(tmp_path, stage_of(trains, precision=precision, epochs=3, batch_rows=8), tied)


def test_a_low_static_scale_is_no_alarm(tmp_path: Path) -> None:
    scale = {"initial": 2.0**-6, "growth_interval": 10**6, "floor": 2.0**-20}
    no_alarm(tmp_path, stage_of(FULL, precision="fp16", epochs=3, batch_rows=8, loss_scale=scale), False)


def no_alarm(folder: Path, stage: Stage, tied: bool) -> None:
    run = StageRun(tiny_model(tied), stage, spoken_rows(), {}, folder, torch.device("cpu"), FIRST_NEW_ID)
    run.run()
    assert alarms([Finding(**f) for f in read_json(folder / "preflight.json")["findings"]]) == []
    assert alarms(incidents_of(folder)) == []
    findings, verdict = diagnose_curves(read_log(folder / "metrics.jsonl"))
    assert (alarms(findings), verdict) == ([], "healthy")
    assert run.recovery.num_rollbacks == 0


def test_a_bad_place_in_the_last_layer_is_told_by_its_own_token(tmp_path: Path) -> None:
    """The last layer holds labelled positions only: its third one is not the third token."""
    stage = stage_of(FULL, batch_rows=8, micro_batch_tokens=256)
    run = StageRun(tiny_model(), stage, spoken_rows(), {}, tmp_path, torch.device("cpu"), FIRST_NEW_ID)
    (batch,) = run.steps.micro_batches(0, torch.device("cpu"))

    def poison(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(1, torch.tensor([2]), torch.inf)

    body_of(run.model).layers[-1].mlp.down_proj.register_forward_hook(poison)
    skipped = SkippedStep(0, 1.0, random_states())
    found = replay(run.model, run.steps, skipped, run.precision, None, FIRST_NEW_ID)
    assert found.module == DOWN
    assert found.token_id == int(batch.ids_1T[0, batch.labelled_N[2]])
    assert found.row_id == batch.row_ids[int(batch.row_N[2])]


def test_weights_are_not_touched_by_a_replay(tmp_path: Path) -> None:
    """N1: replayed or not, a run with overflows ends with the same bits."""
    digests = []
    for recovery in ("advise", "off"):
        stage = stage_of(LORA, precision="fp16", epochs=2, batch_rows=8, recovery=recovery)
        folder = tmp_path / recovery
        folder.mkdir()
        run = StageRun(tiny_model(), stage, spoken_rows(), {}, folder, torch.device("cpu"), FIRST_NEW_ID)
        run.precision.scaler.scale = 2.0**30  # overflows until it has come down
        run.run()
        digests.append(weights_sha256(run.finished_model()))
    lines = read_metrics(tmp_path / "advise" / "metrics.jsonl")
    assert any(line["event"] == "incident" and line["cause"] == "scale-too-high" for line in lines)
    assert digests[0] == digests[1]
