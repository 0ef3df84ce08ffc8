"""Plan a run before its workers start: decide `plan=auto` and `quant=auto`, refuse what cannot fit, write plan.json.

All of it is calculated (distlora/planner/), from config.json's sizes and what this machine shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from distlora.config import Config, UserError, require
from distlora.config.deepspeed_file import check_deepspeed
from distlora.config.gpus import GPUS, find_gpu
from distlora.planner import Plan, plan_of
from distlora.planner.choice.choose import Choice, choose, resolve_quantization
from distlora.planner.choice.suggest import nearest
from distlora.planner.machine import Machine, machine_of, used_device
from distlora.planner.model import PlannedModel
from distlora.planner.pages.report import lines, needs, verdict
from distlora.planner.pages.words import largest
from distlora.planner.storage.host import keeps_on_host
from distlora.run_folder.layout import PLAN_NAME, checkpoint_folders
from distlora.system import atomic_io
from distlora.weights.initial_adapter_file import check_ranks
from distlora.weights.prequantized import refuse_dense_settings
from distlora_launcher.compose import this_machine
from distlora_launcher.compose.checks import check_model_sizes
from distlora_launcher.terminal.output import say, warn

_decided: dict[tuple[str, frozenset[str]], Choice] = {}
"""What `decide` found of settings but for their run folder: a command asks before it hands over to Hydra, and again in
each job, and a search takes a third of a second."""


def decide(config: Config, fixed: Collection[str]) -> Choice:
    """Return the settings of a run that is to start. Raises UserError with the nearest fit for what cannot fit."""
    key = repr(dataclasses.replace(config, run_dir="")), frozenset(fixed)
    if key not in _decided:
        _decided[key] = choices(config, fixed)
    choice = _decided[key]
    require_fit(choice.plan)
    return dataclasses.replace(choice, config=dataclasses.replace(choice.config, run_dir=config.run_dir))


def choices(config: Config, fixed: Collection[str]) -> Choice:
    """Return the settings with the choices of `plan=auto` and `quant=auto`.

    `fixed`: dotted names that the user has chosen. Raises UserError for settings that a model of these sizes does not
    support, and for plan=auto if GPU memory is unknown.
    """
    model, machine = this_machine.planned_model(config), machine_here(config)
    check_planned(config, model)
    if config.plan.mode == "auto":
        where = "this machine" if config.cluster.launcher == "local" else f"cluster={config.cluster.launcher}"
        require(
            machine.usable_bytes is not None,
            f"plan=auto chooses by the memory of GPUs, which nothing says of {where}; add gpu=h100, or what you know "
            "of it: gpu.memory_gib=80",
        )
        return choose(config, {*fixed, *_not_to_be_had(config)}, model, machine)
    if config.quant.method == "auto":
        return resolve_quantization(config, model, machine)
    return Choice(config=config, plan=plan_of(config, model, machine), asked=config)


def check_planned(config: Config, model: PlannedModel) -> None:
    """Refuse of a model of which there is config.json alone what `check_model` would."""
    check_model_sizes(config.parallel, config.train, model.settings, model.shapes.family)
    if model.settings.get("quantization_config") is not None:
        refuse_dense_settings(config.spec)
    if config.adapter.decomposes:
        adapters = (each for block in model.shapes.adapters(config.adapter) for each in block)
        check_ranks(config.adapter, {each.path: (each.up[0], each.down[1]) for each in adapters})


def _not_to_be_had(config: Config) -> Collection[str]:
    """Return the settings that cannot be chosen because this node lacks DeepSpeed."""
    try:
        if config.cluster.launcher == "local":
            check_deepspeed()
    except UserError:
        return ("parallel.backend", "parallel.offload_base")
    return ()


def planned(config: Config, *, run_dir: Path | None = None, runs_here: bool = False) -> Plan:
    """Return the plan of decided settings; raises UserError for what cannot fit.

    `runs_here`: True if this node runs it, whatever starts it. `run_dir`: the run folder, if it exists.
    """
    plan = plan_of(config, this_machine.planned_model(config), machine_here(config, runs_here=runs_here))
    require_fit(plan, run_dir=run_dir)
    return plan


def machine_here(config: Config, *, runs_here: bool = False) -> Machine:
    """Return the nodes of a run: by the named GPU, else this node if the run starts here.

    The driver may be slow to wake, so it is queried only if the result depends on it.
    """
    if config.cluster.launcher != "local" and not runs_here:
        return machine_of(config.gpu, config.cluster)
    shards = config.shard_degree(config.cluster.ranks)
    waits = keeps_on_host(config.parallel, config.train.checkpointing, shards) or config.plan.mode == "auto"
    found = this_machine.found_here(asks_driver=config.gpu.name == "auto" or waits)
    return machine_of(config.gpu, config.cluster, found=found)


def require_fit(plan: Plan, *, run_dir: Path | None = None) -> None:
    """Refuse a plan that does not fit, unless plan.refuse=false or the run has saved a checkpoint before.

    A run that has saved something is better evidence than a calculation.
    """
    if plan.fits is not False or not plan.config.plan.refuse or (run_dir is not None and checkpoint_folders(run_dir)):
        return
    found = nearest(plan.config, plan.model, plan.machine)
    most = f" ({largest(plan.device.by_kind)})" if found.least is None else f"; at the least {needs(found.least)}"
    anyway = "plan.refuse=false" if run_dir is None else f"refuse: false under plan in {run_dir / 'config.yaml'}"
    raise UserError(
        f"this run does not fit {plan.machine.name} by calculation{verdict(plan).removeprefix('NO')}{most}; "
        f"{found}; {anyway} starts it all the same"
    )


def say_choice(choice: Choice) -> None:
    """Print the chosen settings with reasons."""
    for change in choice.changes:
        say(f"chosen: {change}")


def keep(run_dir: Path, plan: Plan, *, runs_here: bool = True) -> None:
    """Write RUN/plan.json, which workers compare their memory with, and print the plan.

    Warns if the plan is for another GPU than this node has.
    """
    atomic_io.write_json(run_dir / PLAN_NAME, plan.as_json())
    for line in lines(plan):
        say(line)
    shows = other_device(plan.config) if runs_here else None
    if shows is not None:
        warn(f"this is the plan of gpu={plan.config.gpu.name}, and the run is on what this machine shows: {shows}")


def other_device(config: Config) -> str | None:
    """Return the name of the GPU of this node if `gpu=` names another one."""
    if config.gpu.name not in GPUS:
        return None
    used = used_device(config.cluster, this_machine.found_here())
    return None if used is None or find_gpu(used[0]) == GPUS[config.gpu.name] else used[0]
