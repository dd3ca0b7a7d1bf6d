"""A stage that does not fit into memory is told before its first pass, with what would fit."""

from pathlib import Path

import pytest
import torch
from tiny_training import FULL, make_rows, make_stage, tiny_model

from graftlm.errors import UserError
from graftlm.health.plan import PROCESS_BYTES
from graftlm.training import room
from graftlm.training.stage import StageRun


@pytest.mark.parametrize(
    ("room_bytes", "recovery", "told", "is_refused"),
    [
        (PROCESS_BYTES // 2, "automatic", "Nothing smaller fits either: graftlm plan RECIPE", True),
        (PROCESS_BYTES // 2, "off", "Nothing smaller fits either: graftlm plan RECIPE", False),
        (PROCESS_BYTES + 1000, "automatic", "by estimate; 0.6 are there", False),
        (PROCESS_BYTES * 2, "automatic", "", False),
    ],
)
def test_a_stage_too_large_is_refused_and_one_that_hardly_fits_is_warned_of(
    room_bytes: int,
    recovery: str,
    told: str,
    is_refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "memory_here_bytes", lambda device, _: room_bytes)
    stage = make_stage(FULL, recovery=recovery, epochs=0.5, heldout_every=None)
    run = StageRun(tiny_model(), stage, make_rows(), {}, tmp_path, torch.device("cpu"), None)
    if is_refused:
        with pytest.raises(UserError) as refused:
            run.run()
        assert refused.value.problem.startswith("sft, before the first step: At its ")
        assert told in refused.value.fix
        assert not (tmp_path / "preflight.json").exists()
        return
    run.run()
    err = capsys.readouterr().err
    assert told in err
    assert ("GiB" in err) == bool(told)
