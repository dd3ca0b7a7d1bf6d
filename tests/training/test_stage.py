"""A stage: what learns and what does not, interrupted anywhere and continued to the same bits."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import FIRST_NEW_ID, course_of, make_stage, tiny_model, weights_sha256

from graftlm.errors import DiskError, Interrupted, NumericalStop, UserError
from graftlm.model.causal import load_causal, save_causal
from graftlm.model.pointwise import compiled
from graftlm.recipe import Lora
from graftlm.run import read_metrics
from graftlm.training import best as best_module
from graftlm.training import checkpoint as checkpoint_module
from graftlm.training import stage as stage_module
from graftlm.training.batches import LIKE_TOKENS, Sparing
from graftlm.training.checkpoint import load_checkpoint
from graftlm.training.stage import StageRun
from graftlm.training.trainable import prepare_model, restore_model, trainable_parameters
from graftlm.training.trained import apply_stage

FULL = {"kind": "full"}
NEW_ROWS = {"kind": "new-rows"}
LORA = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.2}
# The first steps overflow and are skipped; growth every 2 good steps makes later ones overflow too.
LOUD = {"initial": 2.0**26, "growth_interval": 2, "hysteresis": 1, "floor": 1e-4}


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def finish(run):
    run.run()
    return run.finished_model()


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "trains",
    [
        FULL,
        {**LORA, "rows": "all"},
        {**LORA, "rows": "new", "rslora": True},
        {**LORA, "rows": "none"},
        {**LORA, "rows": "new", "dora": True},
        NEW_ROWS,
    ],
    ids=lambda t: "-".join(str(v) for v in t.values()),
)
def test_what_learns_learns_and_the_rest_stays_bit_for_bit(stage_run, tmp_path, trains, tied):
    """Weight decay and Adam's momentum included; the result is a plain fp32 model that plain transformers load."""
    stage = make_stage(trains, weight_decay=0.3)
    before = {name: t.clone() for name, t in tiny_model(tied).state_dict().items()}
    after = finish(stage_run(stage, tied=tied))
    state = after.state_dict()
    assert state.keys() == before.keys()
    assert {t.dtype for t in state.values()} == {torch.float32}
    rows = trains.get("rows", "new" if trains == NEW_ROWS else "all")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = torch.equal(state[name][:FIRST_NEW_ID], before[name][:FIRST_NEW_ID])
        new = torch.equal(state[name][FIRST_NEW_ID:], before[name][FIRST_NEW_ID:])
        assert (old, new) == (rows != "all", rows == "none"), name
    norm, projection = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(state[norm], before[norm]) is (trains != FULL)
    assert torch.equal(state[projection], before[projection]) is (trains == NEW_ROWS)
    ids = torch.tensor([[1, 5, 45, 41, 2]])
    save_causal(after, tmp_path / "saved")
    assert "graftlm" not in (tmp_path / "saved" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(load_causal(tmp_path / "saved")(ids).logits, after(ids).logits)
    again = apply_stage(tiny_model(tied), stage, tmp_path / "stage", FIRST_NEW_ID)
    assert weights_sha256(again) == weights_sha256(after)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extra", [{}, {"rslora": True}, {"dora": True}, {"rows": "new"}])
def test_merged_equals_adapter(tied, extra):
    """N4: logits within 1e-5 of those of the adapter."""
    trains = Lora(kind="lora", rank=3, alpha=6, **extra)
    model = prepare_model(tiny_model(tied), trains, FIRST_NEW_ID, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.tensor([[1, 5, 45, 41, 2]])
    with torch.no_grad():
        adapter = model.eval()(ids).logits
        merged = restore_model(model, trains, FIRST_NEW_ID)(ids).logits
    assert torch.allclose(adapter, merged, atol=1e-5, rtol=0)


CASES = [
    pytest.param(trains, precision, id=f"{trains['kind']}-{precision}")
    for trains in (FULL, LORA, NEW_ROWS)
    for precision in ("fp32", "bf16", "fp16")
] + [pytest.param(FULL, "bf16 in halves", id="full-bf16-halves")]


@pytest.mark.parametrize(("trains", "precision"), CASES)
def test_interrupted_anywhere_is_the_same_run(stage_run, tmp_path, monkeypatch, trains, precision):
    """R1, R3: killed after each step and at each write of a checkpoint, weights and metrics end the same."""
    precision, _, halves = precision.partition(" ")
    stage = make_stage(
        trains, precision=precision, split_master=bool(halves), loss_scale=LOUD, epochs=4, checkpoint_every=3,
        heldout_every=2,
    )  # fmt: skip
    whole = stage_run(stage, "whole")
    expected = weights_sha256(finish(whole))
    lines = course_of(tmp_path / "whole")
    if precision == "fp16":
        skipped = [line["skipped"] for line in lines if line["event"] == "step"]
        assert any(skipped)
        assert not all(skipped)
    kills = iter([("step", 1), ("step", 4), ("write", 1), ("rename", 2), ("step", 5), ("write", 3), ("kept", 1)])
    real = {
        "step": StageRun._record,
        "write": checkpoint_module._facts,
        "rename": Path.rename,
        "kept": StageRun._keep_result,
    }

    def killing(kind, number):
        left = [number]

        def call(*args, **keys):
            result = None if kind == "rename" else real[kind](*args, **keys)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real[kind](*args, **keys) if kind == "rename" else result

        return call

    places = {
        "step": (StageRun, "_record"),
        "write": (checkpoint_module, "_facts"),
        "rename": (Path, "rename"),
        "kept": (StageRun, "_keep_result"),
    }
    for kind, number in kills:
        with monkeypatch.context() as patch:
            run = stage_run(stage, "cut")
            patch.setattr(*places[kind], killing(kind, number))
            with pytest.raises(Killed):
                run.run()
    assert weights_sha256(finish(stage_run(stage, "cut"))) == expected
    assert course_of(tmp_path / "cut") == lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [3, 6])
def test_asked_to_stop_it_saves_first(stage_run, monkeypatch, number, at):
    """R2: the step is finished and saved, in the last step too, and the run goes on from it."""
    stage = make_stage(LORA)
    expected = weights_sha256(finish(stage_run(stage, "whole")))
    run = stage_run(stage)
    record = run._record

    def ask(step_record):
        record(step_record)
        if step_record.step == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run, "_record", ask)
    with pytest.raises(Interrupted):
        run.run()
    assert (run.checkpoints / f"step-{at:08d}").is_dir()
    assert weights_sha256(finish(stage_run(stage))) == expected


def test_stages_in_memory_equal_stages_from_disk(stage_run, tmp_path):
    """Any boundary: the chain of `apply_stage` gives the bits that went on in memory."""
    stages = [make_stage(t, seed=i) for i, t in enumerate([FULL, {**LORA, "dora": True}, NEW_ROWS, LORA, FULL])]
    for tied in (False, True):
        model = again = tiny_model(tied)
        again = tiny_model(tied)
        for number, stage in enumerate(stages):
            folder = f"{tied}-{number}"
            model = finish(stage_run(stage, folder, model))
            again = apply_stage(again, stage, tmp_path / folder, FIRST_NEW_ID)
            assert weights_sha256(again) == weights_sha256(model)


def test_fp16_skips_are_counted_and_do_not_move_the_schedule(stage_run, tmp_path):
    """N3, N5: masters are fp32; the scale follows its table; the rate follows updates, not steps."""
    stage = make_stage(FULL, precision="fp16", loss_scale=LOUD, epochs=8, schedule="linear")
    run = stage_run(stage)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    run.run()
    lines = [line for line in read_metrics(tmp_path / "stage" / "metrics.jsonl") if line["event"] == "step"]
    scale, good, updates = LOUD["initial"], 0, 0
    rate = stage_module.learning_rate_shape(stage, run.steps.num_steps)
    for line in lines:
        assert line["loss_scale"] == scale
        assert line["lr"] == pytest.approx(stage.peak_lr * rate(updates))
        if line["skipped"]:
            scale, good = scale / 2, 0
        else:
            good, updates = good + 1, updates + 1
            scale *= 2 if good % LOUD["growth_interval"] == 0 else 1
        assert line["num_updates"] == updates
    assert 0 < updates < len(lines)


@pytest.mark.parametrize("floor", [1e-4, 2.0**119])
def test_when_every_step_is_skipped_it_stops(stage_run, floor):
    """N2: exit 3 and two lines, at the floor or at the end; never a run of silent skips. Pre-flight is off."""
    scale = {"initial": 2.0**120, "growth_interval": 2000, "hysteresis": 1, "floor": floor}
    run = stage_run(make_stage(FULL, precision="fp16", loss_scale=scale, recovery="off"))
    before = weights_sha256(run.model)
    with pytest.raises(NumericalStop, match=r"overflow at loss scale|nothing was learned") as error:
        run.run()
    assert error.value.exit_code == 3
    assert "bf16" in error.value.fix
    assert weights_sha256(run.model) == before


@pytest.mark.parametrize("trains", [FULL, LORA])
def test_gradient_checkpointing_changes_no_gradient(stage_run, trains):
    """Dropout too: what is computed again drops the same."""
    stage = make_stage(trains)
    plain = finish(stage_run(stage, "plain")).state_dict()
    saving = finish(stage_run(stage.model_copy(update={"gradient_checkpointing": True}), "saving"))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    assert all(torch.allclose(plain[name], t, rtol=1e-4, atol=1e-6) for name, t in saving.state_dict().items())


def test_compiled_functions_train_alike(stage_run, capsys):
    """Norms, gates and rotations compiled into one kernel each, where torch can compile."""
    try:
        compiled("cpu")
    except UserError as error:
        pytest.skip(str(error))
    plain = finish(stage_run(make_stage(FULL), "plain")).state_dict()
    assert "compiled" not in capsys.readouterr().err
    compiling = finish(stage_run(make_stage(FULL, compile=True), "compiling")).state_dict()
    assert "norms, gates and rotations compiled" in capsys.readouterr().err
    assert any(not torch.equal(plain[name], t) for name, t in compiling.items())  # they did run
    assert all(torch.allclose(plain[name], t, rtol=1e-4, atol=1e-6) for name, t in compiling.items())


def with_readings(monkeypatch, readings):
    """Let held-out readings be these, one after another."""
    left = iter(readings)
    real = best_module.heldout_losses

    def read(*args, **keys):
        losses = real(*args, **keys)
        losses.nats[:] = next(left)
        return losses

    monkeypatch.setattr(best_module, "heldout_losses", read)


def test_the_best_weights_are_kept_and_training_stops_early(stage_run, tmp_path, monkeypatch):
    with_readings(monkeypatch, [9, 5, 4, 6, 7, 8, 9])
    run = stage_run(make_stage(FULL, epochs=4, heldout_every=1, keep="best", early_stop_after=3))
    run.run()
    assert run.step == 5
    trained = json.loads((tmp_path / "stage" / "trained" / "values.json").read_text())
    assert trained["step"] == 2
    kept = load_file(tmp_path / "stage" / "trained" / "weights.safetensors")
    last = trainable_parameters(run.model)
    assert not all(torch.equal(kept[name], parameter) for name, parameter in last.items())
    assert [p.name for p in (tmp_path / "stage" / "best").iterdir()] == ["step-00000002"]


def test_an_early_stop_replayed_stops_at_the_same_step(stage_run, tmp_path, monkeypatch):
    stage = make_stage(FULL, epochs=4, heldout_every=1, keep="best", early_stop_after=2, checkpoint_every=2)
    with_readings(monkeypatch, [9, 5, 6, 7])
    run = stage_run(stage)
    monkeypatch.setattr(run, "_keep_result", lambda: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run.run()
    monkeypatch.undo()
    with_readings(monkeypatch, [7])
    again = stage_run(stage)
    again.run()
    assert again.step == 3
    assert steps_of(tmp_path / "stage") == [1, 2, 3]
    assert json.loads((tmp_path / "stage" / "trained" / "values.json").read_text())["step"] == 1


def test_nothing_better_than_the_start_is_said(stage_run, monkeypatch, capsys):
    with_readings(monkeypatch, [1, 2, 3, 4])
    stage_run(make_stage(FULL, keep="best")).run()
    assert "no held-out reading was better" in capsys.readouterr().err


def test_a_full_disk_keeps_the_earlier_checkpoint(stage_run, tmp_path, monkeypatch):
    """D1: exit 4, free bytes told, and the run goes on from it to the same weights."""
    stage = make_stage(LORA)
    expected = weights_sha256(finish(stage_run(stage, "whole")))
    run = stage_run(stage)
    real = checkpoint_module.save_file

    def no_space(tensors, path):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", no_space)
        with pytest.raises(DiskError, match="bytes free") as error:
            run.run()
    assert error.value.exit_code == 4
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000000", "step-00000002"]
    assert weights_sha256(finish(stage_run(stage))) == expected


def test_weights_of_another_shape_are_refused(stage_run, tmp_path):
    stage = make_stage(NEW_ROWS)
    stage_run(stage).run()
    with pytest.raises(UserError, match="shape"):
        apply_stage(tiny_model(), stage, tmp_path / "stage", FIRST_NEW_ID - 1)
    with pytest.raises(UserError, match="on one side only"):
        apply_stage(tiny_model(), make_stage(FULL), tmp_path / "stage", FIRST_NEW_ID)


def test_a_stage_tells_what_it_took(stage_run, tmp_path):
    """Tokens and seconds of every process that took part; memory of this stage, not of what went before."""
    run = stage_run(make_stage(FULL, keep="best", precision="bf16"))
    run.run()
    facts = run.facts()
    lines = [line for line in read_metrics(tmp_path / "stage" / "metrics.jsonl") if line["event"] == "step"]
    assert facts["num_steps"] == facts["num_updates"] == len(lines) == 6
    assert facts["num_tokens"] == sum(line["num_tokens"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    assert facts["tokens_per_second"] == pytest.approx(facts["num_tokens"] / seconds, rel=0.1)
    assert facts["peak_memory_bytes"] > 50 * 2**20
    assert facts["num_learning_parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert (facts["precision"], facts["device"]) == ("bf16", "cpu")
    kept = json.loads((tmp_path / "stage" / "trained" / "values.json").read_text())
    assert facts["kept_step"] == kept["step"] in (0, 2, 4, 6)


def test_out_of_memory_is_told_and_less_memory_goes_on(stage_run, monkeypatch):
    """Two lines; micro_batch_tokens and gradient_checkpointing may change in the middle of a stage."""
    stage = make_stage(FULL)
    whole = finish(stage_run(stage, "whole")).state_dict()
    run = stage_run(stage)
    record = run._record

    def out_of_memory(step_record):
        record(step_record)
        if step_record.step == 3:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(run, "_record", out_of_memory)
    with pytest.raises(UserError, match=r"out of memory after step 3: tried to allocate 20 GiB\n") as error:
        run.run()
    assert "micro_batch_tokens (now 24)" in error.value.fix
    smaller = stage.model_copy(update={"micro_batch_tokens": 12, "gradient_checkpointing": True})
    found = finish(stage_run(smaller)).state_dict()
    assert all(torch.allclose(whole[name], tensor, rtol=1e-3, atol=1e-5) for name, tensor in found.items())


HALVES = make_stage(FULL, precision="bf16", split_master=True, epochs=4)
WHOLE = HALVES.model_copy(update={"split_master": False})
# A weight between two bfloat16s, about one in 65,536, is rounded the other way: of the losses of 12 steps, their rms of
# updates and their norms.
BY_HALVES = {"loss": 1e-3, "grad_norm": 1e-2, "update_rms": 1e-2}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_halves_train_as_whole_ones(stage_run, tmp_path, capsys, tied):
    """Losses, norms and the flight recorder step by step; the result is float32 again, and holds its lower halves."""
    whole, held = stage_run(WHOLE, "whole", tied=tied), stage_run(HALVES, "halves", tied=tied)
    assert len(held.prepared.halves.low_of) == 2 * 7 + (0 if tied else 2)
    models = finish(whole), finish(held)
    assert "learning weights in halves" in capsys.readouterr().err
    lines = [[line for line in course_of(tmp_path / name) if line["event"] == "step"] for name in ("whole", "halves")]
    assert len(lines[0]) == 12
    for expected, found in zip(*lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=BY_HALVES[key]), key
        assert found["update_rms"] == pytest.approx(expected["update_rms"], rel=BY_HALVES["update_rms"])
        assert found["update_rms"]["body"] > 0
    kept = [load_file(tmp_path / name / "trained" / "weights.safetensors") for name in ("whole", "halves")]
    assert kept[0].keys() == kept[1].keys()  # what the model is merged of, tensor by tensor
    assert {tensor.dtype for tensor in kept[1].values()} == {torch.float32}
    states = [model.state_dict() for model in models]
    assert {tensor.dtype for tensor in states[1].values()} == {torch.float32}
    lowers = torch.cat([t.reshape(-1).view(torch.int32) & 0xFFFF for t in states[1].values()])
    assert (lowers != 0).double().mean() > 0.9
    for name, tensor in states[0].items():
        assert (states[1][name] - tensor).square().mean().sqrt() <= 1e-2 * tensor.square().mean().sqrt(), name


@pytest.mark.parametrize(("first", "then"), [(HALVES, WHOLE), (WHOLE, HALVES)], ids=["joined", "split"])
def test_a_stage_may_go_on_with_its_weights_held_otherwise(stage_run, monkeypatch, first, then):
    """Not a bit is lost where it goes over."""
    run = stage_run(first)
    record = run._record

    def ask(step_record):
        record(step_record)
        if step_record.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "_record", ask)
    with pytest.raises(Interrupted):
        run.run()
    left = weights_sha256(run.prepared.finished(load_checkpoint(run.checkpoints / "step-00000005").tensors["weights"]))
    went_on = stage_run(then)
    assert went_on.resume()
    assert bool(went_on.prepared.halves.low_of) is then.split_master
    moments = went_on.engine.moments()
    for key, saved in load_checkpoint(went_on.checkpoints / "step-00000005").tensors["optimizer"].items():
        assert torch.equal(moments[key], saved), key
    went_on.prepared.halves.restore()
    went_on.prepared.lean.restore()
    assert weights_sha256(went_on.prepared._plain(went_on.model)) == left
    finish(stage_run(then))


def test_nothing_is_split_for_other_products_and_that_is_told(stage_run, monkeypatch, capsys):
    """Precision `auto` on a machine without fast bf16; a stage begun in bf16 there goes on as it was begun."""
    monkeypatch.setattr("graftlm.training.precision.fastest_precision", lambda device: "fp32")
    auto = HALVES.model_copy(update={"precision": "auto"})
    run = stage_run(auto, "fp32")
    assert not run.prepared.halves.low_of
    finish(run)
    assert "learning weights whole: only those of products in bf16 are split" in capsys.readouterr().err
    begun = stage_run(HALVES, "begun")
    begun._save()
    begun.saver.wait()
    went_on = stage_run(auto, "begun")
    assert not went_on.prepared.halves.low_of
    assert went_on.resume()
    assert went_on.precision.name == "bf16"
    assert went_on.prepared.halves.low_of
    finish(went_on)


@pytest.mark.parametrize(("dropout", "of_attention"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1)])
def test_what_dropout_allows_to_leave_out_and_what_is_told(stage_run, capsys, dropout, of_attention):
    """Adapters' own: no common beginning. That of attention: nothing."""
    model = tiny_model()
    model.config.attention_dropout = of_attention
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = of_attention
    run = stage_run(make_stage({**LORA, "dropout": dropout}), model=model)
    assert run.steps.sparing == Sparing(prefix=not (dropout or of_attention), last_layer=not of_attention)
    told = capsys.readouterr().err
    assert ("with dropout 0.2 each row computes the common beginning for itself" in told) is bool(dropout)
    assert ("with dropout 0.1 common beginnings and the last layer are computed in full" in told) is bool(of_attention)


def test_in_16_bits_on_a_cpu_products_are_of_few_shapes(stage_run):
    """The last layer is computed whole, and micro-batches are filled up (`wants_few_shapes`)."""
    assert stage_run(make_stage(FULL, precision="fp32"), "wide").steps.sparing == Sparing()
    narrow = stage_run(make_stage(FULL, precision="bf16"), "narrow").steps
    assert narrow.sparing == Sparing(last_layer=False, like_tokens=LIKE_TOKENS)
    for batch in narrow.micro_batches(0, torch.device("cpu")):
        assert batch.ids_1T.shape[1] in (narrow.micro_batch_tokens, batch.num_tokens + -batch.num_tokens % LIKE_TOKENS)
