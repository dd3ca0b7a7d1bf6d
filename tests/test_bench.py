"""The bench against other trainers: our arm trains and holds its gates, and figures, ratios and the table are right.

Records below are made up, with numbers chosen so that the right answer is known; no test asserts a measured time.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCH, BENCH / "peers"):
        monkeypatch.syspath_prepend(str(folder))


def made_up(arm: str, seconds: float, loss: float = 4.0, moved: float = 0.0, gib: float = 4.0) -> dict:
    """A run of two timed steps of 1,000 and 2,000 tokens after one of warm-up."""
    import judging

    record = {
        "arm": arm, "settings": {}, "versions": {}, "step_seconds": [99.0, seconds, 2 * seconds],
        "step_cpu_seconds": [99.0, seconds, 2 * seconds], "losses": [loss, 3.0, 2.0], "num_targets": 7,
        "others_moved": moved, "peak_memory_bytes": int(gib * 2**30), "start_memory_bytes": 2**30,
    }  # fmt: skip
    record["figures"] = judging.figures(record, [5, 1000, 2000], batch_rows=16, warm_up=1)
    return record


def test_ratios_hold_a_peer_against_our_runs_on_either_side_of_it() -> None:
    import judging

    runs = [("graftlm", 1.0), ("slow", 10.0), ("graftlm", 2.0), ("fast", 4.0), ("graftlm", 2.0)]
    found = judging.judge([made_up(arm, seconds) for arm, seconds in runs])

    # medians of a step: ours 1.5, 3, 3 seconds, theirs 15 and 6
    assert found["speed_ratios"] == found["cpu_ratios"] == pytest.approx({"slow": 15 / 2.25, "fast": 2.0})
    assert found["best_peer"] == "fast"
    assert found["arms"]["graftlm"]["row_tokens_per_second"] == 500
    assert found["arms"]["slow"]["peak_memory_gib"] == 4.0
    assert found["arms"]["slow"]["memory_above_start_gib"] == 3.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"loss": 4.03}, "first loss 4.0300, not 4.0000"),
        ({"loss": float("nan")}, "first loss nan"),
        ({"moved": 0.01}, "a changed row moves another row's loss by 0.01 nats"),
    ],
)
def test_an_arm_that_fails_a_gate_is_shown_and_never_the_best(wrong: dict, words: str) -> None:
    import judging

    cheat = made_up("cheat", 0.5, **wrong)
    found = judging.judge([made_up("graftlm", 1.0), cheat, made_up("graftlm", 1.0), made_up("fair", 3.0)])

    assert found["best_peer"] == "fair"
    line = next(line for line in judging.table({"full fp32": found}).splitlines() if "cheat" in line)
    assert f"NOT COUNTED: {words}" in line


def test_other_labels_fail_and_a_small_difference_of_the_first_loss_does_not() -> None:
    import judging

    ours = made_up("graftlm", 1.0)
    assert judging.gates(made_up("peer", 1.0, loss=4.019), ours) == []
    assert judging.gates({**made_up("peer", 1.0), "num_targets": 8}, ours) == ["8 labels in the first step, not 7"]


def test_headline_and_table_tell_what_was_not_measured_and_what_ended_in_an_error() -> None:
    import judging

    broken = {"arm": "broken", "settings": {}, "error": "ImportError: no such thing"}
    runs = [made_up("graftlm", 1.0, gib=2.0), made_up("trl default", 8.0), made_up("neat", 4.0), broken]
    groups = {"full fp32": judging.judge(runs)}
    told = judging.headline(groups)

    assert told["ratio_best_peer_full_fp32"] == 4.0
    assert told["ratio_trl_default"] == 8.0
    assert (told["memory_ratio"], told["memory_ratio_above_start"]) == (0.5, pytest.approx(1 / 3))
    assert told["ratio_best_peer_full_bf16"] is told["ratio_best_peer_lora_fp32"] is None
    assert "ImportError: no such thing" in judging.table(groups)


def test_all_arms_failing_leaves_ratios_untold() -> None:
    import judging

    broken = {"arm": "graftlm", "settings": {}, "error": "it fell over"}
    groups = {"full bf16": judging.judge([broken, made_up("trl default", 8.0)])}
    assert set(judging.headline(groups).values()) == {None}
    assert "it fell over" in judging.table(groups)


def test_ours_lies_between_any_two_others() -> None:
    import arms

    ours, *others = arms.ARMS
    assert [arm.name for arm in arms.in_turns([ours, *others[:2]])] == [
        "graftlm", others[0].name, "graftlm", others[1].name, "graftlm"
    ]  # fmt: skip
    assert set(arms.QUICK) <= {arm.name for arm in arms.ARMS}
    assert all((BENCH / "peers" / f"{arm.peer}_arm.py").is_file() for arm in others)


def test_our_arm_takes_the_rows_as_given_and_holds_its_gates(tmp_path: Path) -> None:
    import judging
    import measure
    import ours_arm

    from graftlm.model.causal import load_causal, new_causal, save_causal

    shape = {"num_rows": 96, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    save_causal(new_causal(**shape, seed=0), tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 5, 12, 7, 10, 6, 8, 11]
    ids = [[1, *torch.randint(3, 96, (length - 1,), generator=generator).tolist()] for length in lengths]
    rows = [{"ids": row, "is_target": [int(place > 2) for place in range(len(row))]} for row in ids]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    job = {
        "arm": "graftlm", "model": str(tmp_path / "model"), "rows": str(tmp_path / "rows.json"), "trains": "full",
        "precision": "fp32", "batch_rows": 4, "num_steps": 2, "settings": {}, "targets": [],
        "first_new_id": 64, "peak_lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "check": True,
    }  # fmt: skip
    result = measure.Result(job)
    ours_arm.train(job, result)
    record = result.record()

    given = measure.read_rows(job["rows"])[:4]
    model = load_causal(job["model"])
    nats = sum(
        torch.nn.functional.cross_entropy(
            model(torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"][1:]), reduction="sum"
        ).item()
        for row in given
    )
    num_targets = sum(sum(label >= 0 for label in row["labels"][1:]) for row in given)
    plain = {"losses": [nats / num_targets], "num_targets": num_targets}
    assert judging.gates(record, plain) == []
    assert record["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5)
    assert record["others_moved"] <= 1e-6
    assert len(record["step_seconds"]) == len(record["losses"]) == 2
    assert record["peak_memory_bytes"] >= record["start_memory_bytes"] > 0


def test_the_peers_gate_sees_a_row_that_leaks_into_another() -> None:
    import measure

    from graftlm.model.causal import new_causal

    model = new_causal(num_rows=32, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, seed=0)
    ids = torch.tensor([[1, 7, 8, 9, 1, 10, 11, 12]])
    labels = torch.tensor([[-100, -100, 8, 9, -100, -100, 11, 12]])
    joined = {"input_ids": ids, "labels": labels}  # one causal row: the second sees the first
    apart = {key: value.view(2, 4) for key, value in joined.items()}
    assert measure.num_targets([joined]) == measure.num_targets([apart]) == 4
    assert measure.others_moved(model, apart, first_id=1) <= 1e-6
    assert measure.others_moved(model, joined, first_id=1) > 1e-4
    assert "measure" in sys.modules


def test_without_the_real_rows_steps_are_made_of_the_dialogues_shipped(tmp_path: Path) -> None:
    import arms
    import workload

    tokenizer, source, _ = workload._text(tmp_path, None)
    steps = workload.chosen_steps(workload._rendered(source, tokenizer, 500), 2)
    assert [len(step) for step in steps] == [arms.BATCH_ROWS] * 2


def test_the_7b_protocol_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h200

    out = tmp_path / "toy.json"
    words = ["h200.py", "--size", "toy", "--device", "cpu", "--trains", "full", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    h200.main()
    report = json.loads(out.read_text())
    (told,) = (run["told"] for run in report["runs"]["full"])
    assert report["not_begun"] == []
    assert told["tflops_executed"] == pytest.approx(
        told["row_tokens_per_second"] * told["executed_gflop_a_row_token"] / 1e3
    )
