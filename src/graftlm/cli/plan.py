"""The verb that tells before anything runs whether a recipe fits a device, and how long it takes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import AsJson, RunOut
from graftlm.cli.show import plain, show
from graftlm.errors import UserError

if TYPE_CHECKING:
    from graftlm.health.devices import Device
    from graftlm.health.finding import Finding
    from graftlm.health.plan import StagePlan, StageWish
    from graftlm.health.sharding import Share
    from graftlm.recipe import Recipe

WIDTH = 110


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; recipes/ holds examples.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Knobs of the recipe to change.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100-80, a100-40, v100-32, v100-16, t4, l4, 4090, 3090, 2080ti or cpu; "
            "what is found here if not given."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices in each machine.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    network: Annotated[float | None, typer.Option(help="GB a second that a machine sends to others (50).")] = None,
    failures: Annotated[float | None, typer.Option(help="Failures of one GPU in a day (0.00047).")] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(help="What a step waits for a checkpoint (by its size, at 10 GB a second).")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between (what loses least).")] = None,
    tokens: Annotated[float | None, typer.Option(help="Plan for so many tokens of rows such as these: 1e12.")] = None,
    out: RunOut = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a recipe fits a device, with which micro-batch, how long it takes, and what will not work there.

    Nothing is made or trained. What the run's folder holds already (tokenised rows) is used; the rest is estimated and
    called so. For several GPUs it predicts what communication, checkpoints and failures take, and where that breaks.

    Example: graftlm plan recipes/llama2-7b-chinese.yaml --on h200 --gpus 8 --nodes 16 stages.full.batch_rows=1024
    """
    from graftlm.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from graftlm.cli.plan_cluster import cluster_of, cluster_result, cluster_told
    from graftlm.health.hazards import hazards_of
    from graftlm.health.plan import plan_stage
    from graftlm.health.sharding import WHOLE
    from graftlm.plan_inputs import wishes_of, with_tokens

    device, num_devices = _device(loaded, on), gpus * nodes
    cluster = cluster_of(device, gpus, nodes, network, failures, checkpoint_seconds, checkpoint_every)
    wishes, told = wishes_of(loaded, out or Path("runs") / loaded.name)
    wishes = [with_tokens(wish, tokens) for wish in wishes] if tokens is not None else wishes
    if not device.is_cpu:
        _check_shares(wishes, num_devices)
    share = WHOLE if device.is_cpu else _share(loaded, gpus, nodes)
    plans = [plan_stage(wish, device, num_devices, share) for wish in wishes]
    predicted = None if cluster is None else cluster_result(plans, device, cluster)
    found = _result(loaded, device, num_devices, plans, hazards_of(plans, device, num_devices), told, predicted)
    if as_json:
        show(found, True)
    else:
        lines = [*_told(found), *(cluster_told(predicted) if predicted else ()), *_next(found, recipe)]
        print("\n".join(map(plain, lines)))


def _share(recipe: Recipe, gpus: int, nodes: int) -> Share:
    """How stages lie on so many devices. Raises UserError where ranks.shard asks for what cannot be."""
    from graftlm.health.sharding import WHOLE, Share
    from graftlm.training.joining import refuse_uneven_machines
    from graftlm.training.place import Place

    shard, num_devices = recipe.ranks.shard, gpus * nodes
    if shard == "hybrid":
        refuse_uneven_machines(Place(0, num_devices, 0, gpus))
        return Share("layers", gpus)
    if shard == "none" or num_devices == 1:
        return WHOLE
    return Share("layers" if shard == "full" else shard, num_devices)


def _check_shares(wishes: Sequence[StageWish], num_devices: int) -> None:
    """Raises UserError where a step has fewer rows than there are devices to share them."""
    wish = min(wishes, key=lambda wish: wish.batch_rows)
    if wish.batch_rows < num_devices:
        raise UserError(
            f"{num_devices} devices would share {wish.batch_rows} rows a step ({wish.place}.batch_rows).",
            f"Plan for at most {wish.batch_rows} devices, or with {wish.place}.batch_rows={num_devices}.",
        )


def _device(recipe: Recipe, on: str | None) -> Device:
    """The device asked for, or the one a run would take here."""
    import torch

    from graftlm.health.devices import device_here, find_device

    if on is not None:
        return find_device(on, device_here(torch.device("cpu")))
    is_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    return device_here(torch.device("cpu" if is_cpu else "cuda"))


def _result(
    recipe: Recipe, device: Device, num_devices: int, plans: list[StagePlan], hazards: list[Finding],
    told: Sequence[str], cluster: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    from graftlm.health.disk import disk_gib, host_gib
    from graftlm.health.memory import GIB

    worst = max(plans, key=lambda plan: plan.peak_bytes)
    budgets = [plan.micro_batch_tokens for plan in plans]
    alone = [plan.hours.hours for plan in plans]
    hours = None if None in [*alone, *budgets] else sum(filter(None, alone))
    assumptions = [*told, *(line for plan in plans for line in plan.hours.assumptions)]
    return {
        "recipe": recipe.name,
        "device": {"name": device.name, "title": device.title, "memory_gib": device.memory_bytes / GIB},
        "num_devices": num_devices,
        "share": plans[0].share.way,
        "num_parts": plans[0].share.num_parts,
        "num_parameters": plans[-1].size.shape.num_parameters,
        "num_rows": plans[-1].size.shape.num_rows,
        "fits": all(plan.runs_as_it_is for plan in plans),
        "fits_when_changed": None not in budgets,
        "peak_gib": worst.peak_bytes / GIB,
        "items": {name: num_bytes / GIB for name, num_bytes in worst.items.items()},
        "micro_batch_tokens": None if None in budgets else min(filter(None, budgets)),
        "hours": hours if cluster is None else cluster["hours"],
        "sharded": _sharded(plans),
        "changes": [line for plan in plans for line in plan.changes],
        "stages": [_stage(plan) for plan in plans],
        "disk_gib": disk_gib(plans, recipe.export.dtype, 4 if recipe.base.scratch else 2),
        "host_gib": None if device.is_cpu else host_gib(plans),
        "hazards": [
            {name: getattr(hazard, name) for name in ("cause", "severity", "where", "evidence", "cure")}
            for hazard in hazards
        ],
        "assumptions": list(dict.fromkeys(assumptions)),
        "cluster": cluster,
    }


def _sharded(plans: list[StagePlan]) -> dict[str, Any] | None:
    """All stages with weights, gradients and moments shared out too (ranks.shard=full): a prediction."""
    parts = [plan.sharded for plan in plans if plan.sharded is not None]
    if not parts:
        return None
    return {
        "num_devices": parts[0].num_devices, "is_prediction": True, "peak_gib": max(part.peak_gib for part in parts),
        "fits": all(part.micro_batch_tokens is not None for part in parts),
    }  # fmt: skip


def _stage(plan: StagePlan) -> dict[str, Any]:
    from graftlm.health.memory import GIB

    sharded = plan.sharded
    return {
        "name": plan.wish.name,
        "trains": plan.wish.learns.kind,
        "num_learning_parameters": plan.size.learning_parameters,
        "precision": plan.precision,
        "fits": plan.runs_as_it_is,
        "peak_gib": plan.peak_bytes / GIB,
        "peak_at": plan.moment,
        "items": {name: num_bytes / GIB for name, num_bytes in plan.items.items()},
        "given": {
            "precision": plan.wish.precision,
            "micro_batch_tokens": plan.wish.micro_batch_tokens,
            "gradient_checkpointing": plan.wish.gradient_checkpointing,
        },
        "micro_batch_tokens": plan.micro_batch_tokens,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "holds_step": plan.holds_step,
        "num_steps": plan.hours.num_steps,
        "num_tokens": round(plan.hours.num_tokens),
        "gigaflops_per_token": plan.hours.gigaflops_per_token,
        "petaflops": plan.hours.petaflops,
        "tokens_per_second": plan.hours.tokens_per_second,
        "hours": plan.hours.hours,
        "changes": plan.changes,
        "sharded": None
        if sharded is None
        else {
            "num_devices": sharded.num_devices, "peak_gib": sharded.peak_gib,
            "micro_batch_tokens": sharded.micro_batch_tokens,
            "gradient_checkpointing": sharded.gradient_checkpointing, "holds_step": sharded.holds_step,
            "is_prediction": True,
        },
    }  # fmt: skip


def _told(found: dict[str, Any]) -> Iterator[str]:
    """The plan for a person."""
    from graftlm.run import duration

    device = found["device"]
    verdict = (
        "fits as it is" if found["fits"] else "fits when changed" if found["fits_when_changed"] else "does not fit"
    )
    where = "one" if found["num_parts"] == 1 else f"each of {found['num_devices']}"
    if not found["fits_when_changed"] and found["sharded"] is not None and found["sharded"]["fits"]:
        verdict += f"; shared out over {found['num_devices']} (ranks.shard=full) it does, predicted"
    yield f"{found['recipe']} on {where} {device['title']} ({device['memory_gib']:.1f} GiB): {verdict}"
    yield f"  parameters    {found['num_parameters']:,} with {found['num_rows']:,} rows"
    if found["cluster"] is None and found["hours"] is not None:
        changed = ", with the changes below" if found["changes"] else ""
        yield f"  training      {duration(found['hours'] * 3600)}{changed} (computed, not timed: see what is assumed)"
    disk = found["disk_gib"]
    kept = f"a checkpoint {disk['a checkpoint']:.1f} GiB, finished model {disk['finished model']:.1f} GiB"
    yield f"  disk          {disk['at most']:.1f} GiB at most; {kept}"
    if found["host_gib"] is not None:
        yield f"  host memory   {found['host_gib']:.1f} GiB to load the model and to save checkpoints"
    for stage in found["stages"]:
        yield ""
        yield from _told_stage(stage, duration, device["memory_gib"], is_alone=found["cluster"] is None)
    if found["hazards"]:
        yield from ("", "To know before")
        for hazard in found["hazards"]:
            yield from _wrapped(f"{hazard['severity']}: {hazard['evidence']} {hazard['cure']}")
    yield from ("", "Assumed")
    for line in found["assumptions"]:
        yield from _wrapped(line)


def _next(found: dict[str, Any], recipe: Path) -> Iterator[str]:
    """The command that follows."""
    if found["changes"] and found["fits_when_changed"]:
        yield ""
        yield f"Try     graftlm run {recipe} {' '.join(found['changes'])}"


def _told_stage(
    stage: dict[str, Any], duration: Callable[[float], str], memory_gib: float, *, is_alone: bool
) -> Iterator[str]:
    refused = "does not fit as it is" if stage["peak_gib"] > memory_gib else "does not run as it is (see below)"
    verdict = "fits" if stage["fits"] else refused
    asked, planned = stage["given"]["precision"], stage["precision"]
    precision = planned if asked in ("auto", planned) else f"{asked} asked, planned in {planned}"
    title = f"{stage['name']} ({stage['trains']}, {precision})"
    yield f"{title}: {verdict}, {stage['peak_gib']:.2f} GiB at its peak ({stage['peak_at']})"
    for name, gib in sorted(stage["items"].items(), key=lambda item: -item[1]):
        if gib >= 0.005:
            yield f"  {name:<30}{gib:>9.2f} GiB"
    yield f"  micro-batch   {_setting(stage['given'])} in the recipe"
    yield f"                {_most(stage)}"
    if is_alone and stage["hours"] is not None and stage["micro_batch_tokens"] is not None:
        speed = f"{stage['tokens_per_second']:,.0f} tokens a second"
        changed = f" with {' '.join(stage['changes'])}" if stage["changes"] else ""
        yield f"  time          {duration(stage['hours'] * 3600)}{changed}: {stage['num_steps']:,} steps, {speed}"
    work = f"{stage['petaflops']:,.4g} PFLOP, {stage['gigaflops_per_token']:.4g} GFLOP a token"
    yield f"  work          {work} of {stage['num_tokens']:,}"
    sharded = stage["sharded"]
    if sharded is not None:
        needed = f"over {sharded['num_devices']}: {sharded['peak_gib']:.1f} GiB each"
        yield f"  sharded       predicted, {needed}; {_most(sharded)}"


def _most(found: dict[str, Any]) -> str:
    """The largest micro-batch that fits, in words."""
    if found["micro_batch_tokens"] is None:
        return "not even one row fits"
    if found["holds_step"]:
        return f"at most a whole step in one{_twice(found)}"
    kept = "" if found["gradient_checkpointing"] else ", activations kept"
    return f"{_setting(found)} at most{kept}"


def _setting(found: dict[str, Any]) -> str:
    return f"{found['micro_batch_tokens']:,} tokens{_twice(found)}"


def _twice(found: dict[str, Any]) -> str:
    return " (activations computed twice)" if found["gradient_checkpointing"] else ""


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
