"""The documents: every command in them is run or checked, tables are current, both languages say the same.

Run for real on a tiny model: tokenizer, expand, data, generate, eval, compare, doctor, chat --once, the guide's Python.
Checked without running: `make` (the target is there), `run` (recipe and overrides validate; the road itself has its
own tests), `export`, `autopsy`, `serve` and a chat of many turns (verb and flags parse).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import typer
import yaml

from graftlm.cli.app import app, main
from graftlm.cli.launch import Machines, machines_of
from graftlm.model.causal import new_causal, save_causal
from graftlm.recipe import Stage
from graftlm.recipe_file import load_recipe
from graftlm.sweep import load_sweep
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import train_base_tokenizer

ROOT = Path(__file__).parents[1]
PAIRS = [("README.md", "README.zh.md"), ("docs/guide.md", "docs/guide.zh.md")]
DOCUMENTS = [*(name for pair in PAIRS for name in pair), "CONTRIBUTING.md"]
RUN = ("tokenizer", "expand", "data", "generate", "eval", "compare", "doctor", "plan")


def blocks(name: str, kind: str) -> list[str]:
    """The code blocks of a document, their indentation taken off."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(name: str) -> list[list[str]]:
    """Every line of a document's shell blocks as words, without comments."""
    joined = (re.sub(r"\\\n *", "", block) for block in blocks(name, "sh"))
    lines = [line for block in joined for line in block.splitlines() if line.strip()]
    return [shlex.split(line.removeprefix(".venv/bin/"), comments=True) for line in lines]


def every_command() -> list[list[str]]:
    told = {shlex.join(command): command for name in DOCUMENTS for command in commands(name)}
    return list(told.values())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the documents name: a base, text, dialogues, prompts, a finished demo, the recipes."""
    desk = tmp_path_factory.mktemp("desk")
    chinese = ["你好，今天天气很好。", "中国的首都是北京。", "请问你叫什么名字？"]
    (desk / "my-text.txt").write_text("\n\n".join(chinese * 20), encoding="utf-8")
    rows = [{"instruction": f"{text}{n}", "output": f"好的{n}。"} for n, text in enumerate(chinese)]
    for name in ("dialogues.jsonl", "heldout.jsonl"):
        (desk / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    question = {"question": "天空是什么颜色？", "choices": ["蓝色", "绿色"], "index": 0}
    (desk / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    (desk / "prompts.jsonl").write_text('{"prompt": "你好"}\n', encoding="utf-8")
    tokenizer = train_base_tokenizer(["Below is an instruction.", "### Response: hello there", "one two three"], 320)
    model = new_causal(num_rows=tokenizer.num_pieces, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8)
    save_causal(model, desk / "my-base", also=lambda scratch: tokenizer.save(scratch, chat_template=CARD.jinja))
    shutil.copytree(desk / "my-base", desk / "runs" / "demo" / "6-model")
    for mark in ("recipe.json", "6-model/done.json"):
        (desk / "runs" / "demo" / mark).write_text("{}")
    for folder in ("recipes", "examples"):
        (desk / folder).symlink_to(ROOT / folder)
    return desk


@pytest.mark.parametrize("command", every_command(), ids=shlex.join)
def test_every_command_runs_or_would(
    command: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    program, verb, *rest = command
    if program == "make":
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {verb}"
    elif program == "torchrun":
        _check_torchrun([verb, *rest])
    elif verb in ("run", "preflight"):
        flags = {word for flag in ("--out", "--gpus") for word in (flag, _value(rest, flag))}
        recipe, *overrides = [word for word in rest if word not in flags]
        load_recipe(recipe, overrides)
    elif verb == "sweep":
        assert load_sweep(Path(rest[0])).grid
    elif verb in RUN or "--once" in rest:
        _needs(command, desk)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0, capsys.readouterr().err
        assert capsys.readouterr().out.strip()
    else:
        assert verb in ("export", "card", "chat", "autopsy", "serve"), f"say how this is tested: {shlex.join(command)}"
        parsed = typer.main.get_command(app).commands[verb].make_context(verb, list(rest))
        assert parsed.params


def _check_torchrun(words: list[str]) -> None:
    """torch's own parser takes the words, and what it would start is a recipe of ours."""
    from torch.distributed.run import parse_args

    asked = parse_args(words)
    assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "graftlm", "run")
    assert asked.node_rank == 0
    load_recipe(asked.training_script_args[1])


@pytest.mark.parametrize("name", PAIRS[1])
def test_scripts_for_ssh_and_slurm_start_the_run_on_two_machines(
    name: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked with their variables set by hand: there is neither another machine nor Slurm here."""
    monkeypatch.chdir(desk)
    of_ssh, of_slurm = blocks(name, "bash")
    (by_ssh,) = re.findall(r'ssh machine-\$n "cd graftlm && \. \.venv/bin/activate && graftlm run ([^"]*)" &', of_ssh)
    (by_slurm,) = re.findall(r"srun bash -c 'graftlm run ([^']*)'", of_slurm)
    slurms = {"$SLURM_NNODES": "2", "$SLURM_NODEID": "1", "$FIRST": "machine-0"}
    for line, variables in ((by_ssh, {"$n": "1"}), (by_slurm, slurms)):
        words = line.replace("\\\n", " ")
        for variable, value in variables.items():
            assert variable in words
            words = words.replace(variable, value)
        given = typer.main.get_command(app).commands["run"].make_context("run", shlex.split(words)).params
        found = machines_of(given["nodes"], given["node_rank"], given["master"], given["gpus"])
        assert found == Machines(2, 1, "machine-0", 29500)
        load_recipe(Path(given["recipe"]))


def _value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1] if flag in words else ""


def _needs(command: list[str], desk: Path) -> None:
    """Commands may be tested in any order and process: what an earlier one would have made is made here."""
    grafted = desk / "grafted"
    if "grafted" in command and "graft" not in command and not grafted.exists():
        sys.argv = shlex.split(
            "graftlm tokenizer graft --base my-base --text my-text.txt --num-pieces 20 --out grafted"
        )
        with pytest.raises(SystemExit):
            main()
    out = _value(command, "--out")
    if out and (desk / out).exists():
        shutil.rmtree(desk / out)


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "guide" in name])
def test_the_guides_python_and_yaml_hold(
    name: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), {})
        assert capsys.readouterr().out
    lines = [line for block in blocks(name, "yaml") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 4
    for line in lines:
        Stage.model_validate({"name": "s", "trains": {"kind": "full"}, **yaml.safe_load(line)})


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_name_the_same_commands_and_code(english: str, chinese: str) -> None:
    assert commands(english) == commands(chinese)
    assert commands(english)
    assert blocks(english, "python") == blocks(chinese, "python")


def test_the_two_commands_stand_in_the_readme() -> None:
    assert [command for command in commands("README.md") if command[0] == "make"] == [
        ["make", "demo"],
        ["make", "test"],
    ]


def test_every_verb_is_in_the_guide() -> None:
    told = {
        " ".join(command[1:3]) if command[1] == "tokenizer" else command[1] for command in commands("docs/guide.md")
    }
    verbs = {command.name for command in app.registered_commands}
    verbs |= {f"tokenizer {command.name}" for command in app.registered_groups[0].typer_instance.registered_commands}
    assert verbs <= told


def test_the_tables_of_recipe_keys_are_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_keys", ROOT / "docs" / "recipe_keys.py")
    assert spec is not None
    assert spec.loader is not None
    recipe_keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe_keys)
    for name, language in recipe_keys.GUIDES.items():
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert recipe_keys.current(text, language) == text, "run: make keys"
    told = yaml.safe_load((ROOT / "docs" / "recipe_keys.yaml").read_text(encoding="utf-8"))["keys"]
    named = re.findall(r"^\| `(\w+)` ", recipe_keys.tables("en"), re.MULTILINE)
    assert len(told) == len(named), "a meaning is left over for a key that is gone"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = [
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (ROOT / name).parent.joinpath(target).exists(), target


def test_exit_codes_are_all_explained() -> None:
    for name in ("docs/guide.md", "docs/guide.zh.md"):
        told = re.findall(r"^\| (\d+) \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert told == ["0", "1", "2", "3", "4", "130"]
