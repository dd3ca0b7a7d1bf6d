"""The whole road on a tiny recipe: done once, redone only where something changed, and never lost."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from child import graftlm, in_child
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_recipe import write_tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm.cli.release import how_to_load
from graftlm.errors import UserError
from graftlm.pipeline import due_steps, export_run, preflight_recipe, run_recipe
from graftlm.recipe import Recipe
from graftlm.recipe_file import load_recipe
from graftlm.release.card import card_text
from graftlm.run import read_json, read_metrics

STEPS = [
    "0-scratch", "1-tokenizer", "2-base", "3-data", "4-full", "5-lora", "6-model", "7-heldout", "8-report",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with the recipe, its files and its finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_recipe(load_recipe(write_tiny_recipe(folder)), folder / "run")
    assert [(step.name, step.status) for step in result.steps] == [(name, "done") for name in STEPS]
    assert result.model == str(folder / "run" / "6-model")
    assert Path(result.report).is_file()
    assert result.questions is not None
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be changed."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def changed(finished: Path, *overrides: str) -> Recipe:
    return load_recipe(finished / "tiny.yaml", overrides)


def results(run: Path) -> dict[str, str]:
    """sha256 of all a run is for: weights, tokenizers, rows, answers, readings; and metrics but for times and saves."""
    found = {}
    for path in sorted(run.rglob("*")):
        place = str(path.relative_to(run))
        if path.suffix in (".safetensors", ".model", ".npy") or path.name in ("questions.json", "grow.json"):
            found[place] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name == "metrics.jsonl":
            course = [line for line in read_metrics(path) if line["event"] != "saved"]
            found[place] = json.dumps(
                [{key: value for key, value in line.items() if key != "seconds"} for line in course]
            )
    return found


def marks(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}


def test_the_run_folder_tells_what_was_done(finished: Path) -> None:
    """Facts of every stage, first loss by class of token, hashes of what was read, the model as plain as any."""
    run = finished / "run"
    assert sorted(path.name for path in run.iterdir()) == [".lock", *STEPS, "recipe.json"]
    for stage in ("0-scratch", "4-full", "5-lora"):
        facts = read_json(run / stage / "done.json")
        assert facts["tokens_per_second"] > 0
        assert facts["peak_memory_bytes"] > 0
        assert facts["num_steps"] == facts["num_updates"] > 0
        assert facts["num_saves"] > 1
        assert not (run / stage / "checkpoints").exists()
        assert "core" in facts["machine"]
    card = (run / "6-model" / "README.md").read_text(encoding="utf-8")
    assert card == card_text(run)
    assert "## 中文" in card
    assert (run / "6-model" / "curves.svg").is_file()
    first_loss = read_json(run / "2-base" / "grow.json")["first_loss"]
    assert {"uniform", "old_text", "new_text", "new_text_new_targets"} <= first_loss.keys()
    resolved = read_json(run / "recipe.json")
    assert set(resolved["inputs"]) >= {str(finished / name) for name in ("en.txt", "zh.jsonl", "old.jsonl")}
    assert resolved["versions"]["torch"] == torch.__version__
    model = AutoModelForCausalLM.from_pretrained(run / "6-model")
    tokenizer = AutoTokenizer.from_pretrained(run / "6-model")
    assert len(tokenizer) <= model.config.vocab_size


def test_the_second_run_changes_nothing(finished: Path, run: Path) -> None:
    before = marks(run)
    result = run_recipe(changed(finished), run)
    assert {step.status for step in result.steps} == {"unchanged"}
    assert marks(run) == before


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=2", "0-scratch"),
        ("base.scratch.training.epochs=2", "0-scratch"),
        ("tokenizer.num_pieces=10", "1-tokenizer"),
        ("grow.embedding=mean", "2-base"),
        ("data.max_tokens=200", "3-data"),
        ("stages.full.peak_lr=1e-4", "4-full"),
        ("stages.lora.trains.rank=3", "5-lora"),
        ("stages.lora.heldout_every=2", "5-lora"),
        ("export.dtype=bf16", "6-model"),
        ("report.num_samples=2", "7-heldout"),
        ("report.questions_shown=2", "8-report"),
        ("stages.full.micro_batch_tokens=256", None),
        ("stages.full.gradient_checkpointing=true", None),
        ("base.scratch.training.checkpoint_every=9", None),
        ("name=tiny", None),
    ],
)
def test_a_changed_knob_redoes_its_step_and_what_follows(finished: Path, override: str, first: str | None) -> None:
    expected = [] if first is None else STEPS[STEPS.index(first) :]
    assert due_steps(changed(finished, override), finished / "run") == expected


def test_a_change_of_the_report_redoes_only_the_report(finished: Path, run: Path, capsys) -> None:
    before = marks(run)
    result = run_recipe(changed(finished, "report.questions_shown=2"), run)
    assert [step.name for step in result.steps if step.status == "done"] == ["8-report"]
    assert "8-report ... again, changed: report.questions_shown" in capsys.readouterr().err
    touched = {path for path, time_ns in marks(run).items() if before.get(path) != time_ns}
    assert {Path(path).relative_to(run).parts[0] for path in touched} == {"8-report", "recipe.json"}


def test_files_count_by_what_they_hold_not_by_where_they_lie(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in finished.glob("*.*"):
        shutil.copy(file, moved)
    recipe = load_recipe(moved / "tiny.yaml")
    assert due_steps(recipe, finished / "run") == []
    with (moved / "heldout.jsonl").open("a") as stream:
        stream.write("\n")
    assert due_steps(recipe, finished / "run") == STEPS[3:]
    (moved / "en.txt").write_text("Other text.\n")
    assert due_steps(recipe, finished / "run") == STEPS


def test_missing_inputs_are_told_at_once_before_anything_is_made(finished: Path, tmp_path: Path) -> None:
    recipe = changed(finished, "data.sources.0.path=no/zh.json", "report.exact_questions=/no/q")
    with pytest.raises(UserError, match="2 paths that do not exist") as error:
        run_recipe(recipe, tmp_path / "run")
    assert "zh.json" in error.value.problem
    assert "/no/q" in error.value.problem
    assert not (tmp_path / "run").exists()


def test_rows_too_long_for_a_later_stage_are_told_before_the_first(finished: Path, run: Path, capsys) -> None:
    recipe = changed(finished, "stages.full.seed=3", "stages.lora.micro_batch_tokens=8")
    with pytest.raises(UserError, match=r"^stages.lora.micro_batch_tokens is 8, and the longest row has \d+ tokens"):
        run_recipe(recipe, run)
    assert "continuing" not in capsys.readouterr().out
    assert not (run / "4-full" / "metrics.jsonl").exists()


def test_files_of_no_use_are_told_at_once_before_the_first_step(finished: Path, tmp_path: Path) -> None:
    """A base may train for hours before the data step reads what is wrong; finished steps' files are not looked at."""
    (tmp_path / "gbk.jsonl").write_bytes('{"instruction": "你好", "output": "好"}\n'.encode("gb18030"))
    (tmp_path / "foreign.jsonl").write_text('{"frage": "a"}\n')
    wrong = (f"data.heldout.0.path={tmp_path / 'foreign.jsonl'}", f"base.scratch.text.0={tmp_path / 'gbk.jsonl'}")
    recipe = changed(finished, f"data.sources.0.path={tmp_path / 'gbk.jsonl'}", *wrong)
    with pytest.raises(UserError, match="2 of the inputs are of no use") as error:
        run_recipe(recipe, tmp_path / "run")
    assert "gbk.jsonl:1: not UTF-8" in error.value.problem
    assert "its format cannot be told from the fields frage" in error.value.problem
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "lost",
    [
        "1-tokenizer/tokenizer.model",
        "3-data/train/ids.npy",
        "4-full/trained/weights.safetensors",
        "6-model/config.json",
    ],
)
def test_a_file_gone_from_a_finished_step_is_two_lines(finished: Path, run: Path, lost: str) -> None:
    (run / lost).unlink()
    with pytest.raises(UserError, match="is missing: the finished step") as error:
        run_recipe(changed(finished), run)
    assert lost in error.value.problem
    assert f"delete {run / lost.split('/')[0]} " in error.value.fix


def test_deleted_steps_are_redone_to_the_same_bits(finished: Path, run: Path) -> None:
    """A later stage that is still there keeps its place: the model exported is that of the last stage."""
    for name in ("4-full", "6-model"):
        shutil.rmtree(run / name)
    result = run_recipe(changed(finished), run)
    assert [step.name for step in result.steps if step.status == "done"] == ["4-full", "6-model"]
    assert results(run) == results(finished / "run")


def test_a_stage_more_keeps_the_stages_before_it(finished: Path, run: Path, tmp_path: Path, capsys) -> None:
    """Numbers move on; what the recipe has no step for any more is kept out of the way."""
    tree = yaml.safe_load((finished / "tiny.yaml").read_text(encoding="utf-8"))
    tree["stages"].append({**tree["stages"][0], "name": "rows", "trains": {"kind": "new-rows"}})
    longer = finished / "longer.yaml"
    longer.write_text(yaml.safe_dump(tree), encoding="utf-8")
    result = run_recipe(load_recipe(longer), run)
    longer.unlink()
    done = [step.name for step in result.steps if step.status == "done"]
    assert done == ["6-rows", "7-model", "8-heldout", "9-report"]
    assert sorted(path.name for path in (run / "earlier").iterdir()) == ["6-model", "7-heldout", "8-report"]
    assert "6-model: no step of this recipe any more, moved to earlier/6-model" in capsys.readouterr().err
    earlier, now = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (run / "earlier" / "6-model", run / "7-model")
    )
    moved = {name for name in earlier if not torch.equal(earlier[name], now[name])}
    assert moved == {"model.embed_tokens.weight", "lm_head.weight"}


def test_killed_again_and_again_it_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """R1: kill -9 before one change on disk after another, in every step, then run again."""
    dice, num_kills = random.Random(3), 0
    run = tmp_path / "run"
    while in_child(graftlm, "run", finished / "tiny.yaml", "--out", run, kill_at=dice.randint(1, 110))[0] != 0:
        num_kills += 1
        assert num_kills < 40, "it makes no progress"
    assert num_kills >= 6
    assert results(run) == results(finished / "run")
    assert {str(path.relative_to(run)) for path in run.rglob("*")} == {
        str(path.relative_to(finished / "run")) for path in (finished / "run").rglob("*")
    }, "a kill left something behind"


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", sorted(random.Random(0).sample(range(1, 460), 40)))
def test_killed_once_anywhere_it_ends_the_same(finished: Path, tmp_path: Path, kill_at: int) -> None:
    """R1: each of 40 places, from a fresh start."""
    command = (graftlm, "run", finished / "tiny.yaml", "--out", tmp_path / "run")
    assert in_child(*command, kill_at=kill_at)[0] == -signal.SIGKILL
    assert in_child(*command)[0] == 0
    assert results(tmp_path / "run") == results(finished / "run")


@pytest.fixture
def half_way(finished: Path, tmp_path: Path) -> Path:
    """A run whose stage `full` was stopped in its middle."""
    run = tmp_path / "half"
    code, _ = in_child(stopped_after, 4, finished / "tiny.yaml", run)
    assert code == 130
    assert (run / "4-full" / "checkpoints" / "step-00000004").is_dir()
    return run


def stopped_after(step: int, recipe: Path, run: Path, signal_number: int = signal.SIGTERM) -> None:
    """Run the recipe in a process that gets a signal while stage `full` takes this step."""
    from graftlm.training.stage import StageRun

    record = StageRun._record

    def ask(self: StageRun, step_record) -> None:
        record(self, step_record)
        if self.stage.name == "full" and step_record.step == step:
            os.kill(os.getpid(), signal_number)

    StageRun._record = ask
    graftlm("run", recipe, "--out", run)


def test_asked_to_stop_it_saves_leaves_with_130_and_goes_on(finished: Path, tmp_path: Path) -> None:
    """R2: Ctrl-C in the middle of a stage, then the same command again."""
    run, log = tmp_path / "run", tmp_path / "log"
    assert in_child(stopped_after, 3, finished / "tiny.yaml", run, signal.SIGINT, log=log)[0] == 130
    assert log.read_text().splitlines()[-2:] == [
        "full: stopped after step 3 of 8, saved", "Run the same command again to continue.",
    ]  # fmt: skip
    assert in_child(graftlm, "run", finished / "tiny.yaml", "--out", run, log=log)[0] == 0
    assert "full: continuing after step 3 of 8" in log.read_text()
    assert results(run) == results(finished / "run")


def test_changed_in_the_middle_of_training_it_is_refused_before_anything_is_touched(
    finished: Path, half_way: Path
) -> None:
    """R7: every changed key is listed, of earlier steps too; put back, the run goes on."""
    before = marks(half_way)
    recipe = changed(finished, "data.max_tokens=200", "stages.full.peak_lr=1e-3", "stages.lora.epochs=3")
    for attempt in (run_recipe, due_steps):
        with pytest.raises(UserError, match=r"with other values of: data\.max_tokens, stages\.full\.peak_lr\."):
            attempt(recipe, half_way)
    without = load_recipe(finished / "tiny.yaml", ["stages.full.name=first"])
    with pytest.raises(UserError, match="the recipe has no 4-full now"):
        run_recipe(without, half_way)
    assert marks(half_way) == before
    later_only = changed(finished, "stages.lora.epochs=3", "stages.full.micro_batch_tokens=300")
    assert due_steps(later_only, half_way) == STEPS[4:]


@pytest.mark.parametrize("limit_kb", [1, 20, 40])
def test_a_full_disk_is_exit_4_and_loses_nothing(finished: Path, tmp_path: Path, limit_kb: int) -> None:
    """D1: no file may grow beyond the limit; with room again the run ends the same."""
    run, log = tmp_path / "run", tmp_path / "log"
    code, _ = in_child(in_little_room, limit_kb * 1024, finished / "tiny.yaml", run, log=log)
    assert code == 4, log.read_text()
    assert "bytes free" in log.read_text() or "are free" in log.read_text()
    assert "Traceback" not in log.read_text()
    if limit_kb == 40:
        assert in_child(graftlm, "run", finished / "tiny.yaml", "--out", run)[0] == 0
        assert results(run) == results(finished / "run")


def in_little_room(limit_bytes: int, recipe: Path, run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    graftlm("run", recipe, "--out", run)


def test_a_finished_run_is_exported_both_ways_and_an_unfinished_one_is_not(
    finished: Path, run: Path, half_way: Path, tmp_path: Path
) -> None:
    written = (("hf", ["config.json", "README.md"]), ("adapter", ["adapter", "base"]), ("gguf", ["tiny-f16.gguf"]))
    for to, names in written:
        manifest = export_run(run, to, tmp_path / to)
        assert all((tmp_path / to / name).is_file() for name in manifest.files)
        assert {path.name for path in (tmp_path / to).iterdir()} >= set(names)
        assert manifest.folder == str(tmp_path / to)
        line = how_to_load(to, manifest.folder, list(manifest.files))
        if to == "gguf":
            assert Path(line.removeprefix("llama-cli -m ").removesuffix(" --jinja -cnv --temp 0")).is_file()
        else:
            assert eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}).config
        with pytest.raises(UserError, match="already holds files"):
            export_run(run, to, tmp_path / to)
    with pytest.raises(UserError, match=r"Stage full of .* is not finished"):
        export_run(half_way, "hf", tmp_path / "no")
    with pytest.raises(UserError, match="holds no recipe"):
        export_run(tmp_path, "hf", None)


@pytest.fixture(scope="module")
def moved(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three exports of a finished run, moved together from where they were written."""
    place = tmp_path_factory.mktemp("exports")
    run = Path(shutil.copytree(finished / "run", place / "run"))
    for to in ("hf", "adapter", "gguf"):
        export_run(run, to, place / "written" / to)
    return (place / "written").rename(place / "moved")


@pytest.mark.parametrize(("form", "card"), [("hf", "hf"), ("adapter", "adapter/adapter")])
def test_a_card_s_code_runs_in_the_folder_it_lies_in(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str, card: str
) -> None:
    """Both halves of it, with no library but those named; of an adapter on its base, wherever the two were moved."""
    text = (moved / card / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(moved / card)
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        exec(code.replace("=256", "=2"), {})
    assert capsys.readouterr().out
    assert ("graftlm chat ." in text) is (form == "hf")
    assert ("library_name: peft" in text) is (form == "adapter")


def test_a_gguf_s_card_names_its_file(moved: Path) -> None:
    text = (moved / "gguf" / "README.md").read_text(encoding="utf-8")
    assert text.count("llama-cli -m tiny-f16.gguf --jinja") == 2
    assert "from_pretrained" not in text
    assert "graftlm chat" not in text


def test_an_adapter_names_its_base_by_where_it_lies_beside_it(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of whoever wrote it; PEFT's own loading of both by the adapter's name finds it there."""
    told = [(moved / "adapter/adapter" / name).read_text() for name in ("adapter_config.json", "base.json")]
    assert [json.loads(told[0])["base_model_name_or_path"], json.loads(told[1])["base"]] == ["../base"] * 2
    for file in moved.rglob("*.json"):
        assert str(moved.parent) not in file.read_text(encoding="utf-8"), file
    monkeypatch.chdir(moved / "adapter" / "adapter")
    assert AutoPeftModelForCausalLM.from_pretrained(".").config


def test_preflight_looks_at_every_stage_and_trains_none(finished: Path, tmp_path: Path) -> None:
    """Green on a recipe that trains, a finding on one that would not; what it made is kept by the run."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    trained = {path: path.stat().st_mtime_ns for path in run.glob("[45]-*/**/*") if path.is_file()}
    green = preflight_recipe(changed(finished), run)
    assert [f for f in green.findings if f["severity"] != "note"] == []
    assert set(green.stages) == {"full", "lora"}
    assert green.first_loss["new"] > green.first_loss["old"] > 0
    assert green.headroom_bits is not None
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    found = preflight_recipe(changed(finished, "stages.lora.trains.alpha=4000"), run).findings
    assert [(f["stage"], f["cause"], f["severity"]) for f in found] == [("lora", "adapter-push-high", "warning")]


def test_fp8_without_such_a_gpu_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Of every stage, that of a base from nothing too; nothing is made."""
    recipe = write_tiny_recipe(tmp_path)
    for place in ("base.scratch.training", "stages.lora"):
        asked = load_recipe(recipe, [f"{place}.fp8=true", f"{place}.precision=auto"])
        with pytest.raises(UserError, match=rf"^{place}.fp8 is true, which needs a GPU .* this is a CPU") as told:
            run_recipe(asked, tmp_path / "run")
        assert f"{place}.fp8=false" in told.value.fix
        assert not list((tmp_path / "run").glob("[0-9]-*"))
    for place in ("base.scratch.training", "stages.lora"):
        asked = [f"{place}.fp8=true", f"{place}.precision=bf16"]
        for shard in ("full", "hybrid", "zero2", "zero3"):
            with pytest.raises(UserError, match=rf"FP8 is built for ranks that hold all, not for ranks.shard {shard}"):
                load_recipe(recipe, [*asked, f"ranks.shard={shard}"])


def test_a_stage_that_is_done_asks_for_no_fp8_any_more(finished: Path, run: Path, monkeypatch) -> None:
    """Its run may be finished where there is no such GPU."""
    asked: list[str] = []
    monkeypatch.setattr("graftlm.feasible.refuse_fp8_where_it_cannot_be", lambda _, place, device: asked.append(place))
    recipe = load_recipe(finished / "tiny.yaml")
    run_recipe(recipe, run)
    assert asked == []
    (run / "5-lora" / "done.json").unlink()
    run_recipe(recipe, run)
    assert asked == ["stages.lora"]


def test_a_stage_in_fp8_is_another_stage(finished: Path, run: Path) -> None:
    assert due_steps(load_recipe(finished / "tiny.yaml", ["stages.lora.compile=true"]), run) == []
    asked = load_recipe(finished / "tiny.yaml", ["stages.lora.fp8=true", "stages.lora.precision=auto"])
    also_precision = load_recipe(finished / "tiny.yaml", ["stages.lora.precision=auto"])
    assert due_steps(asked, run) == due_steps(also_precision, run) == STEPS[5:]
    assert "fp8" in asked.stages[1].as_ordered()
    # A run of before there was the key is not begun anew for it.
    assert "fp8" not in also_precision.stages[1].as_ordered()
