"""Layers shared out over ranks change nothing that is learned: step by step the run of one rank, which holds all."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import ended, on_ranks, started
from test_several_ranks import (
    BAD_ROW,
    CPU,
    LORA_NEW,
    LOUD,
    NEW,
    NUMBERS,
    WEIGHTS,
    cut_after,
    handed_out,
    lines_of,
    poisoned,
    rows_with_one_bad,
    too_fast,
)
from tiny_training import FIRST_NEW_ID, FULL, LORA_ALL, NUM_ROWS, make_rows, make_stage, tiny_model

from graftlm.errors import UserError
from graftlm.health.plan import size_of
from graftlm.health.sharding import moments_of_rank
from graftlm.model.shapes import shape_of
from graftlm.recipe import Stage
from graftlm.training.batches import shares
from graftlm.training.checkpoint import load_checkpoint, newest_checkpoint
from graftlm.training.joining import joined, refuse_uneven_machines
from graftlm.training.parts import num_held_bytes
from graftlm.training.place import Place, place_here
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.room import facts_of, wish_of
from graftlm.training.stage import StageRun

RARELY = {"checkpoint_every": 100, "heldout_every": 3}
# 10 rows in steps of 4: some ranks have fewer micro-batches than others, and in an epoch's last step none at all.
CASES = {
    "full": (make_stage(FULL, **RARELY), False, None),
    "full-tied": (make_stage(FULL, **RARELY, gradient_checkpointing=True), True, None),
    "lora": (make_stage(LORA_ALL, **RARELY), False, None),
    "lora-new-tied": (make_stage(LORA_NEW, **RARELY), True, None),
    "new-rows": (make_stage(NEW, **RARELY), False, None),
    "bf16": (make_stage(FULL, precision="bf16", **RARELY), False, None),
    "bf16-lora": (make_stage(LORA_NEW, precision="bf16", **RARELY), False, None),
    "fp16": (make_stage(FULL, precision="fp16", loss_scale=LOUD, epochs=3, **RARELY), False, None),
    "uneven": (make_stage(FULL, keep="best", heldout_every=3, micro_batch_tokens=12), False, make_rows(10)),
}
# What rounding to 16 bits in other company may change, of a number and of a weight. AdamW moves a weight by its rate
# whichever sign a gradient of almost nothing is rounded to: weights in bf16 are held to ranks with the same rows alone.
CLOSE = {"bf16": (1e-2, math.inf), "fp16": (2e-3, 2e-3)}
# Number of ranks, what is shared out, ranks a machine, cases.
WAYS = {
    "2": (2, "full", 0, ["full-tied", "lora", "bf16", "uneven"]),
    "2x2": (4, "hybrid", 2, ["full", "fp16"]),
    "2 more": (2, "full", 0, ["full", "lora-new-tied", "new-rows", "bf16", "bf16-lora", "fp16"]),
    "4": (4, "full", 0, ["full", "lora", "uneven"]),
    "2 whole": (2, "none", 0, ["bf16", "bf16-lora", "fp16"]),
}
ORDINARY = ("2", "2x2")


def ways_and_cases() -> list[Any]:
    return [
        pytest.param(way, case, marks=() if way in ORDINARY else pytest.mark.slow)
        for way, (_, shard, _, cases) in WAYS.items()
        if shard != "none"
        for case in cases
    ]


def trained(ranks: Ranks, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train every case from the same model; on rank 0 the finished model is kept. What each rank holds is told."""
    found = {}
    for name, (stage, tied, rows) in cases.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        heldout = {"new": make_rows(5, seed=9)}
        run = StageRun(tiny_model(tied), stage, rows or make_rows(), heldout, place, CPU, FIRST_NEW_ID, ranks=ranks)
        run.run()
        moments = [value for state in run.optimizer.state.values() for value in state.values() if value.ndim]
        found[name] = {
            "whole": [float(p.detach().double().sum()) for p in run.parts.lying_whole],
            "held": num_held_bytes([*run.model.parameters(), *moments]),
        }
        if ranks.is_first:
            torch.save(run.finished_model().state_dict(), folder / f"{name}.pt")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A case on one rank: where it lies, and what was told of it."""

    @functools.cache
    def take(case: str) -> tuple[Path, dict[str, Any]]:
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("alone")
        return folder, trained(ALONE, {case: CASES[case]}, folder)[case]

    return take


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    @functools.cache
    def take(way: str) -> tuple[Path, list[Any]]:
        count, shard, local_count, names = WAYS[way]
        folder = tmp_path_factory.mktemp(f"ranks{way}")
        cases = {name: CASES[name] for name in names}
        return folder, on_ranks(
            count, trained, cases, folder, folder=folder / "processes", shard=shard, local_count=local_count
        )

    return take


@pytest.mark.parametrize(("way", "case"), ways_and_cases())
def test_sharded_ranks_are_one_run(
    alone: Callable[[str], tuple[Path, dict[str, Any]]],
    together: Callable[[str], tuple[Path, list[Any]]],
    way: str,
    case: str,
) -> None:
    """Loss, norms, rate, scale, skips and recorder of every step; held-out readings; the finished model."""
    (folder, told), (lone, _) = together(way), alone(case)
    close, heavy = CLOSE.get(case.partition("-")[0], (NUMBERS, WEIGHTS))
    hold_equal(lone / case, folder / case, close)
    hold_alike(lone / f"{case}.pt", folder / f"{case}.pt", heavy)
    assert len({tuple(rank[case]["whole"]) for rank in told}) == 1


def hold_alike(one: Path, other: Path, close: float) -> None:
    before, after = (torch.load(file, weights_only=True) for file in (one, other))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], rtol=0, atol=close), name


def hold_equal(one: Path, other: Path, close: float) -> None:
    pairs = list(zip(lines_of(one), lines_of(other), strict=True))
    for a, b in pairs:
        for key in ("step", "num_updates", "lr", "loss_scale", "skipped", "num_rows", "num_targets", "row_ids"):
            assert a[key] == b[key], (key, a, b)
        if not a["skipped"]:
            assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=close)
            for key, times in (("grad_norms", 1), ("weight_rms", 1), ("update_rms", 100), ("zero_gradient_share", 1)):
                assert b[key] == pytest.approx(a[key], rel=times * close, abs=close), key
    if "fp16" in one.name:
        assert {a["skipped"] for a, _ in pairs} == {True, False}
    readings = list(zip(lines_of(one, "heldout"), lines_of(other, "heldout"), strict=True))
    assert len(readings) > 1
    for a, b in readings:
        assert b["new"]["bits_per_byte"] == pytest.approx(a["new"]["bits_per_byte"], rel=close)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16", "bf16-lora", "fp16"])
def test_in_16_bits_they_are_the_ranks_that_hold_all(
    together: Callable[[str], tuple[Path, list[Any]]], case: str
) -> None:
    """Rows rounded together are rounded alike: against ranks with the same rows only the order of a sum is another."""
    whole, sharded = together("2 whole")[0], together("2 more")[0]
    hold_equal(whole / case, sharded / case, 1e-5)
    hold_alike(whole / f"{case}.pt", sharded / f"{case}.pt", WEIGHTS)


def test_a_rank_holds_its_part(
    alone: Callable[[str], tuple[Path, dict[str, Any]]], together: Callable[[str], tuple[Path, list[Any]]]
) -> None:
    """Weights and moments in bytes: of layers a share, of embedding, head and last norm everything."""
    vocabulary, norm = 48 * 16, 16
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16)
    for case, way, matrices in (("full", "2x2", 2), ("full-tied", "2", 1)):
        whole = matrices * vocabulary + norm
        assert alone(case)[1]["held"] == 3 * 4 * (whole + layers)
        assert {rank[case]["held"] for rank in together(way)[1]} == {3 * 4 * (whole + layers // 2)}
        assert planned_bytes(CASES[case][0], matrices == 1) == 3 * 4 * (whole + layers // 2)


def planned_bytes(stage: Stage, tied: bool) -> int:
    """Weights and moments of a rank of two as a plan has them."""
    shape, rows = shape_of(tiny_model(tied).config.to_dict(), "here"), make_rows()
    wish = wish_of(stage, "here", shape, NUM_ROWS - FIRST_NEW_ID, facts_of(rows, "here"))
    size = size_of(wish, "fp32", True, stage.micro_batch_tokens, stage.gradient_checkpointing)
    (items,) = [moment.items for moment in moments_of_rank(size, 2) if moment.name == "optimizer's step"]
    return items["weights fp32"] + items["Adam's moments fp32"]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_one_ranks_overflow_is_skipped_by_all_and_named(tmp_path: Path, precision: str) -> None:
    """Its rank, layer, row and token, though every rank's part of the sum is not finite."""
    poisoned(ALONE, precision, tmp_path / "one")
    on_ranks(2, poisoned, precision, tmp_path / "two", folder=tmp_path / "processes", shard="full")
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert [(a["skipped"], a["loss_scale"]) for a in one] == [(b["skipped"], b["loss_scale"]) for b in two]
    bad = [line["step"] for line in two if BAD_ROW in line["row_ids"]]
    told = [line for line in lines_of(tmp_path / "two", "incident") if line["step"] in bad]
    assert len(told) == len(bad) == 1
    (expected,) = [line for line in lines_of(tmp_path / "one", "incident") if line["step"] in bad]
    for key in ("cause", "module", "phase", "row_id", "token_id", "bad_rows", "culprits", "batch_rows"):
        assert told[0][key] == expected[key], key
    rows = two[bad[0] - 1]["row_ids"]
    place = shares([int(rows_with_one_bad().lengths[row]) for row in rows], 2)[told[0]["rank"]]
    assert BAD_ROW in [rows[one] for one in place]


@pytest.mark.slow
def test_sharded_ranks_roll_back_together(tmp_path: Path, base: Any) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    one = too_fast(ALONE, state, tmp_path / "one")
    two = on_ranks(2, too_fast, state, tmp_path / "two", folder=tmp_path / "processes", shard="full")
    for rank in two:
        assert (rank["back"], rank["rates"]) == (one["back"], one["rates"])
    assert one["back"] >= 1


def test_any_number_of_ranks_goes_on_sharded_or_not(tmp_path: Path) -> None:
    """R5: killed on 1, 2 and 4 ranks (two machines of two) one after another and ended on 1, as if never killed."""
    stage = make_stage(FULL, epochs=4, keep="best")
    cut_after(ALONE, stage, 0, tmp_path / "whole")
    assert cut_after(ALONE, stage, 3, tmp_path / "run") == "killed"
    for count, step, shard, local_count in ((2, 6, "full", 0), (4, 9, "hybrid", 2)):
        told = on_ranks(
            count, cut_after, stage, step, tmp_path / "run", folder=tmp_path / str(count), shard=shard,
            local_count=local_count,
        )  # fmt: skip
        assert told == ["killed"] * count
    cut_after(ALONE, stage, 0, tmp_path / "run")
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "run"), strict=True):
        assert (a["step"], a["lr"], a["row_ids"]) == (b["step"], b["lr"], b["row_ids"])
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=10 * NUMBERS)


@pytest.mark.slow
def test_what_is_dropped_is_drawn_again_after_a_kill(tmp_path: Path) -> None:
    """With dropout as many ranks go on to the same bits."""
    stage = make_stage({**LORA_ALL, "dropout": 0.2}, epochs=4, keep="best")
    whole = on_ranks(2, cut_after, stage, 0, tmp_path / "whole", folder=tmp_path / "1", shard="full")
    on_ranks(2, cut_after, stage, 5, tmp_path / "run", folder=tmp_path / "2", shard="full")
    assert on_ranks(2, cut_after, stage, 0, tmp_path / "run", folder=tmp_path / "3", shard="full") == whole


@pytest.mark.slow
def test_a_sharded_stage_comes_to_ranks_without_disk_and_road(tmp_path: Path) -> None:
    """One stage after another, the second on what the first made; the model is that of one rank."""
    given = [FULL, {**LORA_NEW, "dora": True}]
    handed_out(ALONE, given, tmp_path / "one")
    on_ranks(2, handed_out, given, tmp_path / "two", folder=tmp_path / "processes", shard="full")
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(tensor, two[name], rtol=0, atol=WEIGHTS) for name, tensor in one.items())


def killed_inside(folder: Path) -> None:
    """Train as this rank; the last one is killed in the middle of a backward pass."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, 5.0, 30.0, "full") as ranks:
            folder.mkdir(exist_ok=True)
            run = StageRun(tiny_model(), make_stage(FULL), make_rows(), {}, folder, CPU, FIRST_NEW_ID, ranks=ranks)

            def die(_: torch.Tensor) -> None:
                if ranks.rank == 1 and run.step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            run.model.get_output_embeddings().parametrizations.weight.original0.register_hook(die)
            run.run()
    except UserError as error:
        if ranks.speaks:
            print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


def test_a_rank_killed_inside_a_pass_ends_all(tmp_path: Path) -> None:
    """R4: the gathering that misses it is no bare error of the wire."""
    codes = ended(started(2, killed_inside, tmp_path / "run", folder=tmp_path), 40)
    assert codes == {0: 130, 1: -signal.SIGKILL}
    told = (tmp_path / "0.err").read_text()
    assert "Rank 1 of 2 is gone" in told
    assert "Traceback" not in told
    assert load_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints")).values["step"] == 2


def test_machines_that_cannot_be_sharded_within_are_refused() -> None:
    for place, problem in (
        (Place(0, 4, 0, 4), "this is one machine"),
        (Place(0, 4, 0, 1), "this is one rank on each machine"),
        (Place(0, 5, 0, 2), "5 ranks are no whole number of machines with 2 each"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            refuse_uneven_machines(place)
        assert "ranks.shard=full" in error.value.fix
    refuse_uneven_machines(Place(3, 4, 1, 2))
