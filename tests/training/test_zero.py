"""DeepSpeed's ZeRO changes nothing that is learned: step by step the run of one rank, which holds all.

`make soak` installs DeepSpeed into an environment of its own and runs this file there; elsewhere it is skipped, but for
the refusal of a run that asks for DeepSpeed where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import ended, on_ranks, started
from test_several_ranks import (
    BAD_ROW,
    CPU,
    LORA_NEW,
    NUMBERS,
    WEIGHTS,
    cut_after,
    handed_out,
    held_narrow,
    lines_of,
    poisoned,
    rows_with_one_bad,
    too_fast,
)
from test_sharded_ranks import CASES, CLOSE, hold_alike, hold_equal, trained
from tiny_training import FIRST_NEW_ID, FULL, LORA_ALL, make_rows, make_stage, tiny_model

from graftlm.errors import UserError
from graftlm.training import zero
from graftlm.training.batches import shares
from graftlm.training.checkpoint import load_checkpoint, newest_checkpoint
from graftlm.training.joining import joined, refuse_missing_deepspeed
from graftlm.training.place import place_here
from graftlm.training.ranks import ALONE, Ranks
from graftlm.training.stage import StageRun

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED,
    reason="DeepSpeed is not installed, so ZeRO is NOT tested here: make soak does it in an environment of its own",
)
SHARDS = ["zero2", "zero3"]
pytestmark = pytest.mark.timeout(600)  # the nine cases of a way are trained before its first test
NAMES = ["full", "full-tied", "lora", "lora-new-tied", "new-rows", "bf16", "bf16-lora", "fp16", "uneven"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(ALONE, {name: CASES[name] for name in NAMES}, folder)


@pytest.fixture(scope="module", params=SHARDS)
def shard(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, shard: str) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp(shard)
    cases = {name: CASES[name] for name in NAMES}
    return folder, on_ranks(2, trained, cases, folder, folder=folder / "processes", shard=shard, seconds=500)


@needs_deepspeed
@pytest.mark.parametrize("case", NAMES)
def test_zero_is_one_run(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    """Loss, norms, rate, scale, skips and recorder of every step; held-out readings; the finished model."""
    one, two = alone[0], together[0]
    close, heavy = CLOSE.get(case.partition("-")[0], (NUMBERS, WEIGHTS))
    hold_equal(one / case, two / case, close)
    hold_alike(one / f"{case}.pt", two / f"{case}.pt", heavy)
    assert len({tuple(rank[case]["whole"]) for rank in together[1]}) == 1


def gathering(ranks: Ranks, stage: Any, folder: Path) -> None:
    """Weights are sent whatever their size, as a real model's are: DeepSpeed keeps small ones whole."""
    zero.ZERO[3] = {**zero.ZERO[3], "stage3_param_persistence_threshold": 0}
    trained(ranks, {"run": (stage, False, make_rows(9))}, folder)


@needs_deepspeed
def test_a_rank_without_rows_keeps_in_step(tmp_path: Path) -> None:
    """The last step of an epoch has one row: what the idle rank fetches ahead must be what the other one does."""
    stage = make_stage(FULL, epochs=3, heldout_every=3)
    trained(ALONE, {"run": (stage, False, make_rows(9))}, tmp_path / "one")
    on_ranks(2, gathering, stage, tmp_path / "two", folder=tmp_path / "processes", shard="zero3")
    hold_equal(tmp_path / "one" / "run", tmp_path / "two" / "run", NUMBERS)


@needs_deepspeed
def test_a_rank_holds_its_part(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, list[dict[str, Any]]], shard: str
) -> None:
    """Of the two moments of each weight a half, but for what DeepSpeed fills up to; the weights whole, or in its
    optimizer's part alone, which is not counted here."""
    for case in ("full", "full-tied"):
        weights = alone[1][case]["held"] // 3
        held = 2 * weights if shard == "zero2" else weights
        for rank in together[1]:
            assert 0 <= rank[case]["held"] - held < weights // 20


@needs_deepspeed
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_one_ranks_overflow_is_skipped_by_all_and_named(tmp_path: Path, shard: str, precision: str) -> None:
    """Its rank, layer, row and token; and nothing of that step is left in the next one's gradients."""
    poisoned(ALONE, precision, tmp_path / "one")
    hashes = on_ranks(2, poisoned, precision, tmp_path / "two", folder=tmp_path / "processes", shard=shard)
    assert hashes[0] == hashes[1]
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert [(a["skipped"], a["loss_scale"]) for a in one] == [(b["skipped"], b["loss_scale"]) for b in two]
    for a, b in zip(one, two, strict=True):
        if not a["skipped"]:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3 if precision == "fp16" else 1e-5)
    bad = [line["step"] for line in two if BAD_ROW in line["row_ids"]]
    told, expected = (
        [line for line in lines_of(tmp_path / name, "incident") if line["step"] in bad] for name in ("two", "one")
    )
    assert len(told) == len(bad) == 1
    for key in ("cause", "module", "phase", "row_id", "token_id", "bad_rows", "culprits"):
        assert told[0][key] == expected[0][key], key
    rows = two[bad[0] - 1]["row_ids"]
    place = shares([int(rows_with_one_bad().lengths[row]) for row in rows], 2)[told[0]["rank"]]
    assert BAD_ROW in [rows[one] for one in place]


@needs_deepspeed
def test_ranks_roll_back_together(tmp_path: Path, shard: str, base: Any) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    one = too_fast(ALONE, state, tmp_path / "one")
    two = on_ranks(2, too_fast, state, tmp_path / "two", folder=tmp_path / "processes", shard=shard)
    assert two[0] == two[1]
    assert two[0]["back"] == one["back"] >= 1
    assert two[0]["rates"] == one["rates"]


@needs_deepspeed
def test_any_way_of_sharding_goes_on_from_any(tmp_path: Path) -> None:
    """R5: killed under one way after another and ended on one rank, as if never killed."""
    stage = make_stage(FULL, epochs=5, keep="best")
    cut_after(ALONE, stage, 0, tmp_path / "whole")
    for step, shard in ((3, "zero2"), (6, "full"), (9, "zero3"), (12, "zero2")):
        told = on_ranks(2, cut_after, stage, step, tmp_path / "run", folder=tmp_path / str(step), shard=shard)
        assert told == ["killed"] * 2
    cut_after(ALONE, stage, 0, tmp_path / "run")
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "run"), strict=True):
        assert (a["step"], a["lr"], a["row_ids"]) == (b["step"], b["lr"], b["row_ids"])
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=10 * NUMBERS)
    kinds = {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl"}  # and no pickle of anybody's


@needs_deepspeed
def test_what_is_dropped_is_drawn_again_after_a_kill(tmp_path: Path, shard: str) -> None:
    """With dropout as many ranks go on to the same bits."""
    stage = make_stage({**LORA_ALL, "dropout": 0.2}, epochs=4, keep="best")
    whole = on_ranks(2, cut_after, stage, 0, tmp_path / "whole", folder=tmp_path / "1", shard=shard)
    on_ranks(2, cut_after, stage, 5, tmp_path / "run", folder=tmp_path / "2", shard=shard)
    assert on_ranks(2, cut_after, stage, 0, tmp_path / "run", folder=tmp_path / "3", shard=shard) == whole


@needs_deepspeed
def test_one_stage_after_another_comes_to_ranks_without_disk_and_road(tmp_path: Path, shard: str) -> None:
    given = [FULL, {**LORA_NEW, "dora": True}]
    handed_out(ALONE, given, tmp_path / "one")
    on_ranks(2, handed_out, given, tmp_path / "two", folder=tmp_path / "processes", shard=shard)
    hold_alike(tmp_path / "one" / "model.pt", tmp_path / "two" / "model.pt", WEIGHTS)


@needs_deepspeed
def test_a_frozen_base_in_few_bits_is_left_alone(tmp_path: Path) -> None:
    """ZeRO-2 knows only what learns."""
    pytest.importorskip("bitsandbytes")
    held_narrow(ALONE, "nf4", tmp_path / "one")
    on_ranks(2, held_narrow, "nf4", tmp_path / "two", folder=tmp_path / "processes", shard="zero2")
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=10 * NUMBERS)


def failing(fault: str, shard: str, folder: Path) -> None:
    """Train as this rank; the last one is killed, or hangs, after step 3."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, 5.0, 30.0, shard) as ranks:
            folder.mkdir(exist_ok=True)
            run = StageRun(tiny_model(), make_stage(FULL), make_rows(), {}, folder, CPU, FIRST_NEW_ID, ranks=ranks)
            record = run._record

            def fail(step_record: Any) -> None:
                record(step_record)
                if ranks.rank == 1 and step_record.step == 3:
                    if fault == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)

            run._record = fail  # type: ignore[method-assign]
            run.run()
    except UserError as error:
        if ranks.speaks:
            print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


@needs_deepspeed
@pytest.mark.parametrize(("fault", "told"), [("killed", "Rank 1 of 2 is gone"), ("hanging", "did not answer for 5 s")])
def test_a_lost_rank_ends_all(tmp_path: Path, shard: str, fault: str, told: str) -> None:
    """R4: what DeepSpeed's sums break off with is no bare error of the wire, and it waits no longer than the run."""
    processes = started(2, failing, fault, shard, tmp_path / "run", folder=tmp_path)
    processes[0].join(60)
    assert processes[0].exitcode == 130
    processes[1].kill()
    ended(processes, 10)
    said = (tmp_path / "0.err").read_text()
    assert told in said
    assert "Traceback" not in said
    assert load_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints")).values["step"] == 2


def test_a_run_without_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for shard in ("zero2", "zero3"):
        with pytest.raises(UserError, match=rf"ranks\.shard={shard} needs DeepSpeed") as error:
            refuse_missing_deepspeed(shard)
        assert "pip install 'graftlm[deepspeed]'" in error.value.fix
    for shard in ("none", "full", "hybrid"):
        refuse_missing_deepspeed(shard)
