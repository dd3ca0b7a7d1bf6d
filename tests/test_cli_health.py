"""The verb autopsy: a short text or one JSON object, two files where they belong, two lines for what it cannot read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_runs import crashed, good, incident, write_run, write_stage

from graftlm.cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graftlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(str(left.value.code)), out, err

    return call


def test_a_run_is_told_in_a_few_lines_and_gets_its_two_files(run: Run, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [[*crashed(), incident(23, "forward-overflow", module="\x1b[2J")]])
    code, out, err = run("autopsy", folder)
    assert (code, err) == (0, "")
    assert out.startswith("crashed: Training stopped")
    assert "1. The forward pass leaves the range of 16 bits (forward-overflow, fatal)" in out
    assert "   change    stages.lora.peak_lr=3e-07" in out
    assert "graftlm run RECIPE --out ANOTHER_FOLDER stages.lora.peak_lr=3e-07 stages.lora.groups" in out
    assert f"page    {folder / 'autopsy.html'}" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 200
    assert (folder / "health.json").is_file()


def test_json_is_one_object_and_nothing_else(run: Run, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [good(1, 50)])
    code, out, _ = run("autopsy", folder, "--json")
    told = json.loads(out)
    assert (code, told["verdict"], told["findings"]) == (0, "healthy", [])
    assert told["page"] == str(folder / "autopsy.html")
    assert json.loads((folder / "health.json").read_text(encoding="utf-8")).items() <= told.items()


def test_a_log_or_a_stage_is_written_about_only_where_asked(run: Run, tmp_path: Path) -> None:
    stage = write_run(tmp_path / "run", [crashed()]) / "4-lora"
    for given in (stage, stage / "metrics.jsonl"):
        code, out, _ = run("autopsy", given)
        assert (code, "page" in out) == (0, False)
    assert sorted(path.name for path in stage.iterdir()) == ["metrics.jsonl"]
    code, out, _ = run("autopsy", stage, "--out", tmp_path / "out")
    assert (code, (tmp_path / "out" / "autopsy.html").is_file()) == (0, True)


def test_a_healthy_log_has_nothing_to_try(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("autopsy", write_stage(tmp_path / "alone", good(1, 50)))
    assert (code, out.splitlines()) == (
        0,
        ["healthy: Nothing here asks for a person.", "  alone: healthy; not finished, 50 steps so far: running, "
         "interrupted or killed"],
    )  # fmt: skip


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff" * 40, b"a,b\n1,2\n"])
def test_what_is_no_log_ends_in_two_lines_and_exit_2(run: Run, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "given.csv"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run("autopsy", path)
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert str(path) in err


def test_a_file_is_no_place_to_write_into(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    code, _, err = run("autopsy", write_stage(tmp_path / "alone", good(1, 50)), "--out", tmp_path / "taken")
    assert (code, len(err.splitlines()), (tmp_path / "taken").read_text(encoding="utf-8")) == (2, 2, "mine")
