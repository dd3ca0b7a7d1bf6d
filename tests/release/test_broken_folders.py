"""A broken, foreign or half-written model folder gets one clear line and what to do, from every verb that takes one."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from graftlm.cli.app import main
from graftlm.model.causal import new_causal, save_causal
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import train_base_tokenizer

TEXTS = [
    "Below is an instruction. ### Response: one two three",
    "hello there, how are you today?",
    "你好，今天天气很好。",
]
WEIGHTS = "model.safetensors"
VERBS = ["export", "chat", "generate", "expand"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = train_base_tokenizer(TEXTS, 340)
    model = new_causal(
        num_rows=tokenizer.num_pieces, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
        max_positions=256,
    )  # fmt: skip
    save_causal(model, folder, "20KB", also=lambda scratch: tokenizer.save(scratch, chat_template=CARD.jinja))
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A sharded model with a manifest that may be damaged."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def call(
    verb: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, list[str]]:
    """One verb on the folder, in this process: exit code, standard output, lines of standard error."""
    asked = out / "asked.jsonl"
    asked.write_text('{"prompt": "hi"}\n')
    heldout = out / "heldout.jsonl"
    heldout.write_text('{"instruction": "hi", "output": "hello"}\n')
    arguments = {
        "export": ["export", folder, "--to", "gguf", "--out", out / "made"],
        "chat": ["chat", folder, "--once", "hi", "--max-tokens", "2"],
        "generate": ["generate", folder, "--input", asked, "--output", out / "made", "--max-tokens", "2"],
        "expand": ["expand", "--model", folder, "--tokenizer", folder, "--out", out / "made"],
        "eval": ["eval", folder, "--data", heldout],
        "compare": ["compare", folder, f"{folder}/", "--data", heldout, "--out", out / "made.html"],
        "serve": ["serve", folder, "--port", "0"],
    }[verb]
    monkeypatch.setattr(sys, "argv", ["graftlm", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    told, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, told, err.strip().splitlines()


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def forget_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncated(folder: Path) -> None:
    forget_manifest(folder)
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


def flipped(folder: Path) -> None:
    content = bytearray(shard(folder).read_bytes())
    content[-3] ^= 4
    shard(folder).write_bytes(content)


def lacking_a_tensor(folder: Path) -> None:
    forget_manifest(folder)
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)


def without_a_shard(folder: Path) -> None:
    forget_manifest(folder)
    shard(folder).unlink()


def pointing_outside(folder: Path) -> None:
    forget_manifest(folder)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    shutil.move(shard(folder), folder.parent / shard(folder).name)
    name = sorted(set(told["weight_map"].values()))[-1]
    told["weight_map"] = {k: f"../{v}" if v == name else v for k, v in told["weight_map"].items()}
    index.write_text(json.dumps(told))


def only_pickles(folder: Path) -> None:
    forget_manifest(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "code.Model"}}')
    (folder / "code.py").write_text("raise SystemExit('ran')")


def more_ids_than_rows(folder: Path) -> None:
    """One row fewer than the tokenizer has ids: 339 rows."""
    forget_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    model = new_causal(
        num_rows=config["vocab_size"] - 1, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24
    )
    model.save_pretrained(folder)


def half_written_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:40])


def half_written_tokenizer(folder: Path) -> None:
    forget_manifest(folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])


def without_weights(folder: Path) -> None:
    forget_manifest(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncated, "bytes; its header tells of"),
        (flipped, "changed since it was written"),
        (lacking_a_tensor, "lacks model.layers.1.mlp.up_proj.weight"),
        (without_a_shard, "is missing from"),
        (pointing_outside, "lies outside the folder"),
        (only_pickles, "only pickled weights"),
        (of_another_kind, "of type 'bert'"),
        (more_ids_than_rows, "rows: 1 too few"),
        (half_written_config, "config.json is not JSON"),
        (half_written_tokenizer, "not a whole tokenizer.json"),
        (without_weights, "holds no weights"),
    ],
)
def test_every_verb_refuses_it_in_two_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    verb: str, damage: Callable[[Path], None], told: str,
) -> None:  # fmt: skip
    """C1, C2, C3, C4, C5, C6, T1: nothing is used, nothing is written."""
    damage(folder)
    code, out, lines = call(verb, folder, tmp_path, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert told in lines[-2]
    assert len(lines) - sum("is not run" in line for line in lines) == 2
    assert not list(tmp_path.glob("*made*"))


@pytest.mark.parametrize(
    ("verb", "template", "told"),
    [
        *((verb, '{{ "".__class__.__mro__ }}', "__class__") for verb in (*VERBS[:3], "eval", "compare", "serve")),
        ("chat", "{% for i in range(10**9) %}x{% endfor %}", "too big"),
        ("chat", '{{ raise_exception("\x1b[31mno") }}', "user, assistant:  [31mno."),
    ],
)
def test_a_template_the_sandbox_refuses_is_told_in_two_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    verb: str, template: str, told: str,
) -> None:  # fmt: skip
    """C7: by every verb that renders, before a weight is read; and its words move no cursor."""
    forget_manifest(folder)
    (folder / "chat_template.jinja").write_text(template)
    code, out, lines = call(verb, folder, tmp_path, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "chat template does not take" in lines[-2]
    assert told in lines[-2]
    assert len(lines) - sum(line.startswith(("Loading", "compare:")) for line in lines) == 2
    assert not list(tmp_path.glob("*made*"))


@pytest.mark.parametrize("verb", ["export", "chat", "generate"])
def test_a_whole_folder_is_used_and_code_in_it_never_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """C6: a config that points at code of its own is told, the code stays unread, and padding rows change nothing."""
    forget_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    code, _, lines = call(verb, folder, tmp_path, monkeypatch, capsys)
    assert code == 0
    assert any("that code is not run" in line for line in lines)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["chat", "model.gguf", "--once", "hi"], "model.gguf is a GGUF file"),
        (["export", "nowhere", "--to", "gguf"], "nowhere is no run folder: there is no folder of that name"),
        (["card", "nowhere"], "nowhere is no run folder: there is no folder of that name"),
        (["export", "adapter", "--to", "gguf"], "adapter is no run folder"),
        (["chat", "adapter", "--once", "hi"], "is an adapter, not a whole model"),
        (["card", "adapter"], "adapter is no run folder"),
        (["card", "begun"], "The run in begun has no finished model yet"),
        (["export", "adapter", "--to", "onnx"], "--to onnx is not known"),
        (["export", "adapter", "--to", "hf", "--quantization", "f16"], "--quantization belongs to --to gguf"),
        (["export", "adapter", "--to", "gguf", "--quantization", "q2"], "--quantization q2 is not known"),
    ],
)
def test_what_is_no_model_at_all_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """C8, C9, at the door."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF\x03")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("begun").mkdir()
    begun = {"stages": [{"name": "full"}], "base": {"model": "owner/base"}}
    Path("begun/recipe.json").write_text(json.dumps({"recipe": begun}))
    monkeypatch.setattr(sys, "argv", ["graftlm", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert (left.value.code, out, len(err.strip().splitlines())) == (2, "", 2)
    assert told in err
