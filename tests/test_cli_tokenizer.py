"""The tokenizer's verbs: their JSON holds what CLI users build on, and mistakes end in two lines and exit code 2."""

import json
import sys
from pathlib import Path

import pytest

from graftlm.cli import main
from graftlm.text.tokenizer import check as check_module
from graftlm.text.tokenizer import graft as graft_module
from graftlm.text.tokenizer import train_base_tokenizer

CHINESE = ["今天天气很好。", "今天我们去公园玩。", "天气预报说明天下雨。", "我们明天再去公园吧。"] * 4
COUNTS = {
    "num_old", "num_new", "num_total", "expand_violations", "engine_disagreements", "roundtrip_failures",
    "old_texts_changed", "chars_per_token",
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base/`, `zh.txt` and `en.txt`."""
    monkeypatch.setattr(graft_module, "NUM_SAMPLE_TEXTS", 100)
    monkeypatch.setattr(check_module, "NUM_FUZZED_TEXTS", 50)
    monkeypatch.chdir(tmp_path)
    english = [f"Plain text number {number}, with words in it." for number in range(40)]
    train_base_tokenizer(english, 300, tmp_path / "base")
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    (tmp_path / "en.txt").write_text("\n".join(english), encoding="utf-8")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `graftlm tokenizer LINE`."""
    monkeypatch.setattr(sys, "argv", ["graftlm", "tokenizer", *line.split()])
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_graft_check_and_report_as_json(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "graft --base base --text zh.txt --num-pieces 20 --max-piece-chars 2 --out new --json"
    code, out, err = call(capsys, monkeypatch, line)
    grafted = json.loads(out)
    assert code == 0
    assert grafted.keys() >= COUNTS
    assert (grafted["num_new"], grafted["expand_violations"]) == (21, 0)
    assert "learning 20 pieces" in err, "progress goes to standard error"
    code, out, _ = call(capsys, monkeypatch, "check base new --text zh.txt --text en.txt --json")
    checked = json.loads(out)
    assert code == 0
    assert checked.keys() >= COUNTS
    assert {key: checked[key] for key in COUNTS - {"chars_per_token"}} == {
        key: grafted[key] for key in COUNTS - {"chars_per_token"}
    }
    code, out, _ = call(capsys, monkeypatch, "report base new --text zh.txt --text en.txt --plot plot.svg --json")
    report = json.loads(out)
    assert code == 0
    for measure in ("chars_per_token", "bytes_per_token"):
        assert report[measure]["new"]["zh.txt"] > report[measure]["base"]["zh.txt"]
        assert report[measure]["new"]["en.txt"] == report[measure]["base"]["en.txt"]
    assert Path("plot.svg").is_file()


def test_flags_reach_the_graft(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.txt").write_text("龘", encoding="utf-8")
    line = (
        "graft --base base --text zh.txt --num-pieces 9 --max-piece-chars none --common-characters own.txt "
        "--script Han --script Hiragana --leading-space never --no-pad-piece --out new --json"
    )
    code, out, _ = call(capsys, monkeypatch, line)
    grafted = json.loads(out)
    assert code == 0
    assert (grafted["script"], grafted["num_new"]) == (["Han", "Hiragana"], 9)
    assert "龘" in Path("new/tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("graft --base missing --text zh.txt --out new", "missing: no such file or folder"),
        ("graft --base base --out new", "--text: mode continued learns pieces from text, and none is given"),
        (
            "graft --base base --mode merge --out new",
            "--pieces: mode merge takes an existing inventory, and none is given",
        ),
        ("graft --base base --mode keep --out new", "is not one of"),
        ("graft --base base --mode mix --text zh.txt --out new", "'mix' is not one of 'continued', 'merge', 'card'"),
        ("graft --base base --text zh.txt --max-piece-chars long --out new", "--max-piece-chars: "),
        (
            "graft --base base --text zh.txt --script Hann --out new",
            "--script: Unicode knows no script 'Hann'; did you",
        ),
        ("graft --base base --text en.txt --out new", "none of the script Han"),
        ("graft --base base --text zh.txt --out base", "already holds files"),
        ("check base missing", "missing: no such file or folder"),
        ("report base", "no text to measure on"),
    ],
)
def test_mistakes_end_in_helpful_lines(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    code, out, err = call(capsys, monkeypatch, line)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) >= 2
    assert not Path("new").exists()
