"""The estimate of memory against real passes and stages to the byte or nearly; the plan that is made of it."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from graftlm.health.activations import Compute, Learns, counts_of, kept_by_layer, kept_of_head, kept_once
from graftlm.health.devices import DEVICES, cpu_device
from graftlm.health.hazards import hazards_of
from graftlm.health.hours import flops_per_token
from graftlm.health.memory import GIB, KERNELS, moments, peak
from graftlm.health.plan import StageWish, plan_stage, size_of, with_overhead
from graftlm.health.row_facts import RowFacts, estimated_rows
from graftlm.model.causal import body_of, new_causal
from graftlm.model.frozen import hold_frozen_as
from graftlm.model.halves import Halves
from graftlm.model.lean import make_lean
from graftlm.model.packed import attend_packed
from graftlm.model.shapes import PUBLISHED, Shape, shape_of
from graftlm.recipe import Stage
from graftlm.text.rows import TokenRows
from graftlm.training.batches import NO_SPARING, Sparing, Steps, row_batches
from graftlm.training.loop import response_loss_sum
from graftlm.training.precision import make_precision
from graftlm.training.room import facts_of, wish_of
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model

FIRST_NEW, NUM_SHARED, BATCH_ROWS, BUDGET = 400, 6, 8, 128
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINS: dict[str, tuple[dict[str, Any], Learns]] = {
    "full": ({"kind": "full"}, Learns("full", "all")),
    "lora": ({"kind": "lora", "rank": 4, "alpha": 4}, Learns("lora", "all", 4, ALL)),
    "lora-with-dropout": (
        {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}, Learns("lora", "all", 4, ALL, 0.1),
    ),
    "lora-of-queries": (
        {"kind": "lora", "rank": 4, "alpha": 4, "rows": "new", "targets": ["q_proj", "v_proj"]},
        Learns("lora", "new", 4, ("q_proj", "v_proj")),
    ),
    "new-rows": ({"kind": "new-rows"}, Learns("new-rows", "new")),
}  # fmt: skip
CARD_ROWS = estimated_rows(500_000, 177, 0.52, 29, 1024, "estimated")


def some_rows(count: int) -> TokenRows:
    """Rows that begin alike, two thirds of each an answer."""
    random = np.random.default_rng(0)
    lengths = random.integers(NUM_SHARED + 6, 30, count)
    ids = random.integers(3, 500, lengths.sum()).astype(np.uint16)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    ids[place < NUM_SHARED] = 5
    return TokenRows(ids, place > NUM_SHARED + 2, offsets, np.full(count, 10, np.int64))


def small_model(num_kv_heads: int = 2, tied: bool = False) -> Any:
    return new_causal(
        num_rows=500, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=num_kv_heads, intermediate_size=80,
        is_tied=tied,
    )  # fmt: skip


def make_stage(
    trains: dict[str, Any], precision: str, is_checkpointing: bool = False, split_master: bool = False
) -> Stage:
    return Stage.model_validate(
        {"name": "sft", "trains": trains, "batch_rows": BATCH_ROWS, "micro_batch_tokens": BUDGET, "keep": "last",
         "precision": precision, "gradient_checkpointing": is_checkpointing, "heldout_every": None, "recovery": "off",
         "split_master": split_master}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "precision", "is_sparing", "in_halves"),
    [(kind, *how, False) for kind in TRAINS for how in (("fp32", True), ("bf16", False))]
    + [("full", "bf16", True, True)],
)
def test_every_tensor_autograd_keeps_is_counted(kind: str, precision: str, is_sparing: bool, in_halves: bool) -> None:
    trains, learns = TRAINS[kind]
    stage, device = make_stage(trains, precision), torch.device("cpu")
    model = small_model(num_kv_heads=4 if is_sparing else 2)
    shape = shape_of(model.config.to_dict(), "the model")
    model = prepare_model(model, stage.trains, FIRST_NEW, 0)
    its_precision = make_precision(stage, device)
    make_lean(body_of(model))
    hold_frozen_as(model, its_precision.compute_dtype)
    if in_halves:
        Halves().split(model)
    attend_packed(body_of(model))
    batch = row_batches(some_rows(8), range(8), 1000, device, Sparing() if is_sparing else NO_SPARING)[0]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_loss_sum(model.train(), batch, its_precision)
    counts, compute = (
        counts_of(batch.layout, len(batch.targets_N)),
        Compute(4 if precision == "fp32" else 2, True, in_halves),
    )
    counted = kept_once(shape, learns, counts, compute) + kept_of_head(shape, learns, 500 - FIRST_NEW)
    for layer in range(3):
        counted += sum(kept_by_layer(shape, learns, counts, compute, is_last=layer == 2).values())
    assert counted == sum(storage.nbytes() for storage in kept.values())
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("kind", "precision", "is_checkpointing", "tied", "split_master"),
    [
        ("full", "fp32", True, False, False),
        ("full", "bf16", True, False, True),
        ("full", "bf16", False, True, True),
        ("lora", "bf16", False, False, False),
        ("new-rows", "fp32", False, True, False),
    ],
)
def test_a_stages_peak_is_within_a_tenth_of_the_estimate(
    kind: str, precision: str, is_checkpointing: bool, tied: bool, split_master: bool, tmp_path: Path
) -> None:
    trains, _ = TRAINS[kind]
    stage, rows, model = (
        make_stage(trains, precision, is_checkpointing, split_master),
        some_rows(2 * BATCH_ROWS),
        small_model(2, tied),
    )
    shape = shape_of(model.config.to_dict(), "the model")
    run = StageRun(model, stage, rows, {}, tmp_path, torch.device("cpu"), FIRST_NEW, saves_beside=False)
    before = sum(p.nbytes for p in (*run.model.parameters(), *run.prepared.halves.low_of.values()))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run.run()
    assert before + most_allocated(watched) == pytest.approx(planned(shape, stage, run.steps), rel=0.1)


def most_allocated(watched: Any) -> int:
    """Bytes at the worst moment, over what was there when the profile began."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_time = sorted(events, key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in in_time]).tolist())


def planned(shape: Shape, stage: Stage, steps: Steps) -> int:
    """The estimate, of the micro-batches the stage really takes."""
    wish = wish_of(stage, "stages.sft", shape, 500 - FIRST_NEW, facts_of(steps.rows, "the test"))
    size = size_of(wish, stage.precision, True, BUDGET, stage.gradient_checkpointing)
    taken = steps.micro_batches(1, torch.device("cpu"))  # the second step: Adam's moments are there
    sizes = [
        replace(size, batch=counts_of(batch.layout, len(batch.targets_N)), is_accumulating=place > 0)
        for place, batch in enumerate(taken)
    ]
    # oneDNN's kernels are no tensors: the profiler does not see them.
    return max(moment.num_bytes - moment.items.get(KERNELS, 0) for size in sizes for moment in moments(size))


def test_the_largest_of_many_steps_is_foreseen() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 0.8, 4000), 10, 1024).astype(int)
    known = RowFacts(4000, tuple((n, n // 2) for n in lengths.tolist()), 1024, 0, "the test")
    epochs = [random.permutation(lengths).reshape(125, 32).sum(1).max() for _ in range(20)]
    assert known.step_tokens(32, True, 125) == pytest.approx(np.median(epochs), rel=0.03)
    assert known.step_tokens(4000, True, 3) == pytest.approx(lengths.sum())  # a step of all rows


def wish_for(model: str = "Llama-2-7b", kind: str = "full", **given: Any) -> StageWish:
    shape = PUBLISHED[model].with_rows(49_954)
    learns = Learns("full", "all") if kind == "full" else Learns("lora", "all", 64, ALL)
    wish = StageWish(
        kind, f"stages.{kind}", shape, learns, 17_954, CARD_ROWS, "fp16", 1.0, 128, 8192, True, False
    )  # fmt: skip
    return replace(wish, **given)


def test_the_work_of_the_card_is_that_of_its_formula() -> None:
    """6 operations a weight and token, and head and attention: 39.75 and 27.76 GFLOP, worked out by hand apart."""
    full, lora = wish_for(), wish_for(kind="lora")
    assert flops_per_token(full.shape, full.learns, CARD_ROWS).plain / 1e9 == pytest.approx(39.75, rel=0.02)
    assert flops_per_token(lora.shape, lora.learns, CARD_ROWS).plain / 1e9 == pytest.approx(27.76, rel=0.02)


@pytest.mark.parametrize(("device", "kind"), [("h200", "full"), ("v100-32", "lora"), ("a100-40", "lora")])
def test_the_micro_batch_told_is_the_largest_that_fits(device: str, kind: str) -> None:
    found = plan_stage(wish_for(kind=kind), DEVICES[device])
    budget = found.micro_batch_tokens
    assert budget is not None

    def needed(tokens: int) -> int:
        size = size_of(found.wish, found.precision, False, tokens, found.gradient_checkpointing)
        return with_overhead(peak(size), DEVICES[device])

    assert needed(budget) <= DEVICES[device].memory_bytes
    assert found.holds_step or needed(budget + 256) > DEVICES[device].memory_bytes


def test_what_does_not_fit_is_sent_where_it_does() -> None:
    found = plan_stage(wish_for(), DEVICES["v100-32"], 8)
    assert (found.fits, found.micro_batch_tokens, found.changes) == (False, None, [])
    assert found.sharded is not None
    assert found.sharded.micro_batch_tokens is not None
    assert found.sharded.peak_gib < 31.7
    told = {finding.cause: finding for finding in hazards_of([found], DEVICES["v100-32"], 8)}
    assert told["does-not-fit"].severity == "fatal"
    assert "It fits one h200." in told["does-not-fit"].cure
    assert "Here fits stages.full.trains={kind: lora}" in told["does-not-fit"].cure
    assert "CUDA 12.6" in told["torch-build"].evidence
    assert {"no-triton", "data-parallel"} <= told.keys()


def test_where_no_whole_base_fits_adapters_on_one_in_fewer_bits_are_told() -> None:
    found = plan_stage(wish_for(), DEVICES["t4"], 1)
    told = {finding.cause: finding.cure for finding in hazards_of([found], DEVICES["t4"], 1)}["does-not-fit"]
    assert "; or stages.full.trains={kind: lora, rows: none} stages.full.frozen_base=int8 or nf4" in told
    assert told.endswith(": lossy. Else take a smaller base.")
    assert "trains={kind: lora}." not in told


def test_a_budget_larger_than_memory_and_a_row_longer_than_the_budget_are_told_with_what_fits() -> None:
    large = plan_stage(wish_for(kind="lora", micro_batch_tokens=60_000, batch_rows=1024), DEVICES["v100-32"])
    assert not large.fits
    assert large.micro_batch_tokens is not None
    assert large.changes == [f"stages.lora.micro_batch_tokens={large.micro_batch_tokens}"]
    small = plan_stage(wish_for(micro_batch_tokens=512), DEVICES["h200"])
    told = hazards_of([small], DEVICES["h200"], 1)[0]
    assert (small.fits, told.cause, told.severity) == (False, "row-longer-than-budget", "fatal")
    assert "may have 1024 tokens, a micro-batch holds 512" in told.evidence


def test_halves_spare_the_copies_and_are_told_where_they_help() -> None:
    """Two bytes a parameter of the layers and of an untied head; the same training, so it comes before another one."""
    plain, halves = (
        plan_stage(wish_for(precision="bf16", gradient_checkpointing=False, split_master=split), DEVICES["h200"])
        for split in (False, True)
    )
    copied = PUBLISHED["Llama-2-7b"].layer_matrices * 32 * 2
    assert plain.peak_bytes - halves.peak_bytes == pytest.approx(1.04 * copied, rel=0.05)
    room = replace(DEVICES["h200"], memory_bytes=(plain.peak_bytes + halves.peak_bytes) // 2)
    tight = plan_stage(plain.wish, room)
    told = {finding.cause: finding.cure for finding in hazards_of([tight], room, 1)}
    assert told["does-not-fit"].endswith(", or stages.full.split_master=true")
    assert plan_stage(halves.wish, room).fits
    large = replace(plain.wish, shape=PUBLISHED["Llama-3.1-8B"], num_new_rows=0, gradient_checkpointing=True)
    room = replace(DEVICES["h200"], memory_bytes=int(0.93 * plan_stage(large, DEVICES["h200"]).peak_bytes))
    told = {finding.cause: finding.cure for finding in hazards_of([plan_stage(large, room)], room, 1)}
    assert "Here fits stages.full.split_master=true, which is the same training." in told["does-not-fit"]
    half = plan_stage(replace(halves.wish, precision="auto"), DEVICES["v100-32"])
    told = {finding.cause: finding.evidence for finding in hazards_of([half], DEVICES["v100-32"], 1)}
    assert "they are in fp16: nothing is split" in told["nothing-split"]
    assert half.peak_bytes == plan_stage(replace(plain.wish, precision="auto"), DEVICES["v100-32"]).peak_bytes


def test_fp8_is_told_where_it_cannot_be_and_not_counted_where_it_can() -> None:
    cpu = cpu_device("a CPU", 64 * GIB, 2, "bf16")
    lacking = {name: DEVICES[name] for name in ("a100-80", "v100-32", "t4", "3090")} | {"cpu": cpu}
    for device in lacking.values():
        found = plan_stage(replace(wish_for("TinyLlama-1.1B", "lora"), fp8=True), device)
        told = {finding.cause: finding for finding in hazards_of([found], device, 1)}
        assert told["no-fp8"].severity == "fatal"
        assert told["no-fp8"].cure.startswith("stages.lora.fp8=false, or a GPU of compute capability 8.9 or more")
        assert "stages.lora.fp8=false" in found.changes
    for name in ("h200", "h100", "l4", "4090"):
        plain, found = (
            plan_stage(replace(wish_for("TinyLlama-1.1B", "lora"), fp8=fp8), DEVICES[name]) for fp8 in (False, True)
        )
        told = {finding.cause: finding for finding in hazards_of([found], DEVICES[name], 1)}
        assert "no-fp8" not in told
        assert told["fp8-not-counted"].evidence.endswith("fp8's gain is not counted: not measured.")
        assert (found.changes, found.hours, found.peak_bytes) == (plain.changes, plain.hours, plain.peak_bytes)


def test_a_precision_the_device_lacks_is_told_with_the_one_to_take() -> None:
    cpu = cpu_device("a CPU", 64 * GIB, 2, "fp32")
    for device, asked, better in ((DEVICES["t4"], "bf16", "fp16"), (cpu, "fp16", "fp32")):
        found = plan_stage(wish_for("TinyLlama-1.1B", "lora", precision=asked), device)
        told = {finding.cause: finding.cure for finding in hazards_of([found], device, 1)}
        assert told[f"no-{asked}"] == f"stages.lora.precision={better}"
        assert f"stages.lora.precision={better}" in found.changes
