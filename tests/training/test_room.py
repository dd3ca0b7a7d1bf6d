"""A stage that does not fit into memory is told before its first pass, with what would fit."""

from pathlib import Path

import pytest
import torch
from tiny_training import FULL, make_rows, make_stage, tiny_model

from graftlm.errors import UserError
from graftlm.health.memory import moments
from graftlm.health.plan import PROCESS_BYTES, size_of
from graftlm.health.sharding import moments_with_zero
from graftlm.model.shapes import shape_of
from graftlm.training import room
from graftlm.training.room import facts_of, wish_of
from graftlm.training.stage import StageRun


@pytest.mark.parametrize(
    ("room_bytes", "recovery", "told", "is_refused"),
    [
        (PROCESS_BYTES // 2, "automatic", "No micro-batch fits. graftlm plan with the same recipe", True),
        (PROCESS_BYTES // 2, "off", "No micro-batch fits. graftlm plan with the same recipe", False),
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
        assert refused.value.problem.startswith("sft, before the first step: It needs ")
        assert told in refused.value.fix
        assert not (tmp_path / "preflight.json").exists()
        return
    run.run()
    err = capsys.readouterr().err
    assert told in err
    assert ("GiB" in err) == bool(told)


def test_of_what_deepspeed_cuts_moments_alone_are_counted_as_cut() -> None:
    stage, name = make_stage(FULL), "Adam's moments fp32"
    shape = shape_of(tiny_model().config.to_dict(), "here")
    size = size_of(wish_of(stage, "here", shape, 8, facts_of(make_rows(), "here")), "fp32", True, 24, False)
    (whole,) = [moment.items for moment in moments(size) if moment.name == "optimizer's step"]
    for num_ranks in (2, 4):
        for are_weights_cut in (False, True):
            found = {moment.name: moment.items for moment in moments_with_zero(size, num_ranks, are_weights_cut)}
            items = found["optimizer's step"]
            assert items[name] == whole[name] // num_ranks
            assert (items["weights fp32"], items["gradients fp32"]) == (whole["weights fp32"], size.gradient_bytes)
            assert items["DeepSpeed's own weights, and gradients twice"] == 3 * whole[name] // 2 // num_ranks
