"""The verb plan: one JSON object or a page to read, and two lines for what cannot be planned."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.cli.app import main

ROOT = Path(__file__).parents[1]
CARD = ROOT / "recipes" / "llama2-7b-chinese.yaml"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Plan in this process, in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graftlm", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(str(left.value.code)), out, err

    return call


def test_the_cards_recipe_on_one_h200(run: Run) -> None:
    code, out, err = run(CARD, "--on", "h200", "--json")
    found = json.loads(out)
    assert (code, err, found["fits"]) == (0, "", True)
    assert 110 < found["peak_gib"] < 140
    assert sum(found["items"].values()) == pytest.approx(found["peak_gib"])
    assert found["items"]["Adam's moments fp32"] == pytest.approx(2 * found["items"]["weights fp32"])
    assert found["num_rows"] == 49_954
    assert found["micro_batch_tokens"] >= 8192
    assert found["hours"] == pytest.approx(sum(stage["hours"] for stage in found["stages"]))
    assert any("assumed" in line for line in found["assumptions"])
    assert {"bf16-instead", "dropout-costs"} <= {hazard["cause"] for hazard in found["hazards"]}


def test_a_plan_to_read_names_the_command_that_follows(run: Run) -> None:
    code, out, err = run(CARD, "--on", "h200", "stages.full.micro_batch_tokens=512")
    assert (code, err) == (0, "")
    assert out.startswith("llama2-7b-chinese on one NVIDIA H200 SXM (140.4 GiB): fits when changed\n")
    assert "fatal: full: a row may have 1024 tokens, a micro-batch holds 512." in out
    last = out.splitlines()[-1]
    assert last.startswith(f"Try     graftlm run {CARD} stages.full.micro_batch_tokens=")


def test_eight_v100_are_predicted_and_one_is_told_not_to_do(run: Run) -> None:
    code, out, err = run(CARD, "--on", "v100-32", "--gpus", "8")
    assert (code, err) == (0, "")
    assert "(31.7 GiB): does not fit; shared out over 8 (ranks.shard=full) it does, predicted\n" in out
    assert "not even one row fits" in out
    assert "sharded       predicted, over 8: 2" in out
    assert out.count("  data parallel does not fit") == 1  # of two stages: the other fits one device
    assert "the faster way of each stage" in out
    assert "with ranks.shard=full, predicted: full 2" in " ".join(out.split())
    assert "CUDA 12.6 build" in out
    assert "Try " not in out


def test_bf16_where_a_gpu_has_none_does_not_run_as_it_is(run: Run) -> None:
    code, out, err = run(CARD, "--on", "v100-32", "stages.full.trains={kind: new-rows}", "stages.lora.precision=bf16")
    assert (code, err) == (0, "")
    assert out.startswith("llama2-7b-chinese on one NVIDIA V100 SXM2 32 GB (31.7 GiB): fits when changed\n")
    assert "lora (lora, bf16 asked, planned in fp16): does not run as it is (see below)" in out
    assert "fatal: lora asks for bf16: NVIDIA V100 SXM2 32 GB has no bf16 in hardware." in " ".join(out.split())
    assert out.splitlines()[-1] == f"Try     graftlm run {CARD} stages.lora.precision=fp16"


def test_the_guides_tell_what_plans_say(run: Run) -> None:
    """The table of the card's recipe for 7B and 13B: GiB on one H200, and of each of eight V100 fully sharded."""
    said = {}
    for size in ("7b", "13b"):
        recipe = ROOT / "recipes" / f"llama2-{size}-chinese.yaml"
        one, eight = (json.loads(run(recipe, "--on", *on, "--json")[1])["stages"] for on in (
            ("h200",), ("v100-32", "--gpus", "8")
        ))  # fmt: skip
        for number, stage in enumerate(("full", "LoRA")):
            said[size.upper(), stage] = one[number]["peak_gib"], eight[number]["sharded"]["peak_gib"]
    for guide in ("guide.md", "guide.zh.md"):
        text = (ROOT / "docs" / guide).read_text(encoding="utf-8").replace("，", ", ").replace("全参数", "full")
        for (size, stage), expected in said.items():
            line = next(line for line in text.splitlines() if line.startswith(f"| {size}, {stage}"))
            found = [float(number) for number in re.findall(r"([\d.]+) GiB", line)]
            assert (found[0], found[-1]) == pytest.approx(expected, abs=0.06), (guide, line)


BATCH = ("stages.full.batch_rows=1024", "stages.lora.batch_rows=1024")


def test_a_cluster_is_predicted_by_what_hours_go_to(run: Run) -> None:
    code, out, err = run(CARD, "--on", "h200", "--gpus", "8", "--nodes", "128", *BATCH, "--json")
    found = json.loads(out)["cluster"]
    assert (code, err, found["num_devices"], found["is_prediction"]) == (0, "", 1024, True)
    full = found["stages"][0]
    assert full["rows_per_rank"] == 1
    for hours in (full["data_parallel"], full["sharded"]):
        parts = sum(hours[name] for name in ("compute", "communication", "checkpoints", "failures"))
        assert hours["hours"] == pytest.approx(parts)
    # all 27 GB of gradients go twice through one machine's 50 GB/s in each of the 489 steps
    assert full["data_parallel"]["communication"] * 3600 == pytest.approx(489 * 2 * 27.2 / 50, rel=0.03)
    causes = [limit["cause"] for limit in found["limits"]]
    assert causes.count("few-rows-a-rank") == 2
    assert "communication" in causes
    assert len(found["assumptions"]) == 6


def test_a_faster_network_more_failures_and_a_given_interval_are_taken(run: Run) -> None:
    def full(*flags: str) -> dict[str, float]:
        code, out, _ = run(CARD, "--on", "h200", "--gpus", "8", "--nodes", "4", *flags, "--json")
        assert code == 0
        return json.loads(out)["cluster"]["stages"][0]["data_parallel"]

    plain = full()
    assert full("--network", "100")["communication"] == pytest.approx(plain["communication"] / 2)
    assert full("--failures", "1")["failures"] > plain["failures"]
    assert full("--failures", "0")["failures"] == 0
    often = full("--checkpoint-every", "50", "--checkpoint-seconds", "36")
    assert (often["checkpoint_every"], often["checkpoints"]) == (50, pytest.approx(3907 / 50 * 36 / 3600, rel=0.01))


def test_a_trillion_tokens_name_what_breaks(run: Run) -> None:
    """Data for weeks of a thousand devices: memory of every rank, the wire at the start, one core for the data step."""
    arguments = (CARD, "--on", "h100", "--gpus", "8", "--nodes", "128", "--tokens", "1e12", *BATCH)
    code, out, err = run(*arguments, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["stages"][0]["num_tokens"] == pytest.approx(1e12, rel=1e-6)
    limits = {limit["cause"]: limit["severity"] for limit in found["cluster"]["limits"]}
    assert limits["rows-in-every-process"] == "fatal"
    assert limits["data-step-on-one-core"] == limits["rows-over-the-wire"] == "warning"
    told = " ".join(run(*arguments)[1].split())
    assert "Predicted for 1,024 devices (128 machines of 8); nothing of it was run" in told
    assert "Every rank holds all token rows and the order of an epoch" in told


def test_eight_v100_take_a_7b_whose_layers_are_shared_out(run: Run) -> None:
    code, out, err = run(CARD, "--on", "v100-32", "--gpus", "8", "ranks.shard=full")
    assert (code, err) == (0, "")
    assert out.startswith("llama2-7b-chinese on each of 8 NVIDIA V100 SXM2 32 GB (31.7 GiB): fits as it is\n")
    assert "gathered layers" in out
    assert "holds one part in 8 of each layer" in " ".join(out.split())
    found = json.loads(run(CARD, "--on", "h200", "--gpus", "8", "--nodes", "2", "ranks.shard=hybrid", "--json")[1])
    assert (found["num_parts"], found["num_devices"], found["sharded"]) == (8, 16, None)


def test_what_deepspeed_cuts_is_planned_and_full_sharding_cuts_more(run: Run) -> None:
    """A 7B stage of full training over eight devices, by way of sharing."""
    found = {}
    for shard in ("none", "zero2", "zero3", "full"):
        code, out, err = run(CARD, "--on", "h200", "--gpus", "8", f"ranks.shard={shard}", "--json")
        assert (code, err) == (0, "")
        found[shard] = json.loads(out)
    full = {shard: plan["stages"][0] for shard, plan in found.items()}
    moments = {shard: stage["items"]["Adam's moments fp32"] for shard, stage in full.items()}
    assert moments["zero2"] == pytest.approx(moments["none"] / 8)
    assert full["full"]["peak_gib"] < full["zero2"]["peak_gib"] < full["zero3"]["peak_gib"] < full["none"]["peak_gib"]
    assert {shard: plan["share"] for shard, plan in found.items()} == {
        "none": "whole", "zero2": "zero2", "zero3": "zero3", "full": "layers",
    }  # fmt: skip
    ways = {shard: plan["cluster"]["stages"][0] for shard, plan in found.items()}
    assert [shard for shard, way in ways.items() if way["data_parallel"] is not None] == ["none"]
    sent = {shard: (way["data_parallel"] or way["sharded"])["communication"] for shard, way in ways.items()}
    # One micro-batch: a sum of gradients is a scatter and a gather; weights gathered twice make it half as much again.
    assert sent["zero2"] == pytest.approx(sent["none"])
    assert sent["zero3"] == pytest.approx(1.5 * sent["none"])
    told = [hazard["evidence"] for hazard in found["zero2"]["hazards"] if hazard["cause"] == "sharded"]
    assert told[0].startswith("DeepSpeed cuts gradients and moments over 8 ranks. Weights lie whole on each")


def test_rows_of_the_recipes_files_are_counted_and_a_cpu_is_one_device(run: Run) -> None:
    code, out, err = run(ROOT / "recipes" / "demo.yaml", "--on", "cpu", "--gpus", "2", "--json")
    found = json.loads(out)
    assert (code, err, found["sharded"], found["host_gib"]) == (0, "", None, None)
    assert any("characters of the first rows of" in line for line in found["assumptions"])
    assert "one-cpu" in [hazard["cause"] for hazard in found["hazards"]]
    assert [stage["num_steps"] > 0 for stage in found["stages"]] == [True] * len(found["stages"])


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (["--on", "h300"], "No device is called 'h300'.", "Did you mean h200? Known: h200, h100,"),
        (["--gpus", "0"], "Invalid value for '--gpus'", "graftlm plan --help"),
        (
            ["--on", "h200", "--gpus", "100", "--nodes", "2"],
            "200 devices would share 128 rows a step (stages.full.batch_rows).",
            "Plan for at most 128 devices, or with stages.full.batch_rows=200.",
        ),
        (["--on", "h200", "--network", "100"], "--network: that is for several GPUs", "--gpus"),
        (["--on", "h200", "--gpus", "8", "--network", "0"], "--network 0 is no such number.", "above 0"),
        (
            ["--on", "h200", "--gpus", "8", "--failures", "-1"],
            "--failures -1 is no such number.",
            "--failures may be 0",
        ),
        (["--on", "h200", "--tokens", "12"], "--tokens 12 is less than one row has.", "1e9"),
        (
            ["--on", "v100-32", "--gpus", "8", "ranks.shard=hybrid"],
            "ranks.shard=hybrid shards within machines and copies between them, and this is one machine.",
            "Set ranks.shard=full.",
        ),
        (["--on", "h200", "base.model=nobody/none"], "The shape of nobody/none is not known", "Check the name"),
    ],
)
def test_what_cannot_be_planned_is_told_in_two_lines(run: Run, arguments: list[str], first: str, second: str) -> None:
    code, out, err = run(CARD, *arguments)
    assert (code, out) == (2, "")
    assert first in err
    assert second in err
    assert len(err.strip().splitlines()) == 2


def test_halves_are_for_full_training_in_bf16_on_ranks_that_hold_all(run: Run) -> None:
    code, _out, err = run(CARD, "--on", "h200", "stages.full.split_master=true", "stages.full.precision=bf16")
    assert code == 0, err
    for asked, why in (
        (("stages.full.precision=fp16",), "needs precision bf16, and here that is fp16: take bf16"),
        (("stages.full.precision=bf16", "stages.full.fp8=true"), "fp8 is true too, which takes float32 weights"),
        (
            ("stages.full.precision=bf16", "ranks.shard=full"),
            "ranks that hold all, not for ranks.shard full: take none",
        ),
    ):
        code, _out, err = run(CARD, "--on", "h200", "stages.full.split_master=true", *asked)
        assert code == 2
        assert "split_master: " in err
        assert why in err
    code, _out, err = run(CARD, "--on", "h200", "stages.lora.split_master=true")
    assert code == 2
    assert "it is for full training, and this stage trains lora: take false" in err


def test_fp8_on_an_a100_is_a_told_problem_and_on_an_h200_none(run: Run) -> None:
    asked = ("stages.full.fp8=true", "stages.full.precision=bf16")
    code, out, err = run(CARD, "--on", "a100-80", *asked)
    assert (code, err) == (0, "")
    assert "fatal: full asks for FP8, which NVIDIA A100 80 GB (compute capability 8.0) does not compute" in out
    assert "fits as it is" not in out
    code, out, err = run(CARD, "--on", "h200", *asked)
    assert (code, err) == (0, "")
    assert "fatal" not in out
    assert "fp8's gain is not counted: not measured." in " ".join(out.split())
    code, out, err = run(CARD, "--on", "h200", "stages.full.fp8=true", "stages.full.precision=fp16")
    assert (code, out) == (2, "")
    assert "fp8: it needs precision bf16, and here that is fp16: take bf16, or fp8 false" in err
