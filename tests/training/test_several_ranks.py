"""Many ranks are one run: the same rows, losses, skips, scales, readings and weights as one rank, step by step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import on_ranks
from tiny_training import (
    FIRST_NEW_ID,
    FULL,
    LORA_ALL,
    make_rows,
    make_stage,
    spoken_rows,
    stage_of,
    tiny_model,
    weights_sha256,
)  # fmt: skip

from graftlm.errors import UserError
from graftlm.health.incident import Incident, finding_of
from graftlm.model.halves import joined_by_name
from graftlm.recipe import Stage
from graftlm.run import read_metrics
from graftlm.text.rows import TokenRows
from graftlm.training.batches import Steps, shares
from graftlm.training.following import follow, stage_for_all
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.stage import StageRun

CPU = torch.device("cpu")
LORA_NEW = {"kind": "lora", "rank": 2, "alpha": 4, "rows": "new"}
NEW = {"kind": "new-rows"}
# What the order of a sum over ranks alone may change in fp32, of a loss and of a norm. Adam divides by roots of
# squares: where a gradient is nearly zero its last bits count, so weights are held to the size of a step.
NUMBERS, WEIGHTS = 1e-6, 1e-5
# Overflows in the first steps and again whenever the scale has grown.
LOUD = {"initial": 2.0**18, "growth_interval": 2, "hysteresis": 1, "floor": 1e-4}


def lines_of(folder: Path, event: str = "step") -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] == event]


def trained(ranks: Ranks, cases: dict[str, Any], folder: Path) -> dict[str, str]:
    """Train every case from the same model on this rank; hashes of the weights it ends with, which are kept as well."""
    found = {}
    for name, (stage, tied, rows) in cases.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        run = StageRun(
            tiny_model(tied),
            stage,
            rows or make_rows(),
            {"new": make_rows(5, seed=9)},
            place,
            CPU,
            FIRST_NEW_ID,
            ranks=ranks,
        )
        run.run()
        found[name] = weights_sha256(run.model)
        if ranks.is_first:
            torch.save(joined_by_name(run._weights()), folder / f"{name}.pt")
    return found


RARELY = {"checkpoint_every": 100, "heldout_every": 3}
CASES = {
    "full": (make_stage(FULL, **RARELY), False, None),
    "full-tied": (make_stage(FULL, **RARELY), True, None),
    "lora": (make_stage(LORA_ALL, **RARELY), False, None),
    "lora-new-tied": (make_stage(LORA_NEW, **RARELY), True, None),
    "new-rows": (make_stage(NEW, **RARELY), False, None),
    "new-rows-tied": (make_stage(NEW, **RARELY), True, None),
    "halves": (make_stage(FULL, precision="bf16", split_master=True, **RARELY), False, None),
    "fp16": (make_stage(FULL, precision="fp16", loss_scale=LOUD, epochs=3, **RARELY), False, None),
    # 10 rows in steps of 4: the last step of an epoch has fewer rows than three ranks.
    "uneven": (make_stage(LORA_ALL, keep="best", heldout_every=3), False, make_rows(10)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    trained(ALONE, CASES, folder)
    return folder


BY_COUNT = {2: [*CASES], 3: ["full", "fp16", "uneven"]}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, list[Any]]]:
    """The same stages on so many ranks, and the hashes of each rank."""

    @functools.cache
    def take(count: int) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp(f"ranks{count}")
        cases = {name: CASES[name] for name in BY_COUNT[count]}
        return folder, on_ranks(count, trained, cases, folder, folder=folder / "processes")

    return take


@pytest.mark.parametrize(("count", "case"), [(count, case) for count, cases in BY_COUNT.items() for case in cases])
def test_several_ranks_are_one_run(
    alone: Path, together: Callable[[int], tuple[Path, list[Any]]], count: int, case: str
) -> None:
    """Loss, norm, rate, scale and skips of every step; held-out readings; rows; weights, which all ranks share."""
    folder, hashes = together(count)
    assert len({told[case] for told in hashes}) == 1
    one, many = lines_of(alone / case), lines_of(folder / case)
    half = case in ("fp16", "halves")
    for a, b in zip(one, many, strict=True):
        for key in ("step", "num_updates", "lr", "loss_scale", "skipped", "num_rows", "num_targets", "row_ids"):
            assert a[key] == b[key], (key, a, b)
        if not a["skipped"]:
            close = {"fp16": 2e-3, "halves": 1e-2}.get(case, NUMBERS)
            assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=close)
    if case == "fp16":
        assert {line["skipped"] for line in one} == {True, False}
    readings = [lines_of(place / case, "heldout") for place in (alone, folder)]
    assert len(readings[0]) == len(readings[1]) > 1
    for a, b in zip(*readings, strict=True):
        assert b["new"]["bits_per_byte"] == pytest.approx(a["new"]["bits_per_byte"], rel=1e-3 if half else NUMBERS)
    before, after = (torch.load(place / f"{case}.pt", weights_only=True) for place in (alone, folder))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if case == "halves":  # in bf16 a gradient near zero may change its sign, and Adam takes a whole step then
            assert (weight - after[name]).square().mean().sqrt() < 2e-3, name
            continue
        assert torch.allclose(weight, after[name], rtol=0, atol=2e-3 if half else WEIGHTS), name


def test_rows_are_shared_out_by_tokens_once_each() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 8):
        lengths = random.integers(5, 300, 64).tolist()
        found = shares(lengths, count)
        assert sorted(place for places in found for place in places) == list(range(64))
        tokens = [sum(lengths[place] for place in places) for places in found]
        assert max(tokens) - min(tokens) <= 0.05 * sum(lengths) / count  # longest first: what is left over is small
        assert found == shares(list(lengths), count)


def test_a_steps_targets_are_counted_without_packing() -> None:
    rows = spoken_rows()
    steps = Steps(rows, batch_rows=7, micro_batch_tokens=64, epochs=1, seed=0)
    for step in range(steps.num_steps):
        assert steps.num_targets(step) == sum(len(batch.targets_N) for batch in steps.micro_batches(step, CPU))


def test_more_ranks_than_rows_of_a_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"5 ranks would share the 4 rows of a step") as error:
        Steps(make_rows(), batch_rows=4, micro_batch_tokens=64, epochs=1, seed=0, num_ranks=5)
    assert "at most 4 ranks" in error.value.fix


RARE, BAD_ROW = 45, 33


def rows_with_one_bad() -> TokenRows:
    """Rows of which one alone holds the rare id."""
    rows = spoken_rows(rare=RARE, rare_row=BAD_ROW)
    is_other = (rows.ids == RARE) & (np.repeat(np.arange(len(rows)), rows.lengths) != BAD_ROW)
    return dataclasses.replace(rows, ids=np.where(is_other, 5, rows.ids).astype(np.uint16))


def poisoned(ranks: Ranks, precision: str, folder: Path) -> str:
    """Train where one rare id's row lets every sum with it overflow."""
    folder.mkdir(exist_ok=True)
    stage = stage_of(LORA_NEW, precision=precision, epochs=1, batch_rows=4, groups={"new_rows": {"peak_lr": 1e-30}})
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[RARE] = 3e38
    run = StageRun(model, stage, rows_with_one_bad(), {}, folder, CPU, FIRST_NEW_ID, ranks=ranks)
    run.run()
    return weights_sha256(run.model)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_one_ranks_overflow_is_every_ranks_skip_and_is_named(tmp_path: Path, precision: str) -> None:
    """N1, N2: its step is skipped on all ranks and on no more; rank, layer and row are told; weights stay the same."""
    poisoned(ALONE, precision, tmp_path / "one")
    hashes = on_ranks(2, poisoned, precision, tmp_path / "two", folder=tmp_path / "processes")
    assert hashes[0] == hashes[1]
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert [line["skipped"] for line in one] == [line["skipped"] for line in two]
    assert [line["loss_scale"] for line in one] == [line["loss_scale"] for line in two]
    bad = [line["step"] for line in two if BAD_ROW in line["row_ids"]]
    assert bad
    assert all(line["skipped"] for line in two if line["step"] in bad)
    told = [line for line in lines_of(tmp_path / "two", "incident") if line["step"] in bad]
    assert len(told) == len(bad) == 1
    for line in told:
        found = Incident(**{key: value for key, value in line.items() if key != "event"})
        assert (found.row_id, found.token_id, found.module[:6]) == (BAD_ROW, RARE, "model.")
        place = two[found.step - 1]["row_ids"].index(BAD_ROW)
        lengths = [int(rows_with_one_bad().lengths[row]) for row in two[found.step - 1]["row_ids"]]
        assert place in shares(lengths, 2)[found.rank]
        assert f"It begins on rank {found.rank} at row {BAD_ROW}" in finding_of(found).evidence


def too_fast(ranks: Ranks, base: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """A learned model at a rate that damages it: rolled back, cut, and trained to the end."""
    folder.mkdir(exist_ok=True)
    stage = stage_of(
        LORA_ALL, groups={"adapter": {"peak_lr": 3.0}}, epochs=3, batch_rows=8, precision="fp32", max_rollbacks=10
    )
    model = tiny_model()
    model.load_state_dict(base)
    run = StageRun(model, stage, spoken_rows(), {}, folder, CPU, FIRST_NEW_ID, ranks=ranks)
    run.run()
    return {"hash": weights_sha256(run.model), "rates": run.recovery.rates.state(), "back": run.recovery.num_rollbacks}


def test_ranks_roll_back_together(tmp_path: Path, base: Any) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    one = too_fast(ALONE, state, tmp_path / "one")
    two = on_ranks(2, too_fast, state, tmp_path / "two", folder=tmp_path / "processes")
    assert two[0] == two[1]
    assert two[0]["back"] == one["back"] >= 1
    assert two[0]["rates"] == one["rates"]
    texts = [[line["text"] for line in lines_of(tmp_path / name, "intervention")] for name in ("one", "two")]
    assert [text.split(":")[0] for text in texts[0]] == [text.split(":")[0] for text in texts[1]]
    assert all("adapter" in text for text in texts[1])


class Killed(BaseException):
    """Stands for a kill."""


def cut_after(ranks: Ranks, stage: Stage, step: int, folder: Path) -> str:
    """Train until all ranks break off after `step` (0: to the end)."""
    folder.mkdir(exist_ok=True)
    run = StageRun(
        tiny_model(), stage, make_rows(), {"new": make_rows(5, seed=9)}, folder, CPU, FIRST_NEW_ID, ranks=ranks
    )
    record = run._record

    def cut(step_record: Any) -> None:
        record(step_record)
        if step_record.step == step:
            raise Killed

    run._record = cut  # type: ignore[method-assign]
    try:
        run.run()
    except Killed:
        return "killed"
    return weights_sha256(run.model)


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow), (2, 2)]
)  # fmt: skip
def test_another_number_of_ranks_goes_on(tmp_path: Path, before: int, after: int) -> None:
    """R5: killed and continued by more or fewer; by as many, to the same bits, what each drops with dropout too."""
    dropping = {**LORA_ALL, "dropout": 0.2}
    stage = make_stage(dropping if before == after else FULL, epochs=4, keep="best")
    run, whole = tmp_path / "run", tmp_path / "whole"

    def take(count: int, step: int, folder: Path, place: str) -> list[str]:
        if count == 1:
            return [cut_after(ALONE, stage, step, folder)]
        return on_ranks(count, cut_after, stage, step, folder, folder=tmp_path / place)

    expected = take(before if before == after else 1, 0, whole, "whole-processes")
    assert take(before, 5, run, "first") == ["killed"] * before
    found = take(after, 0, run, "second")
    assert len(set(found)) == 1
    if before == after:
        assert found == expected
    for a, b in zip(lines_of(whole), lines_of(run), strict=True):
        assert (a["step"], a["lr"], a["row_ids"]) == (b["step"], b["lr"], b["row_ids"])
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=10 * NUMBERS)


def handed_out(ranks: Ranks, trains: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Stages as the road hands them out: only rank 0 has a model, rows and a folder."""
    if not ranks.is_first:
        follow(ranks, CPU)
        return {}
    model = tiny_model(tied=True)
    for number, one in enumerate(trains):
        place = folder / str(number)
        place.mkdir(parents=True)
        run = stage_for_all(
            ranks, model, make_stage(one), make_rows(), {"new": make_rows(5, seed=9)}, place, CPU,
            FIRST_NEW_ID,
        )  # fmt: skip
        run.run()
        model = run.finished_model()
    torch.save(model.state_dict(), folder / "model.pt")
    return {}


def test_a_stage_comes_to_ranks_without_disk_and_road(tmp_path: Path) -> None:
    """Model, rows and settings come from rank 0, for one stage after another; the model is that of one rank."""
    given = [FULL, LORA_NEW]
    handed_out(ALONE, given, tmp_path / "one")
    on_ranks(2, handed_out, given, tmp_path / "two", folder=tmp_path / "processes")
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(tensor, two[name], rtol=0, atol=WEIGHTS) for name, tensor in one.items())


def held_narrow(ranks: Ranks, bits: str, folder: Path) -> dict[str, Any]:
    """A LoRA stage beside a base in few bits."""
    folder.mkdir(exist_ok=True)
    stage = make_stage({**LORA_ALL, "rows": "none"}, frozen_base=bits)
    run = StageRun(tiny_model(), stage, make_rows(), {}, folder, CPU, None, ranks=ranks)
    run.run()
    return {"hash": weights_sha256(run.finished_model()) if ranks.is_first else ""}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_ranks_hold_a_frozen_base_in_few_bits_alike(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    held_narrow(ALONE, bits, tmp_path / "one")
    on_ranks(2, held_narrow, bits, tmp_path / "two", folder=tmp_path / "processes")
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=10 * NUMBERS)


def apart(ranks: Ranks) -> str:
    weight = torch.ones(3) * (1 + 1e-7 * ranks.rank)
    ranks.refuse_different([torch.ones(3)], "The weights")
    try:
        ranks.refuse_different([weight], "The weights")
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_hold_other_bits_are_stopped(tmp_path: Path) -> None:
    told = on_ranks(2, apart, folder=tmp_path)
    assert told[0] == told[1] == "The weights of rank 1 are not those of rank 0: do all compute alike?"
