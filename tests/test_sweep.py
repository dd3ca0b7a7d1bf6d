"""A sweep at toy scale: every cell a run, shared steps done once, one page with a curve; and sweeps that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_recipe import write_tiny_recipe

from graftlm.errors import NumericalStop, UserError
from graftlm.recipe_file import load_recipe
from graftlm.release.trend import fit_power_law
from graftlm.step import LINKED_BYTES, Step
from graftlm.sweep import SweepResult, cells_of, load_sweep, missing_files, run_sweep

GRID = {
    "recipe": "tiny.yaml",
    "curve_over": "rows",
    "questions": 2,
    "max_answer_tokens": 3,
    "grid": {"data.sources.0.sample": [20, 40, 60]},
}


def write_sweep(folder: Path, **changes: object) -> Path:
    """A sweep of the tiny recipe with its first stage only, as short as can be; `None` leaves a key out."""
    stage = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))["stages"][0]
    stage |= {"heldout_every": None, "checkpoint_every": None, "epochs": 0.5, "recovery": "off"}
    tree = {**GRID, "set": {"stages": [stage], "report": {"num_samples": 0}}, **changes}
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_recipe(folder)
    return folder, run_sweep(load_sweep(write_sweep(folder)), folder / "out")


def test_every_cell_is_a_run_and_shared_steps_are_done_once(finished: tuple[Path, SweepResult]) -> None:
    folder, result = finished
    assert [cell["name"] for cell in result.cells] == ["sample-20", "sample-40", "sample-60"]
    assert result.cells[0]["shared"] == []
    assert result.cells[1]["shared"] == result.cells[2]["shared"] == ["0-scratch", "1-tokenizer", "2-base"]
    weights = [folder / "out" / name / "2-base" / "model.safetensors" for name in ("sample-20", "sample-60")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found = [json.loads((folder / "out" / c["name"] / "recipe.json").read_text())["recipe"] for c in result.cells]
    assert [recipe["data"]["sources"][0]["sample"] for recipe in found] == [20, 40, 60]
    assert not list((folder / "out").glob("*/.*.taken-over"))


def test_large_files_are_shared_and_small_ones_are_each_runs_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(bytes(LINKED_BYTES))
    (tmp_path / "a" / "README.md").write_text("a card")
    (tmp_path / ".b.taken-over").mkdir()
    Step(tmp_path / "b").take_over(tmp_path / "a")
    assert (tmp_path / "b" / "weights").samefile(tmp_path / "a" / "weights")
    (tmp_path / "b" / "README.md").write_text("another")
    assert (tmp_path / "a" / "README.md").read_text() == "a card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_page_tells_a_curve_over_what_was_counted(finished: tuple[Path, SweepResult]) -> None:
    folder, result = finished
    page = Path(result.page).read_text(encoding="utf-8")
    for told in ("The trend", "The runs", "with twice as many dialogues learned from", "Answers side by side"):
        assert told in page
    curves = {curve["file"]: curve for curve in result.curves}
    assert set(curves) == {"heldout-new.jsonl", "heldout-old.jsonl"}
    counted = [json.loads((folder / "out" / c["name"] / "3-data" / "data.json").read_text()) for c in result.cells]
    new = curves["heldout-new.jsonl"]
    assert [x for x, _ in new["points"]] == [data["rows_kept"] for data in counted]
    written = json.loads((folder / "out" / "comparison.json").read_text())
    assert written["curves"] == json.loads(json.dumps(result.curves))
    file = str(folder / "out" / "heldout-new.jsonl")
    assert new["points"][0][1] == pytest.approx(written["models"]["sample-20"][file]["bits_per_byte"])


def test_run_again_it_changes_nothing_and_a_new_cell_joins(
    finished: tuple[Path, SweepResult], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = finished
    weights = folder / "out" / "sample-40" / "5-model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    grid = {"data.sources.0.sample": [20, 40, 60], "stages.0.epochs": [1]}
    result = run_sweep(load_sweep(write_sweep(folder, grid={"data.sources.0.sample": [40, 60]})), folder / "out")
    assert weights.stat().st_mtime_ns == written
    assert "4-full: unchanged" in capsys.readouterr().err
    assert [cell["name"] for cell in result.cells] == ["sample-40", "sample-60"]
    assert len(before.cells) == 3
    cells = cells_of(load_sweep(write_sweep(folder, grid=grid)), folder)
    assert [cell.name for cell in cells] == ["sample-20-epochs-1", "sample-40-epochs-1", "sample-60-epochs-1"]


@pytest.mark.slow
def test_cells_may_start_from_a_model_made_first(tmp_path: Path) -> None:
    """`run:NAME` is the finished model of a recipe run before the grid."""
    write_tiny_recipe(tmp_path)
    first = yaml.safe_load((tmp_path / "tiny.yaml").read_text(encoding="utf-8"))
    first |= {"name": "chat", "tokenizer": {"mode": "keep"}, "stages": first["stages"][:1]}
    first["data"] |= {"sources": [{"path": "old.jsonl"}], "heldout": [{"path": "old.jsonl", "language": "old"}]}
    first["data"]["sources"] = [{"path": "zh.jsonl"}]
    del first["report"]["exact_questions"]
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(first), encoding="utf-8")
    grid = {"start": [
        {"at": "base", "base": {"model": "run:chat/0-scratch/model"}}, {"at": "chat", "base": {"model": "run:chat"}},
    ]}  # fmt: skip
    sweep = load_sweep(write_sweep(tmp_path, grid=grid, first=["chat.yaml"], curve_over="at"))
    result = run_sweep(sweep, tmp_path / "out")
    assert [cell["name"] for cell in result.cells] == ["base", "chat"]
    assert result.curves == []
    asked = json.loads((tmp_path / "out" / "chat" / "recipe.json").read_text())["recipe"]["base"]["model"]
    assert asked == str((tmp_path / "out" / "first" / "chat" / "5-model").resolve())
    assert "The trend" not in Path(result.page).read_text(encoding="utf-8")


def test_a_cell_that_stops_is_told_and_the_others_go_on(
    finished: tuple[Path, SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlm import sweep as module

    folder, _ = finished
    real = module.run_recipe

    def stopping(recipe, run, relatives=()):
        if recipe.name == "sample-20":
            raise NumericalStop("Not finite.", "Lower it.")
        return real(recipe, run, relatives)

    monkeypatch.setattr(module, "run_recipe", stopping)
    result = run_sweep(load_sweep(write_sweep(folder)), folder / "out")
    assert [cell["status"] for cell in result.cells] == ["stopped", "done", "done"]
    assert "sample-20 stopped for numerical reasons" in Path(result.page).read_text(encoding="utf-8")
    monkeypatch.setattr(module, "run_recipe", lambda *_: (_ for _ in ()).throw(NumericalStop("Not finite.", "x")))
    with pytest.raises(NumericalStop, match="0 of 3 cells"):
        run_sweep(load_sweep(write_sweep(folder)), folder / "out")


def test_a_power_law_is_found_again() -> None:
    """Points of a law with two per cent of noise; the interval is that of the resamples."""
    dice = np.random.default_rng(0)
    xs = np.array([1e3, 3e3, 1e4, 3e4])
    ys = 9.0 * xs**-0.2
    law = fit_power_law(xs, ys, ys * dice.normal(1, 0.02, (500, 4)))
    assert (law.factor, law.exponent, law.residual) == pytest.approx((9.0, 0.2, 0.0), abs=1e-9)
    assert law.interval[0] < 0.2 < law.interval[1]
    assert law.interval[1] - law.interval[0] < 0.05
    assert law(1e5) == pytest.approx(9.0 * 1e5**-0.2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": None}, "recipe is missing"),
        ({"grid": None}, "grid is missing"),
        ({"grid": {}}, "grid must be axes"),
        ({"grid": {"seed": 3}}, "grid must be axes"),
        ({"gird": 1}, "unknown key gird; did you mean grid?"),
        ({"curve_over": "time"}, "curve_over must be at, parameters"),
        ({"questions": True}, "questions must be a whole number"),
        ({"name": "A b"}, "name must be small letters"),
        ({"recipe": "no.yaml"}, "no.yaml"),
        ({"grid": {"seed": [1, 1]}}, "Two cells of rows are called seed-1"),
        ({"grid": {"seed": [{"at": 3}]}}, "needs `at`"),
        ({"grid": {"seed": list(range(65))}}, "65 cells, at most 64"),
        ({"grid": {"sede": [1, 2]}}, "unknown key sede"),
        ({"grid": {"base.model": ["run:other", "x"]}}, "no recipe of `first` is called other"),
        (
            {"grid": {"data.sources.0.sample": [20, 40]}, "set": {"data.heldout": [], "data.heldout_rows": 5}},
            "draw held-out rows from it",
        ),
    ],
)
def test_a_sweep_that_is_none_is_told(tmp_path: Path, changes: dict, told: str) -> None:
    """P3, for sweeps: before anything is run."""
    write_tiny_recipe(tmp_path)
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_sweep(path)
    assert told in error.value.problem


def test_a_file_that_is_missing_is_told_and_nothing_written(tmp_path: Path) -> None:
    """P3: by --check too, which needs none of them."""
    write_tiny_recipe(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path), ["data.sources.0.path=nowhere.jsonl"])
    assert [Path(path).name for path in missing_files(sweep, tmp_path / "out")] == ["nowhere.jsonl"]
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run_sweep(sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_strangers_folder_and_the_wrong_verb(finished: tuple[Path, SweepResult], tmp_path: Path) -> None:
    folder, _ = finished
    with pytest.raises(UserError, match="holds the sweep rows, not other"):
        run_sweep(load_sweep(write_sweep(folder, name="other")), folder / "out")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="no sweep"):
        run_sweep(load_sweep(write_sweep(folder)), tmp_path)
    with pytest.raises(UserError, match="is a sweep of recipes") as error:
        load_recipe(folder / "rows.yaml")
    assert error.value.fix == f"graftlm sweep {folder / 'rows.yaml'}"


def test_numbers_keep_their_kind_on_the_way_into_a_recipe(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-05 for text: a rate of the grid must stay a number."""
    write_tiny_recipe(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path, grid={"stages.0.peak_lr": [2e-5, 1.5e-7]}))
    rates = [load_recipe(sweep.recipe, cell.overrides).stages[0].peak_lr for cell in cells_of(sweep, tmp_path)]
    assert rates == [2e-5, 1.5e-7]
