"""Recipes: all mistakes at once with their lines, hostile files bounded, overrides and `extends`."""

from pathlib import Path

import pytest
import yaml

from graftlm.errors import UserError
from graftlm.recipe_file import load_recipe

GOOD = """\
name: tiny
base: {model: owner/base}
tokenizer: {mode: continued, text: [zh.txt]}
data:
  sources: [{path: rows.jsonl}]
  heldout_rows: 10
stages:
  - name: full
    trains: {kind: full}
    peak_lr: 1e-5
  - name: lora
    trains: {kind: lora, rank: 4}
"""


def write(folder: Path, text: str, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert caught.value.fix
    return caught.value.problem


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.base.model == "owner/base"
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.stages[0].peak_lr == 1e-5


def test_all_mistakes_at_once_with_line_and_nearest_key(tmp_path: Path) -> None:
    """P3: typos, `no` for a number and a rank on a full stage are told together."""
    text = GOOD.replace("heldout_rows: 10", "heldout_rows: no").replace("rank: 4", "rnak: 4")
    text = text.replace("trains: {kind: full}", "trains: {kind: full, rank: 3}")
    problem = problem_of(write(tmp_path, text))
    assert "3 mistakes" in problem
    assert "tiny.yaml:6: data.heldout_rows" in problem
    assert "tiny.yaml:9: unknown key stages.0.trains.rank" in problem
    assert "tiny.yaml:12: unknown key stages.1.trains.rnak; did you mean rank?" in problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "stages: []\n", ":13: the key stages stands here twice"),
        (GOOD.replace("rank: 4", "rank: 4, rank: 5"), ":12: the key rank stands here twice"),
        (GOOD + "report: &a {num_samples: 1}\nexport: *a\n", ":14: YAML aliases"),
        (GOOD + "report: !!python/object:os.system {}\n", ":13: YAML tags"),
        (GOOD + "report: " + "[" * 40 + "]" * 40, ":13: nested more than 30 deep"),
        (GOOD + "report: {", "not YAML"),
        (GOOD + "---\nname: x\n", "another document"),
        (GOOD + "\tseed: 1\n", ":13: not YAML"),
        (GOOD + "\0", "not YAML"),
        (GOOD + "? [a, b]\n: 1\n", ":13: a key is one plain word"),
        ("just text", "key: value"),
        ("", "key: value"),
        ("x" * 1_000_001, "1,000,001 bytes"),
        (GOOD + "extends: tiny.yaml\n", "one level"),
        (GOOD + "extends: ../secret.yaml\n", "lies in another folder"),
        (GOOD + "extends: [a]\n", "must name one recipe file"),
        (GOOD + "extends: nope.yaml\n", "There is no recipe"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    """P2: tags, alias bombs, depth bombs, duplicate keys, giant files, parents that lie elsewhere."""
    assert told in problem_of(write(tmp_path, text))


def test_other_encodings_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    for encoding in ("gb18030", "utf-16"):
        path.write_bytes(GOOD.replace("tiny", "中文").encode(encoding))
        assert "is not UTF-8" in problem_of(path)
    path.write_bytes(GOOD.encode("utf-8-sig"))
    assert load_recipe(path).name == "tiny"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("seed: yes", "seed: expected a whole number, found 'yes'"),
        ("seed: 010", "found '010'"),  # YAML 1.1: 8
        ("seed: 1:30", "found '1:30'"),  # YAML 1.1: 90
        ("seed: 1_000", "found '1_000'"),  # YAML 1.1: 1000
        ("seed: 0x10", "found '0x10'"),
        ("seed: 1.0", "found 1.0"),
        ("seed: " + "9" * 5000, "found '99999"),
        ("device: " + "x" * 5000, "x…"),
        ("export: {max_shard_gb: .inf}", "expected a finite number"),
        ("export: {dtype: no}", "export.dtype: expected fp32, bf16 or fp16, found 'no'"),
        ("name: ../../etc", "name: expected small letters, digits and hyphens, 41 at most"),
        ("name: [tiny]", "name: expected text"),
        ("name:", "found null"),
        ("stages: full", "stages: expected a list, found 'full'"),
        ("stages: {a: 1}", "stages: expected a list"),
        ("stages: []", "stages: expected at least 1 in the list"),
        ("stages: [{name: ../x, trains: {kind: full}}]", "stages.0.name: expected small letters"),
        ("stages: [{name: model, trains: {kind: full}}]", "stages.0.name: model is the name of a step of every run"),
        (
            "stages: [{name: a, trains: {kind: full}}, {name: a, trains: {kind: full}}]",
            "stages.1.name: an earlier stage is named a",
        ),
        ("stages: [{name: a, trains: full}]", "for example {kind: full}, found 'full'"),
        ("stages: [{name: a, trains: {rank: 3}}]", "stages.0.trains: kind is missing: full, lora or new-rows"),
        ("stages: [{name: a, trains: {kind: ful}}]", "stages.0.trains.kind: unknown kind 'ful'; did you mean full?"),
        (
            "stages: [{name: a, trains: {kind: lora, targets: [q_proj, no_proj]}}]",
            "stages.0.trains.targets.1: expected q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj",
        ),
        ("stages: [{name: a, trains: {kind: lora, targets: []}}]", "targets: expected at least 1 in the list"),
        ("stages: [{name: a, trains: {kind: full}, betas: [0.9]}]", "stages.0.betas.1 is missing"),
        ("stages: [{name: a, trains: {kind: full}, objective: text}]", "objective text needs data.text"),
        (
            "stages: [{name: a, trains: {kind: full}, early_stop_after: 2}]",
            "stages.0.early_stop_after: it counts held-out readings",
        ),
        (
            "stages: [{name: a, trains: {kind: full}, warmup_ratio: 0.1, warmup_steps: 3}]",
            "stages.0.warmup_steps: warmup_ratio is given too",
        ),
        ("tokeniser: {}", "unknown key tokeniser; did you mean tokenizer?"),
        ("<<: {seed: 1}", "unknown key <<"),
        ("base: {}", "base: give exactly one of model (a folder or hub id) and scratch, found neither"),
        ("tokenizer: {}", "tokenizer.text: mode continued learns pieces from text"),
        ("tokenizer: {mode: card}", "tokenizer.pieces: mode card takes an existing inventory"),
        ("tokenizer: {text: [a.txt], script: [Hann]}", "script.0: Unicode knows no script 'Hann'; did you mean Han?"),
        ("tokenizer: {text: [a.txt], max_piece_chars: x}", "expected a whole number or auto or none, found 'x'"),
        ("grow: {head: similarity}", "grow.vectors: similarity needs a safetensors file"),
        ("data: {sources: [{path: a.jsonl}]}", "data: give heldout files or heldout_rows"),
        ("data: {sources: [{path: a.jsonl, script: Han}], heldout_rows: 1}", "min_script_share is missing"),
        ("card: {license: Apache 2.0}", "like apache-2.0, found 'Apache 2.0'"),
    ],
)
def test_each_mistake_says_what_was_found_and_expected(tmp_path: Path, line: str, told: str) -> None:
    """P1 P3: on the line where it stands, in at most a few words, however long the value."""
    key = line.partition(":")[0]
    tree = {k: v for k, v in yaml.safe_load(GOOD).items() if k != key}
    text = f"{line}\n" + yaml.safe_dump(tree)
    problem = problem_of(write(tmp_path, text))
    assert told in problem
    assert "tiny.yaml:1: " in problem
    assert len(problem) < 400


def test_overrides_name_stages_by_name_or_number(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["stages.lora.trains.rank=8", "stages.0.epochs=2.5", "seed=7"])
    assert recipe.stages[1].trains.rank == 8
    assert recipe.stages[0].epochs == 2.5
    assert recipe.seed == 7
    assert load_recipe(path, ["stages.lora.recovery=off"]).stages[1].recovery == "off"  # a bool to YAML 1.1
    assert "there is no nope" in problem_of(path, "stages.nope.epochs=1")
    assert "did you mean epochs?" in problem_of(path, "stages.lora.epoch=1")
    assert "section.key=value" in problem_of(path, "seed")
    assert "override a.b.c=1: unknown key a" in problem_of(path, "a.b.c=1")
    assert "there is no 5 in stages; known: full, lora" in problem_of(path, "stages.5.epochs=1")
    assert "override tokenizer.text.0.x=1: tokenizer.text.0 holds no keys" in problem_of(path, "tokenizer.text.0.x=1")
    for value in ("{", "*alias", "!!python/name:os.system x", "'"):
        assert "verride" in problem_of(path, f"device={value}")


def test_both_mistakes_of_the_file_and_of_overrides_are_told(tmp_path: Path) -> None:
    problem = problem_of(write(tmp_path, GOOD + "sed: 1\n"), "stages.lora.epochs=none")
    assert "tiny.yaml:13: unknown key sed; did you mean seed?" in problem
    assert "override stages.lora.epochs=none: stages.1.epochs: expected a number, found 'none'" in problem


def test_every_mistake_of_overrides_is_told(tmp_path: Path) -> None:
    wrong = ("stages.lorra.epochs=1", "tokenizer.num_pices=3", "stages.lora.epochs=x", "bar", "seed={")
    problem = problem_of(write(tmp_path, GOOD), *wrong)
    assert "5 mistakes" in problem
    assert "override stages.lorra.epochs=1: there is no lorra in stages; did you mean lora?" in problem
    assert all(f"override {one}: " in problem for one in wrong)


def test_what_contradicts_is_told_beside_wrong_values_each_on_its_line(tmp_path: Path) -> None:
    """P3: a wrong value in a section hides nothing else of it, nor of the whole."""
    text = """\
base: {model: owner/base, scratch: {text: [e.txt], training: {trains: {kind: full}, epochs: -1}}}
tokenizer: {text: [zh.txt], script: [Hann], num_piece: 5}
data: {sources: [{path: rows.jsonl, sampel: 3}]}
stages:
  - {name: full, trains: {kind: full}, epochs: x, seed: 1, seed: 2}
  - {name: full, trains: {kind: lroa}, warmup_ratio: 0.1, warmup_steps: 3, loss_scale: {floor: 1.0e+9}}
"""
    problem = problem_of(write(tmp_path, text), "seed=x")
    told = [line.partition("tiny.yaml:")[2] for line in problem.splitlines()[2:]]
    assert told == [
        "1: base.scratch.training.epochs: expected a number above 0, found -1",
        "1: base: give exactly one of model (a folder or hub id) and scratch, found both",
        "2: tokenizer.script.0: Unicode knows no script 'Hann'; did you mean Han?",
        "2: unknown key tokenizer.num_piece; did you mean num_pieces?",
        "3: unknown key data.sources.0.sampel; did you mean sample?",
        "3: data: give heldout files or heldout_rows: a run without held-out rows cannot be judged",
        "5: the key seed stands here twice: keep one of them",
        "5: stages.0.epochs: expected a number, found 'x'",
        "6: stages.1.trains.kind: unknown kind 'lroa'; did you mean lora?",
        "6: stages.1.loss_scale.initial: 65536 lies below the floor, 1e+09",
        "6: stages.1.warmup_steps: warmup_ratio is given too: choose one",
        "6: stages.1.name: an earlier stage is named full too: give each its own name",
    ]
    assert "override seed=x: seed: expected a whole number, found 'x'" in problem


def test_files_that_are_not_there_are_mistakes_where_asked(tmp_path: Path) -> None:
    """Each with its line and the whole path looked for; an id of the hub is no path, a name with a file's ending is."""
    text = GOOD.replace("path: rows.jsonl", "path: data/rows.jsonl").replace("rank: 4", "rank: x")
    path = write(tmp_path, text.replace("num_pieces", "num_piece"))
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["tokenizer.common_characters=no.txt"], needs_files=True)
    problem = caught.value.problem
    assert "4 mistakes" in problem
    assert f"tiny.yaml:3: tokenizer.text.0: there is no file or folder {tmp_path / 'zh.txt'}" in problem
    assert f"tiny.yaml:5: data.sources.0.path: there is no file or folder {tmp_path / 'data' / 'rows.jsonl'}" in problem
    assert f"there is no file or folder {tmp_path / 'no.txt'}" in problem
    assert "tiny.yaml:12: stages.1.trains.rank: expected a whole number, found 'x'" in problem
    for name in ("zh.txt", "rows.jsonl"):
        write(tmp_path, "x", name)
    assert load_recipe(write(tmp_path, GOOD), needs_files=True).base.model == "owner/base"


def test_a_source_may_be_a_pattern_and_no_other_path_may(tmp_path: Path) -> None:
    for name in ("zh.txt", "rows-1.jsonl"):
        write(tmp_path, "x", name)
    path = write(tmp_path, GOOD.replace("path: rows.jsonl", "path: rows-*.jsonl"))
    assert load_recipe(path, needs_files=True).data.sources[0].path == str(tmp_path / "rows-*.jsonl")
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["data.sources.0.path=part-*", f"grow.vectors={tmp_path}/rows-*"], needs_files=True)
    assert f"data.sources.0.path: no file matches {tmp_path / 'part-*'}" in caught.value.problem
    assert f"grow.vectors: there is no file or folder {tmp_path / 'rows-*'}" in caught.value.problem


def test_a_pattern_typed_is_one_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", "x", "rows-1.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(write(tmp_path, GOOD), ["data.sources.0.path=rows-*.jsonl"])
    assert recipe.data.sources[0].path == str(tmp_path / "here" / "rows-*.jsonl")


def test_a_base_from_nothing_needs_no_name_of_its_training(tmp_path: Path) -> None:
    text = GOOD.replace("model: owner/base", "scratch: {text: [e.txt], training: {trains: {kind: full}}}")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.base.scratch is not None
    assert recipe.base.scratch.training.name == "pretrain"


def test_extends_merges_one_level(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    child = write(tmp_path, "extends: tiny.yaml\nseed: 3\ndata: {max_tokens: 64}\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.data.max_tokens, recipe.data.heldout_rows) == ("child", 3, 64, 10)
    grandchild = write(tmp_path, "extends: child.yaml\n", "grandchild.yaml")
    assert "one level" in problem_of(grandchild)


def test_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "tyni.yaml")
    assert "tiny.yaml" in caught.value.fix
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "other.yaml")
    assert "Did you mean" not in caught.value.fix
