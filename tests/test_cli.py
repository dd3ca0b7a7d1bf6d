"""The command line: every verb's help, one JSON object and nothing else, and an exit code for every ending."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm import __version__, recipe_file
from graftlm.cli.app import app, main
from graftlm.cli.show import show
from graftlm.errors import DiskError, Interrupted, NumericalStop, UserError
from graftlm.model.causal import new_causal, save_causal
from graftlm.model.weights import read_model_config
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import train_base_tokenizer

TEXTS = [
    "Below is an instruction. ### Response: one two three",
    "hello there, how are you today?",
    "你好，今天天气很好。",
]
VERBS = [
    ["run"], ["tokenizer", "graft"], ["tokenizer", "check"], ["tokenizer", "report"], ["expand"], ["data"], ["export"],
    ["card"], ["chat"], ["generate"], ["eval"], ["doctor"], ["autopsy"], ["preflight"], ["serve"], ["compare"],
    ["sweep"], ["plan"],
]  # fmt: skip
EXPAND_KEYS = {"num_rows_old", "num_rows_new", "max_old_logit_difference", "row_rms"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graftlm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that talks nonsense, in a folder with its tokenizer and the card's template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = train_base_tokenizer(TEXTS, 340)
    model = new_causal(
        num_rows=tokenizer.num_pieces, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24,
        max_positions=512,
    )  # fmt: skip
    save_causal(model, folder, also=lambda scratch: tokenizer.save(scratch, chat_template=CARD.jinja))
    return folder


def dialogues(path: Path, num_rows: int = 3) -> Path:
    rows = [{"instruction": f"how are you {n}?", "output": f"hello there {n}"} for n in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_help_of_every_verb_shows_an_example_and_loads_nothing_heavy() -> None:
    """In a process of its own, so that what is loaded can be told."""
    code = (
        "import sys\n"
        "from graftlm.cli.app import app\n"
        f"for verb in {VERBS!r}:\n"
        "    try:\n"
        "        app([*verb, '--help'], standalone_mode=False)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print('loaded', [name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for verb in VERBS:
        assert f"Example: graftlm {' '.join(verb)}" in told, verb
    assert told.endswith("loaded []\n")


def test_every_verb_is_known_here() -> None:
    groups = {group.name: [c.name for c in group.typer_instance.registered_commands] for group in app.registered_groups}
    names = [[command.name] for command in app.registered_commands]
    names += [[group, name] for group, commands in groups.items() for name in commands]
    assert sorted(names) == sorted(VERBS)


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (["chatt"], "No such command 'chatt'. Did you mean 'chat'?", "graftlm --help"),
        (["nothing"], "No such command 'nothing'.", "Known: run, "),
        (["tokenizer", "grft"], "Did you mean 'graft'?", "graftlm tokenizer --help"),
        (["chat", "m", "--onc", "hi"], "There is no flag --onc.", "Did you mean --once?"),
        (["chat", "m", "--max-tokens", "x"], "--max-tokens", "graftlm chat --help"),
        (
            ["tokenizer", "graft", "--mode", "foo", "--base", "b", "--out", "o"],
            "'foo' is not one of 'continued', 'merge', 'card'.",
            "graftlm tokenizer graft --help",
        ),
        (["run"], "Missing argument", "graftlm run --help"),
        (["eval", "m"], "--data", "graftlm eval --help"),
        (["compare", "m", "--data", "d", "--out", "p"], "must be a file that ends in .html", "--out NAME.html"),
        (["compare", "m", "m", "--data", "d"], "m is named twice", "once"),
        (["compare", "m", "--data", "d"], "1 model is no comparison", "graftlm eval"),
        (["compare", "m", "n", "--data", "d", "--judge", "x"], "--judge is no address", "GRAFTLM_JUDGE_KEY"),
        (["eval", "m", "--data", "missing.jsonl"], "missing.jsonl cannot be read", "existing file"),
        (["sweep", "no.yaml"], "no.yaml", "recipes/"),
        (["chat", "m", "n"], "extra argument", "graftlm chat --help"),
        (["run", "no.yaml"], "There is no recipe no.yaml.", "recipes/"),
        (["chat", "m", "--json"], "--json belongs to --once", "Add --once"),
        (["chat", "m", "--once", "hi", "--top-p", "3"], "top_p is 3", "top_p"),
        (["chat", "no/where/at/all", "--once", "hi"], "no model folder no/where/at/all", "path"),
        (["export", "nowhere", "--to", "gguf"], "nowhere is no run folder", "model folder"),
        (["export", "nowhere", "--to", "hf"], "nowhere is no run folder", "--out"),
    ],
)
def test_a_mistake_is_told_in_two_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], first: str, second: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 2)
    assert first in lines[0]
    assert second in lines[1]


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("This is wrong.", "Do that."), 2, "This is wrong.\nDo that.\n"),
        (NumericalStop("Not finite.", "Lower it."), 3, "Not finite.\nLower it.\n"),
        (DiskError("Full.", "Free it."), 4, "Full.\nFree it.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied"),
        (MemoryError(), 2, "Not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "Not enough memory"),
        (Interrupted("full: stopped after step 3"), 130, "Run the same command again to continue."),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a fault"), 1, "ValueError: a fault\nThis is a fault of graftlm, not yours: ValueError."),
    ],
)
def test_every_ending_has_its_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(recipe_file, "load_recipe", fail)
    found, out, err = run("run", "some.yaml")
    assert (found, out) == (code, "")
    assert told in err
    assert ("Traceback" in err) == (code == 1)


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"graftlm {__version__}\n", "")


def test_what_bitsandbytes_lacks_is_not_told_to_those_who_did_not_ask(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so wherever peft imports it; what else it warns of is heard."""
    run("--version")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_a_reader_that_leaves_early_is_no_fault() -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "graftlm", "run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    assert started.stderr.read() == b""
    assert started.wait() == 0
    started.stderr.close()


def test_chat_once_prints_an_answer_or_one_object(run: Run, base: Path) -> None:
    flags = ("chat", base, "--once", "hello", "--max-tokens", "5", "--system", "Be kind.")
    code, out, _ = run(*flags, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer.keys() >= {"answer", "prompt_tokens", "answer_tokens"}
    assert answer["answer_tokens"] <= 5
    assert run(*flags)[1] == answer["answer"] + "\n"
    assert json.loads(run(*flags[:-2], "--json")[1])["prompt_tokens"] < answer["prompt_tokens"]


def test_sampling_flags_reach_the_draw(run: Run, base: Path) -> None:
    flags = ("chat", base, "--once", "hello", "--max-tokens", "12", "--temperature", "2")
    answers = {run(*flags, "--seed", str(seed))[1] for seed in (1, 2, 3)}
    assert len(answers) == 3
    for cut in (("--top-k", "1"), ("--top-p", "0")):
        assert len({run(*flags, "--seed", str(seed), *cut)[1] for seed in (1, 2)}) == 1
    assert run("chat", base, "--once", "hello", "--temperature", "2.5")[0] == 2


def test_generate_and_eval_print_one_object(run: Run, base: Path, tmp_path: Path) -> None:
    rows = dialogues(tmp_path / "rows.jsonl")
    code, out, _ = run(
        "generate", base, "--input", rows, "--output", tmp_path / "said.jsonl", "--max-tokens", "3", "--json"
    )
    assert code == 0
    assert json.loads(out).keys() >= {"rows", "seconds", "tokens"}
    code, out, _ = run("eval", base, "--data", rows, "--json")
    assert code == 0
    figures = json.loads(out)[str(rows)]
    assert figures.keys() >= {"bits_per_byte", "loss_per_answer_token", "interval", "num_rows"}
    assert figures["num_rows"] == 3
    low, high = figures["interval"]
    assert low <= figures["bits_per_byte"] <= high


def test_compare_prints_one_object_and_writes_a_page(run: Run, base: Path, tmp_path: Path) -> None:
    rows, page = dialogues(tmp_path / "rows.jsonl"), tmp_path / "deep" / "page.html"
    shutil.copytree(base, tmp_path / "copy")
    models = (str(base), str(tmp_path / "copy"))
    code, out, _ = run(
        "compare", *models, "--data", rows, "--out", page, "--questions", "1", "--max-tokens", "2", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert list(found) == list(models)
    assert found[models[1]][str(rows)]["difference"]["bits_per_byte"] == 0
    assert page.is_file()


def test_eval_refuses_files_without_answers(run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("only text here\n")
    for name, told in (("plain.txt", "holds no dialogue with an answer"), ("missing.jsonl", "missing.jsonl")):
        code, out, err = run("eval", base, "--data", tmp_path / name)
        assert (code, out) == (2, "")
        assert told in err


def test_tokenizer_graft_then_expand(run: Run, base: Path, tmp_path: Path) -> None:
    text = tmp_path / "zh.txt"
    text.write_text("小猫睡在河边\n" * 30, encoding="utf-8")
    code, out, _ = run("tokenizer", "graft", "--base", base, "--text", text, "--num-pieces", "4",
                       "--out", tmp_path / "grafted", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["expand_violations"] == 0
    flags = ("expand", "--model", base, "--tokenizer", tmp_path / "grafted", "--out", tmp_path / "grown")
    code, out, _ = run(*flags, "--init", "mean", "--head-init", "normal", "--seed", "3", "--text", text, "--json")
    report = json.loads(out)
    assert code == 0
    assert report.keys() >= EXPAND_KEYS
    assert (report["embedding_init"], report["head_init"]) == ("mean", "normal")
    assert report["first_loss"].keys() >= {"uniform", "old_text", "new_text", "new_text_new_targets"}
    assert read_model_config(tmp_path / "grown")["vocab_size"] == report["num_rows_new"]
    code, _, err = run(*flags)
    assert code == 2
    assert "already holds something" in err
    code, _, err = run(*flags[:-1], tmp_path / "other", "--init", "nonsense")
    assert code == 2
    assert "No initialisation is called 'nonsense'" in err
    (tmp_path / "blank.txt").write_text("\n \n")
    code, _, err = run(*flags[:-1], tmp_path / "other", "--text", tmp_path / "blank.txt")
    assert (code, "blank.txt: no text but blanks" in err) == (2, True)


def test_doctor_tells_versions_devices_and_room(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found.keys() >= {"versions", "devices", "free"}
    assert found["devices"]["cpu"]["cores"] >= 1
    assert "torch" in run("doctor")[1]


@pytest.mark.parametrize(
    ("holds", "told"),
    [
        ({}, "holds no model: there is no config.json"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a whole model"),
        ({"notes.txt": "hello"}, "holds no model: there is no config.json"),
    ],
)
def test_a_folder_that_is_no_whole_model_gets_one_clear_line(
    run: Run, tmp_path: Path, holds: dict[str, str], told: str
) -> None:
    """C3 to C8, at the door: broken, foreign and half-written folders."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in holds.items():
        (folder / name).write_text(content)
    code, out, err = run("chat", folder, "--once", "hi")
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "bert"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    ],
)
def test_a_damaged_model_gets_two_lines(
    run: Run, base: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    shutil.copytree(base, tmp_path / "model")
    damage(tmp_path / "model")
    code, out, err = run("chat", tmp_path / "model", "--once", "hi")
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 2


def test_a_step_that_is_not_finished_cannot_talk(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "6-model").mkdir()
    (tmp_path / "6-model" / "config.json").write_text("{}")
    code, _, err = run("chat", tmp_path / "6-model", "--once", "hi")
    assert code == 2
    assert "is a step of a run that is not finished" in err


def test_a_result_is_lines_for_a_person_and_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        {"rows": 3, "is_tied": True, "by": {"new": 0.123456789, "old": None}, "seen": ["a b", "\x1b[2Jc"], "no": {}},
        False,
    )
    assert capsys.readouterr().out.splitlines() == [
        "rows     3", "is_tied  yes",
        "by", "  new  0.123457", "  old  none", "seen", "  a b", "  \\x1b[2Jc", "no       none",
    ]  # fmt: skip
    show({"examples": {"changed": [" a", "8\n"], "none": []}}, False)
    assert capsys.readouterr().out.splitlines() == [
        "examples", "  changed", '    " a"', '    "8\\n"', "  none  none",
    ]  # fmt: skip
