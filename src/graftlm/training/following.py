"""How a stage comes to every rank: rank 0, which walks the road, hands it out; the others wait for one, and train it.

Owns what is handed over: the stage, its model and its rows, so that a rank needs neither rank 0's disk nor its road.
Does not know how ranks are started (`joining.py`) nor what a stage does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftlm.health.probe import NameOf, no_name
from graftlm.model.causal import causal_of, plain_model
from graftlm.recipe import Stage
from graftlm.text.rows import TokenRows
from graftlm.training.precision import make_precision
from graftlm.training.ranks import Ranks
from graftlm.training.stage import StageRun

ARRAYS = ("ids", "is_target", "offsets", "target_bytes")


def stage_for_all(
    ranks: Ranks,
    model: Any,
    stage: Stage,
    rows: TokenRows,
    heldout: Mapping[str, TokenRows],
    folder: Path,
    device: torch.device,
    first_new_id: int | None,
    name_of: NameOf = no_name,
) -> StageRun:
    """Rank 0's run of a stage, once every other rank has what it needs to train along. Raises UserError, RankLost.

    `precision: auto` means for all what it means on rank 0's device.
    """
    if not ranks.is_alone:
        model = model.float()
        order = {
            "stage": stage.model_copy(update={"precision": make_precision(stage, device).name}).model_dump(mode="json"),
            "config": json.loads(plain_model(model).config.to_json_string(use_diff=False)),
            "first_new_id": first_new_id,
            "folder": str(folder),
            "heldout": list(heldout),
        }
        ranks.call(order)
        _fill(ranks, model)
        for one in (rows, *heldout.values()):
            _send_rows(ranks, one)
    return StageRun(model, stage, rows, dict(heldout), folder, device, first_new_id, name_of, ranks)


def follow(ranks: Ranks, device: torch.device) -> None:
    """Train along, one stage after another, until rank 0 has no more.

    Raises UserError, NumericalStop, Interrupted as rank 0 does, and RankLost.
    """
    while (order := ranks.hear()) is not None:
        model = causal_of(order["config"])
        _fill(ranks, model)
        rows = _rows(ranks)
        heldout = {language: _rows(ranks) for language in order["heldout"]}
        stage, folder = Stage.model_validate(order["stage"]), Path(order["folder"])
        StageRun(model, stage, rows, heldout, folder, device, order["first_new_id"], ranks=ranks).run()


def _fill(ranks: Ranks, model: Any) -> None:
    state = model.state_dict()
    names = ranks.from_first(lambda: list(state))
    assert names == list(state), "the model built from rank 0's config is another one"
    for tensor in state.values():
        assert tensor.is_contiguous()
        ranks.fill_from_first(tensor)


def _send_rows(ranks: Ranks, rows: TokenRows) -> None:
    ranks.tensors_from_first({name: torch.from_numpy(np.array(getattr(rows, name))) for name in ARRAYS})


def _rows(ranks: Ranks) -> TokenRows:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in ranks.tensors_from_first(None).items()}
    return TokenRows(**arrays)
