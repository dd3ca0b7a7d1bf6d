"""A rank killed, hanging, failing or missing: every other ends within a bounded time and says why; nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import ended, environment, on_ranks, started
from rank_stage import AT, CPU, PATIENCE, run_of, whole

from graftlm.errors import DiskError, NumericalStop, RankLost, UserError
from graftlm.training.checkpoint import load_checkpoint, newest_checkpoint
from graftlm.training.following import follow
from graftlm.training.joining import joined
from graftlm.training.place import Place, place_here
from graftlm.training.ranks import ALONE, Ranks, error_of, told_of
from graftlm.training.stacks import SILENT, keep_stacks, own_stacks, stacks_told


def killed(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(ranks: Ranks) -> None:
    time.sleep(600)


def standing_still(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def full_disk(ranks: Ranks) -> None:
    raise DiskError("The disk is full.", "Free space.")


def broken(ranks: Ranks) -> None:
    raise ZeroDivisionError("of ours")


def with_fault(fault: Any, rank: int, folder: Path) -> None:
    """Train as this rank until `rank` meets the fault after step `AT`; errors are told as the command line does."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, PATIENCE, 30.0) as ranks:
            run = run_of(ranks, folder)
            record = run._record

            def fail(step_record: Any) -> None:
                record(step_record)
                if step_record.step == AT and ranks.rank == rank:
                    fault(ranks)

            run._record = fail  # type: ignore[method-assign]
            run.run()
    except UserError as error:
        if ranks.speaks:
            print(f"{error.problem}\n{error.fix}", file=sys.stderr)
            keep_stacks(folder, ranks.stacks)
        sys.exit(error.exit_code)


FAULTS = [
    # fault, its rank, seconds the others may take, exit code of the others, what they say
    (killed, 1, 20, 130, "Rank 1 of 2 is gone"),
    (killed, 0, 20, 130, "Rank 0 of 2"),
    (hanging, 1, 20, 130, f"Rank 1 of 2 did not answer for {PATIENCE:g} s"),
    (standing_still, 0, 20, 130, f"Rank 0 of 2 did not answer for {PATIENCE:g} s"),
    (full_disk, 0, 20, 4, "The disk is full."),
    (full_disk, 1, 20, 4, "Rank 1: The disk is full."),
    pytest.param(broken, 1, 20, 1, "Rank 1: ZeroDivisionError: of ours", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fault", "rank", "seconds", "code", "says"), FAULTS)
def test_a_rank_that_fails_ends_all_and_the_run_goes_on(
    tmp_path: Path, fault: Any, rank: int, seconds: float, code: int, says: str
) -> None:
    """R4: no hang, one clear line, whole checkpoints only; the same again ends with the uninterrupted run's weights."""
    processes = started(2, with_fault, fault, rank, tmp_path / "run", folder=tmp_path)
    other = 1 - rank
    try:
        codes = ended({other: processes[other]}, seconds)
    except AssertionError:
        processes[rank].kill()
        raise
    if fault in (hanging, standing_still):
        processes[rank].kill()
    codes |= ended({rank: processes[rank]}, 20)
    told = "".join((tmp_path / f"{one}.err").read_text() for one in (0, 1))
    assert codes[other] == code, told
    assert codes[rank] == (-signal.SIGKILL if fault in (killed, hanging, standing_still) else code), told
    assert told.count(says) == 1, told
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    # Rank 0 writes beside the training: struck down, it may leave the newest half written, never the one before.
    is_struck_down = codes[0] == -signal.SIGKILL
    assert load_checkpoint(newest).values["step"] in ({AT - 1, AT - 3} if is_struck_down else {AT - 1})
    assert all(folder.name.startswith("step-") or is_struck_down for folder in checkpoints.iterdir())
    if fault is hanging:  # the place is told, of both: where the one sleeps, and where the other waits
        stacks = {one: (tmp_path / "run" / "stacks" / f"rank-{one}.txt").read_text() for one in (0, 1)}
        assert "in hanging" in stacks[1]
        assert "in _why_broken" in stacks[0]
    if fault is killed and rank == 1:
        again = on_ranks(2, whole, tmp_path / "run", folder=tmp_path / "again")
        assert again == on_ranks(2, whole, tmp_path / "uninterrupted", folder=tmp_path / "whole")


def at_odds(folder: Path) -> None:
    """Each waits for something else of the other; rank 1 a little longer already."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, PATIENCE, 30.0, "full") as ranks, ranks.passes_answered():
            time.sleep(2.0 if ranks.is_first else 0.0)
            dist.recv(torch.zeros(1), src=1 - ranks.rank)
    except UserError as error:
        if ranks.speaks:
            print(f"{error.problem}\n{error.fix}", file=sys.stderr)
            keep_stacks(folder, ranks.stacks)
        sys.exit(error.exit_code)


def test_ranks_that_wait_for_one_another_are_told_to_hang(tmp_path: Path) -> None:
    """R4: no word of a killed rank, and the stacks of both, though rank 0 sees a broken wire and no time run out."""
    (tmp_path / "run").mkdir()
    processes = started(2, at_odds, tmp_path / "run", folder=tmp_path)
    assert ended(processes, 40) == {0: 130, 1: 130}
    told = "".join((tmp_path / f"{one}.err").read_text() for one in (0, 1))
    assert told.count(f"A rank of 2 did not answer for {PATIENCE:g} s: it hangs") == 1, told
    assert "is gone" not in told
    for rank in (0, 1):
        assert "at_odds" in (tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text()


def not_looking(folder: Path) -> None:
    """Of three ranks one is killed; of the others one finds out at once, and one waits for it alone."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, 20.0, 30.0, "full") as ranks, ranks.passes_answered():
            if ranks.rank == 2:
                time.sleep(1.0)
                os.kill(os.getpid(), signal.SIGKILL)
            dist.recv(torch.zeros(1), src=1 + ranks.rank)
    except UserError as error:
        print(error.problem, file=sys.stderr)
        sys.exit(error.exit_code)


def test_a_rank_that_has_not_seen_the_loss_yet_is_not_called_lost(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1, which tells of rank 2 alone."""
    processes = started(3, not_looking, tmp_path, folder=tmp_path)
    assert ended(processes, 40) == {0: 130, 1: 130, 2: -signal.SIGKILL}
    for rank in (0, 1):
        assert "Rank 2 of 3 is gone" in (tmp_path / f"{rank}.err").read_text()


def silent_first(patience: float) -> None:
    """Rank 0 stops dead before it has anything for the others to do."""
    ranks: Any = None
    try:
        with joined(place_here(), {}, CPU, patience, 30.0) as ranks:
            if ranks.is_first:
                time.sleep(1.5)
                os.kill(os.getpid(), signal.SIGSTOP)
            follow(ranks, CPU)
    except RankLost as error:
        print(error.problem, file=sys.stderr)
        sys.exit(error.exit_code)


def test_who_waits_for_work_waits_as_long_as_rank_0_shows_life(tmp_path: Path) -> None:
    processes = started(2, silent_first, 0.5, folder=tmp_path)
    try:
        assert ended({1: processes[1]}, 30) == {1: 130}
    finally:
        processes[0].kill()
        ended({0: processes[0]})
    assert "Rank 0 of 2 did not answer" in (tmp_path / "1.err").read_text()


def asked_to_stop(ranks: Ranks, folder: Path) -> int:
    """One rank alone gets the signal."""
    run = run_of(ranks, folder)
    record = run._record

    def ask(step_record: Any) -> None:
        record(step_record)
        if step_record.step == AT and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run._record = ask  # type: ignore[method-assign]
    with pytest.raises(Exception, match=f"stopped after step {AT} of"):
        run.run()
    return run.step


def test_one_rank_asked_to_stop_stops_all_at_one_step(tmp_path: Path) -> None:
    """R2: rank 0 saves, though another got the signal."""
    assert on_ranks(2, asked_to_stop, tmp_path / "run", folder=tmp_path) == [AT, AT]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert load_checkpoint(newest).values["step"] == AT


def meet(recipe: dict[int, Any], join_seconds: float) -> None:
    try:
        with joined(place_here(), recipe[place_here().rank], CPU, PATIENCE, join_seconds):
            pass
    except UserError as error:
        print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


def test_a_rank_that_does_not_come_is_missed_by_name(tmp_path: Path) -> None:
    assert ended(started(3, meet, {0: {}, 2: {}}, 2.0, folder=tmp_path, only={0, 2}), 30) == {0: 2, 2: 2}
    assert "Rank 1 of 3 did not come within 2 s." in (tmp_path / "0.err").read_text()


def test_a_missing_rank_0_is_told_with_its_address(tmp_path: Path) -> None:
    assert ended(started(2, meet, {1: {}}, 2.0, folder=tmp_path, only={1}), 30) == {1: 2}
    assert "Rank 1 of 2 did not reach rank 0 at 127.0.0.1:" in (tmp_path / "1.err").read_text()


def test_ranks_with_another_recipe_are_refused(tmp_path: Path) -> None:
    recipes = {
        rank: {"seed": 1, "stages": [{"name": "a", "epochs": 1}, {"name": "b", "trains": {"rank": 4 + rank}}]}
        for rank in (0, 1)
    }
    assert ended(started(2, meet, recipes, 20.0, folder=tmp_path), 30) == {0: 2, 1: 2}
    assert (
        "Rank 1 has another recipe than rank 0; what differs: stages.b.trains.rank." in (tmp_path / "0.err").read_text()
    )


def of_another_version(recipe: dict[int, Any]) -> None:
    if place_here().rank == 1:
        from graftlm.training import joining

        joining.__version__ = "0.0.9"
    meet(recipe, 20.0)


def test_ranks_of_another_version_are_refused(tmp_path: Path) -> None:
    assert ended(started(2, of_another_version, {0: {}, 1: {}}, folder=tmp_path), 30) == {0: 2, 1: 2}
    assert "Rank 1 runs graftlm 0.0.9, rank 0 0.1.0." in (tmp_path / "0.err").read_text()


def test_half_an_environment_is_refused() -> None:
    assert place_here({}) == place_here({"WORLD_SIZE": "1"}) == Place(0, 1, 0, 1)
    assert place_here(environment(1, 2, 29500)) == Place(1, 2, 1, 2)
    with pytest.raises(UserError, match="WORLD_SIZE is set and RANK, MASTER_ADDR is not"):
        place_here({"WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with pytest.raises(UserError, match="names no rank: RANK=2, WORLD_SIZE=2"):
        place_here(environment(2, 2, 1))


def test_an_error_is_of_its_kind_on_another_rank() -> None:
    for error in (NumericalStop("a", "b"), DiskError("a", "b"), UserError("a", "b"), RankLost("a", "b")):
        again = error_of(told_of(error))
        assert (type(again), again.problem, again.exit_code) == (type(error), "a", error.exit_code)


def test_alone_nothing_is_said() -> None:
    """No process group, no store: the identity."""
    assert ALONE.total(1.5, 2) == [1.5, 2]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.from_first(lambda: 3) == 3
    assert ALONE.any(True)
    assert not torch.distributed.is_initialized()


def test_stacks_of_all_are_kept_and_who_is_silent_is_told(tmp_path: Path) -> None:
    """Below the run's folder, or where there is none on this machine, in a scratch one; a full disk hides no error."""
    store = torch.distributed.HashStore()
    store.set("stacks/1", own_stacks())
    stacks = stacks_told(store, 2)
    assert stacks[0] == SILENT
    assert "test_stacks_of_all_are_kept_and_who_is_silent_is_told" in stacks[1]
    assert keep_stacks(tmp_path, stacks) == tmp_path / "stacks"
    assert (tmp_path / "stacks" / "rank-0.txt").read_text() == SILENT
    elsewhere = keep_stacks(tmp_path / "none", stacks)
    assert elsewhere is not None
    assert not elsewhere.is_relative_to(tmp_path)
    assert (elsewhere / "rank-1.txt").read_text() == stacks[1]
    shutil.rmtree(elsewhere)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "stacks").write_text("a file")
    assert keep_stacks(tmp_path / "file", stacks) is None
