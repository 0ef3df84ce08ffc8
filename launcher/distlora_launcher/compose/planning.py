"""Plan a run before its workers start: decide `plan=auto` and `quant=auto`, refuse what cannot fit, write plan.json.

The plan is calculated (distlora/planner/) from the sizes in config.json and the devices of this node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from distlora.config import ClusterConfig, Config, GpuConfig, ModelSpec, ParallelConfig, TrainConfig, UserError, require
from distlora.config.deepspeed_file import check_deepspeed
from distlora.config.gpus import GPUS, find_gpu
from distlora.config.plan import CHOSEN
from distlora.planner import Plan, plan_of
from distlora.planner.choice.choose import Choice, choose, resolve_quantization
from distlora.planner.choice.search import Search
from distlora.planner.choice.suggest import nearest
from distlora.planner.machine import Machine, machine_of, used_device
from distlora.planner.model import PlannedModel
from distlora.planner.pages.report import lines, needs, verdict
from distlora.planner.pages.tables import largest
from distlora.planner.storage.host import keeps_on_host
from distlora.run_folder.layout import PLAN_NAME, checkpoint_folders
from distlora.system import atomic_io
from distlora.weights.initial_adapter_file import check_ranks
from distlora.weights.prequantized import refuse_dense_settings
from distlora_launcher.compose import this_machine
from distlora_launcher.compose.checks import check_model_sizes
from distlora_launcher.terminal.output import say, warn

_decided: dict[tuple[str, frozenset[str]], Choice] = {}
"""Choices of `decide` by settings without the run folder. A command decides before it hands over to Hydra and again in
each job, and a search takes a third of a second."""


def decide(config: Config, fixed: Collection[str]) -> Choice:
    """Return the settings of a run that is to start. Raises UserError with the nearest fit for what cannot fit."""
    key = repr(dataclasses.replace(config, run_dir="")), frozenset(fixed)
    if key not in _decided:
        _decided[key] = choices(config, fixed)
    choice = _decided[key]
    require_fit(choice.plan)
    plan = dataclasses.replace(choice.plan, config=dataclasses.replace(choice.config, run_dir=config.run_dir))
    return dataclasses.replace(choice, plan=plan)


def choices(config: Config, fixed: Collection[str]) -> Choice:
    """Return the settings with the choices of `plan=auto` and `quant=auto`.

    `fixed`: dotted names that the user has chosen. Raises UserError for settings that a model of these sizes does not
    support, and for plan=auto if GPU memory is unknown.
    """
    model, machine = this_machine.planned_model(config), machine_here(config)
    check_planned(config.spec, config.train, config.parallel, model)
    search = Search(config=config, model=model, machine=machine, fixed=frozenset(fixed))
    if config.plan.mode == "auto":
        launcher = config.cluster.launcher
        where = "this node" if launcher == "local" else f"cluster={launcher}"
        require(
            machine.usable_bytes is not None,
            f"plan=auto chooses by GPU memory, which is unknown for {where}; add gpu=h100, or gpu.memory_gib=80",
        )
        return choose(dataclasses.replace(search, fixed=frozenset({*fixed, *_unavailable(launcher)})))
    if config.quant.method == "auto":
        return resolve_quantization(search)
    return Choice(plan=search.plan(), search=dataclasses.replace(search, fixed=frozenset(CHOSEN)))


def check_planned(spec: ModelSpec, train: TrainConfig, parallel: ParallelConfig, model: PlannedModel) -> None:
    """Raise UserError for settings that `check_model` refuses, of a model whose config.json alone is present."""
    check_model_sizes(parallel, train, model.settings, model.shapes.family)
    if model.settings.get("quantization_config") is not None:
        refuse_dense_settings(spec)
    if spec.adapter.decomposes:
        adapters = (each for block in model.shapes.adapters(spec.adapter) for each in block)
        check_ranks(spec.adapter, {each.path: (each.up[0], each.down[1]) for each in adapters})


def _unavailable(launcher: str) -> Collection[str]:
    """Return the settings that cannot be chosen because this node lacks DeepSpeed."""
    try:
        if launcher == "local":
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
    near = nearest(plan)
    most = f" ({largest(plan.device.by_kind)})" if near.least is None else f"; at the least {needs(near.least)}"
    anyway = "plan.refuse=false" if run_dir is None else f"refuse: false under plan in {run_dir / 'config.yaml'}"
    raise UserError(
        f"this run does not fit {plan.machine.name} by calculation{verdict(plan).removeprefix('NO')}{most}; "
        f"{near}; {anyway} starts it all the same"
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
    other = _other_device(plan.config.gpu, plan.config.cluster) if runs_here else None
    if other is not None:
        warn(f"this is the plan of gpu={plan.config.gpu.name}, but this node has another GPU: {other}")


def _other_device(gpu: GpuConfig, cluster: ClusterConfig) -> str | None:
    """Return the name of the GPU of this node if `gpu=` names another one."""
    if gpu.name not in GPUS:
        return None
    used = used_device(cluster, this_machine.found_here())
    return None if used is None or find_gpu(used[0]) == GPUS[gpu.name] else used[0]
