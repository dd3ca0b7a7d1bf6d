"""`graftlm run` as several processes: what is refused first, what each does by its rank, and what its end means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from child import graftlm
from rank_processes import ended, free_port, started
from safetensors.torch import load_file
from tiny_recipe import write_tiny_recipe

from graftlm.cli.launch import Machines, _end, _without_places, launch, machines_of
from graftlm.cli.road import CALLED_AS, _program
from graftlm.errors import RankLost, UserError
from graftlm.recipe_file import load_recipe
from graftlm.run import read_json, read_metrics
from graftlm.training.place import Place
from graftlm.training.stacks import SILENT

OVERRIDES = ("report.exact_questions=null", "report.num_samples=0")  # what rank 0 does alone is tested elsewhere


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "6-model" / "model.safetensors")


def test_started_as_torchrun_does_two_processes_are_one_run(recipe: Path, tmp_path: Path) -> None:
    """The whole road, a base from nothing too: rank 0 walks it and speaks, the other trains along and is silent."""
    (tmp_path / "logs").mkdir()
    run = tmp_path / "run"
    assert ended(started(2, graftlm, "run", recipe, *OVERRIDES, "--out", run, folder=tmp_path / "logs")) == {0: 0, 1: 0}
    assert (tmp_path / "logs" / "1.err").read_text() == ""
    assert "4-full: done" in (tmp_path / "logs" / "0.err").read_text()
    for stage in ("0-scratch", "4-full", "5-lora"):
        assert read_json(run / stage / "done.json")["num_ranks"] == 2
        assert {line["event"] for line in read_metrics(run / stage / "metrics.jsonl")} >= {"step", "heldout"}
    assert not list(run.rglob(".*.[0-9]*"))  # nothing half-written
    assert weights(run)


def test_a_rank_names_the_program_as_its_launcher_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CALLED_AS, raising=False)
    monkeypatch.setattr(sys, "argv", ["/somewhere/graftlm/__main__.py"])
    assert _program() == "python -m graftlm"
    monkeypatch.setenv(CALLED_AS, "graftlm")
    assert _program() == "graftlm"


def test_more_ranks_than_rows_of_a_step_are_refused_by_name(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["stages.lora.batch_rows=3"])
    with pytest.raises(UserError, match=r"4 ranks would share 3 rows a step \(stages\.lora\.batch_rows\)") as error:
        launch(4, Place(), loaded, [])
    assert "no more ranks than that" in error.value.fix


def test_more_gpus_than_there_are_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus 3: this machine has 2") as error:
        launch(3, Place(), load_recipe(recipe, ["device=auto"]), [])
    assert "at most 2" in error.value.fix


def test_gpus_under_torchrun_are_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="This is rank 1 of 2 already: --gpus would start 2 more for each"):
        launch(2, Place(1, 2, 1, 2), load_recipe(recipe), [])


def test_the_same_command_on_every_machine_says_which_of_them_it_is() -> None:
    assert machines_of(None, None, None, 8) == machines_of(1, 0, None, None) == Machines()
    assert machines_of(2, 1, "first", 8) == Machines(2, 1, "first", 29500)
    assert machines_of(2, 0, "10.0.0.1:1234", 8) == Machines(2, 0, "10.0.0.1", 1234)
    assert machines_of(2, 0, "::1", 8) == Machines(2, 0, "::1", 29500)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((2, None, None, None), "--nodes 2 needs --gpus and --node-rank and --master too"),
        ((2, 0, "first", None), "--nodes 2 needs --gpus too"),
        ((2, 2, "first", 8), "--node-rank 2: of 2 machines the last is 1"),
        ((2, 0, "first:port", 8), "--master first:port is no HOST or HOST:PORT"),
        ((2, 0, "first:0", 8), "--master first:0 is no"),
        ((2, 0, ":29500", 8), "--master :29500 is no"),
        ((None, 1, None, 8), "--node-rank and --master belong to --nodes"),
        ((1, 0, "first", 8), "--node-rank and --master belong to --nodes"),
    ],
)
def test_half_of_a_set_of_machines_is_refused(flags: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        machines_of(*flags)


def test_all_machines_ranks_are_counted_against_rows_and_parts(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["stages.lora.batch_rows=3"])
    with pytest.raises(UserError, match=r"4 ranks would share 3 rows a step"):
        launch(2, Place(), loaded, [], Machines(2, 0, "first"))


def test_a_first_machine_of_no_known_name_is_told_at_once(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"--master no-such-host.invalid: this machine knows no host of that name"):
        launch(1, Place(), load_recipe(recipe), [], Machines(2, 1, "no-such-host.invalid"))


@pytest.mark.parametrize(
    ("number", "problem", "fix"),
    [
        (0, "Not all 2 machines reached this one, the first, at 127.0.0.1:PORT within 1 s", "on every machine"),
        (1, "Machine 1 of 2 (from 0) did not reach the first at 127.0.0.1:PORT within 1 s", "with --node-rank 0"),
    ],
)
def test_a_machine_that_does_not_come_is_told_by_name(
    recipe: Path, tmp_path: Path, number: int, problem: str, fix: str
) -> None:
    """N1, as the launcher sees it: two lines, no dump of torch, no rank started."""
    port = free_port()
    where = ("--nodes", "2", "--node-rank", str(number), "--master", f"127.0.0.1:{port}", "--gpus", "1")
    done = subprocess.run(
        command(recipe, tmp_path / "run", *where, "ranks.join_seconds=1"), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    told = done.stderr.splitlines()
    assert told[0].startswith(problem.replace("PORT", str(port)))
    assert fix in told[1]
    assert len(told) == 2
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_shared_out_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"ranks.shard=hybrid shards within machines .* this is one machine"):
        launch(2, Place(), load_recipe(recipe, ["ranks.shard=hybrid"]), [])
    with pytest.raises(
        UserError, match=r"nf4 cannot be shared out over ranks: take exact, or ranks.shard none or zero2"
    ):
        load_recipe(recipe, ["stages.lora.frozen_base=nf4", "ranks.shard=full"])


def test_deepspeed_that_is_missing_is_told_before_any_process_starts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ranks.shard=zero3 needs DeepSpeed, which is not installed") as error:
        launch(2, Place(), load_recipe(recipe, ["ranks.shard=zero3"]), [])
    assert (error.value.exit_code, "pip install 'graftlm[deepspeed]'" in error.value.fix) == (2, True)
    load_recipe(recipe, ["stages.lora.frozen_base=nf4", "ranks.shard=zero2"])
    with pytest.raises(UserError, match=r"nf4 cannot be shared out over ranks"):
        load_recipe(recipe, ["stages.lora.frozen_base=nf4", "ranks.shard=zero3"])


def failures(**codes: int) -> Any:
    return SimpleNamespace(failures={int(rank[1:]): SimpleNamespace(exitcode=code) for rank, code in codes.items()})


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({"r0": 4}, 4), ({"r0": 130, "r1": 2}, 2), ({"r0": 3, "r1": 3}, 3), ({"r0": 130, "r1": -9}, 130)],
)
def test_the_rank_that_failed_gives_the_exit_code(codes: dict[str, int], expected: int) -> None:
    with pytest.raises(typer.Exit) as left:
        _end(failures(**codes), 2)
    assert left.value.exit_code == expected


def test_a_killed_rank_is_named_with_its_signal() -> None:
    with pytest.raises(RankLost, match="Rank 1 of 2 was ended by SIGKILL") as error:
        _end(failures(r1=-9), 2)
    assert error.value.exit_code == 130
    assert "goes on from the last checkpoint" in error.value.fix


def test_where_files_lie_is_no_other_recipe() -> None:
    assert _without_places({"a": ["/x/rows.jsonl"], "b": 1}) == _without_places({"a": ["/other/rows.jsonl"], "b": 1})


def command(recipe: Path, run: Path, *flags: str) -> list[str]:
    given = [str(recipe), *OVERRIDES, "stages.full.epochs=12", "ranks.timeout_seconds=5", "--out", str(run), *flags]
    return [sys.executable, "-m", "graftlm", "run", *given]


def begun(recipe: Path, run: Path, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(recipe, run, *flags), stdout=subprocess.DEVNULL, stderr=log.open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"},
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the ranks, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return sorted(map(int, children))


def wait_for(log: Path, text: str, metrics: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if text in log.read_text() and metrics.is_file() and len(read_metrics(metrics)) > 3:
            return
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)  # five runs of three processes each; every one of them has its own limit below
def test_gpus_starts_ranks_and_after_a_kill_or_a_hang_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    """R4: through torch's launcher; rank 1 killed, then hanging, then rank 0 killed; the weights are the same."""
    run, log = tmp_path / "run", tmp_path / "log"
    metrics = run / "4-full" / "metrics.jsonl"
    for rank, number, says in (
        (1, signal.SIGKILL, "Rank 1 of 2 is gone"),
        (1, signal.SIGSTOP, "Rank 1 of 2 did not answer for 5 s"),
        (0, signal.SIGKILL, "Rank 0 of 2"),
    ):
        metrics_before = metrics.is_file()
        launcher = begun(recipe, run, log, "--gpus", "2")
        wait_for(log, "continuing after step" if metrics_before else "4-full ...", metrics)
        ids = ranks_of(launcher)
        assert len(ids) == 2
        os.kill(ids[rank], number)
        assert launcher.wait(90) == 130, log.read_text()
        assert says in log.read_text()
        assert "Traceback" not in log.read_text()
        assert not any(Path(f"/proc/{one}").exists() for one in ids)
        if number == signal.SIGSTOP:  # nothing could be learned of it; of the other, where it waited
            assert f"What every thread of each was doing then: {run / 'stacks'}" in log.read_text()
            assert (run / "stacks" / "rank-1.txt").read_text() == SILENT
            assert "in train" in (run / "stacks" / "rank-0.txt").read_text()
    assert begun(recipe, run, log, "--gpus", "2").wait(120) == 0, log.read_text()
    assert "continuing after step" in log.read_text()
    assert begun(recipe, tmp_path / "whole", log, "--gpus", "2").wait(120) == 0, log.read_text()
    again, whole = weights(run), weights(tmp_path / "whole")
    assert again.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


@pytest.mark.slow
def test_the_launcher_asked_to_stop_lets_the_ranks_save(recipe: Path, tmp_path: Path) -> None:
    """R2."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = begun(recipe, run, log, "--gpus", "2")
    wait_for(log, "4-full ...", run / "4-full" / "metrics.jsonl")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(90) == 130, log.read_text()
    assert "saved\nRun the same command again to continue.\n" in log.read_text()


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(recipe: Path, tmp_path: Path) -> None:
    """R4, of the launcher: nobody could stop them any more, and the store they meet in is gone."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = begun(recipe, run, log, "--gpus", "2")
    wait_for(log, "4-full ...", run / "4-full" / "metrics.jsonl")
    ids = ranks_of(launcher)
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{one}").exists() for one in ids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{one}").exists() for one in ids)
    told = log.read_text()
    assert "What started this rank is gone: finishing this step, then saving" in told
    assert "saved\nRun the same command again to continue.\n" in told
    assert "was killed" not in told
    assert begun(recipe, run, log, "--gpus", "2").wait(120) == 0, log.read_text()
    assert "continuing after step" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("is_torchruns", [True, False])
def test_it_is_started_on_two_machines(recipe: Path, tmp_path: Path, is_torchruns: bool) -> None:
    """An agent for each machine, here both on one, by torchrun or by --nodes; rank 0 is the first one's."""

    def agent(node: int, port: int) -> subprocess.Popen[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        where = [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        own = ["--nodes", "2", "--gpus", "1", "--node-rank", str(node), "--master", f"127.0.0.1:{port}"]
        run = tmp_path / "run"
        return subprocess.Popen(
            [*start, *where, *command(recipe, run)[1:]] if is_torchruns else command(recipe, run, *own),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    port = free_port()
    agents = [agent(node, port) for node in (0, 1)]
    told = [one.communicate(timeout=200) for one in agents]
    assert [one.returncode for one in agents] == [0, 0], told
    assert ["report " in out for out, _ in told] == [True, False]
    assert read_json(tmp_path / "run" / "4-full" / "done.json")["num_ranks"] == 2


@pytest.mark.slow
def test_torchrun_may_restart_it_after_a_kill(recipe: Path, tmp_path: Path) -> None:
    """R4: elastic restart from the last checkpoint, without anybody typing."""
    run, log = tmp_path / "run", tmp_path / "log"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    launcher = subprocess.Popen(
        [*start, *command(recipe, run)[1:]], stdout=subprocess.DEVNULL, stderr=log.open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(log, "4-full ...", run / "4-full" / "metrics.jsonl")
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    assert launcher.wait(200) == 0, log.read_text()
    assert "continuing after step" in log.read_text()
    assert weights(run)
