"""Plan a run before its workers start: decide `plan=auto` and `quant=auto`, refuse what cannot fit, write plan.json.

The plan is calculated (distlora/planner/) from the sizes in config.json and the devices of this node.
"""

import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.architecture.kept_weights import check_nf4_base
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.config import Config, UserError, check_settings, require
from distlora.config.deepspeed_file import check_deepspeed
from distlora.config.plan import GPUS, find_gpu
from distlora.planner import Plan, plan_of
from distlora.planner.choose import Choice, Search, choose, resolve_auto
from distlora.planner.learning_rate import warning_of_rate, with_learning_rate
from distlora.planner.machine import LocalHardware, Machine, machine_of, used_device
from distlora.planner.model import PlannedModel, find_model
from distlora.planner.report import largest, lines, needs, verdict
from distlora.planner.storage import keeps_on_host
from distlora.planner.suggest import nearest
from distlora.planner.workload import Workload
from distlora.run_folder.layout import PLAN_NAME, checkpoint_folders, compiled_before, path_before
from distlora.system import atomic_io, host_memory
from distlora_kernels import processor
from distlora_launcher.compose.checks import check_model_sizes, gpu_count, visible_gpus
from distlora_launcher.compose.compose import Composed
from distlora_launcher.compose.hub import with_small_files
from distlora_launcher.terminal.output import say, warn


def decide(composed: Composed) -> Choice:
    """Return the settings of a run that is to start. Raises UserError with the nearest fit for what cannot fit."""
    choice = choices(composed)
    require_fit(choice.plan)
    config = choice.config
    rate = config.optim.lr or 0.0
    if (line := warning_of_rate(rate, config.adapter, config.train.objective, choice.plan.model)) is not None:
        warn(line)
    return choice


def choices(composed: Composed) -> Choice:
    """Return the settings with the choices of `plan=auto` and `quant=auto`, and the learning rate.

    Raises UserError for settings that a model of these sizes does not support, and for plan=auto if GPU memory is
    unknown.
    """
    model, machine = planned_model(composed.config), machine_here(composed.config)
    config, rate = with_learning_rate(composed.config, model)
    check_planned(config, model)
    search = Search(config=config, model=model, machine=machine, fixed=composed.fixed)
    if config.plan.mode == "auto":
        launcher = config.cluster.launcher
        where = "this node" if launcher == "local" else f"cluster={launcher}"
        require(
            machine.usable_bytes is not None,
            f"plan=auto chooses by GPU memory, which is unknown for {where}; add gpu=h100, or gpu.memory_gib=80",
        )
        if launcher == "local":
            try:
                check_deepspeed()
            except UserError:
                zero3 = ("parallel.backend", "parallel.offload_base")
                search = dataclasses.replace(search, fixed=composed.fixed.union(zero3))
        choice = choose(search)
    else:
        choice = resolve_auto(search)
    check_settings(choice.config)  # quant=auto has become one that other settings may exclude.
    return dataclasses.replace(choice, rate=rate)


def check_planned(config: Config, model: PlannedModel) -> None:
    """Raise UserError for settings that `check_model` refuses, of a model whose config.json alone is present."""
    spec = config.spec
    architecture = model.shapes.architecture
    check_model_sizes(config.parallel, config.quant, config.train, architecture, model.settings)
    if (degree := config.parallel.expert_degree) != 1:
        ranks = config.expert_degree(config.cluster.ranks)
        divides = model.shapes.shards_whole_experts(Workload.of(config).format, ranks)
        require(
            divides is not None,
            f"parallel.expert_degree={degree} has no effect on {model.name}, which has no mixture of experts; leave it "
            "out",
        )
        require(
            bool(divides),
            f"parallel.expert_degree={degree} does not divide the experts of {model.name} and their stored groups of "
            f"16,384 weights alike; set parallel.expert_degree=1, or another parallel.shard_degree",
        )
    require(
        config.parallel.experts == "gathered" or any(kind.experts for kind in architecture.kinds),
        f"parallel.experts={config.parallel.experts} has no effect on {model.name}, which has no mixture of experts; "
        "leave it out",
    )
    if quantization_method(model.settings, model.name) == BNB_NF4:
        check_nf4_base(spec)
    if spec.quant.method == "keep" and model.why_not_kept is not None:
        raise UserError(model.why_not_kept)
    if spec.adapter.method == "full":
        return
    adapters = [adapter for block in model.shapes.adapters(spec.adapter) for adapter in block]
    require(
        config.optim.name != "muon" or any(".experts." not in adapter.path for adapter in adapters),
        "optim=muon updates the adapters of linears, and only experts have adapters, which AdamW updates; set "
        "optim=adamw",
    )
    for adapter in adapters if spec.adapter.decomposes else ():
        rank, shape = spec.adapter.rank_of(adapter.path), (adapter.up[0], adapter.down[1])
        require(
            rank <= min(shape),
            f"adapter.init={spec.adapter.init} needs {rank} singular values of {adapter.path}, which has {min(shape)} "
            f"(its weight is {shape[0]} x {shape[1]}); set adapter.r={min(shape)} or less"
            f"{', or its entry in adapter.rank_pattern' if spec.adapter.rank_pattern else ''}",
        )


def planned(config: Config, *, run_dir: Path | None = None, runs_here: bool = False) -> Plan:
    """Return the plan of decided settings; raises UserError for what cannot fit.

    `runs_here`: True if this node runs it, whatever starts it. `run_dir`: the run folder, if it exists.
    """
    compiles = None if run_dir is None else compiled_before(run_dir)
    path = None if run_dir is None else path_before(run_dir)
    processor.use(path if path is not None and processor.is_supported(path) else None)
    if config.train.compile == "auto" and compiles is not None:
        config = config.with_settings({"train.compile": compiles})
    model = planned_model(config)
    if run_dir is not None and config.parallel.expert_degree == "replica":  # A resume may be on other ranks.
        ranks = config.expert_degree(config.cluster.ranks)
        if not model.shapes.shards_whole_experts(Workload.of(config).format, ranks):
            config = config.with_settings({"parallel.expert_degree": 1})
    plan = plan_of(config, model, machine_here(config, runs_here=runs_here))
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
    waits |= config.quant.dense_layers == "auto"
    hardware = found_here(asks_driver=config.gpu.name == "auto" or waits)
    return machine_of(config.gpu, config.cluster, found=hardware)


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
    gpu = GPUS.get(plan.config.gpu.name)
    used = used_device(plan.config.cluster, found_here()) if runs_here and gpu is not None else None
    if used is not None and find_gpu(used[0]) != gpu:
        warn(f"this is the plan of gpu={plan.config.gpu.name}, but this node has another GPU: {used[0]}")


SECONDS = 20.0
"""nvidia-smi is waited for so long: it wakes GPUs, which takes several where no process keeps them awake."""


def found_here(*, asks_driver: bool = True) -> LocalHardware:
    """Return the GPUs that processes of this shell may use, and host memory.

    GPUs are left out if `asks_driver` is false.
    """
    return LocalHardware(
        devices=devices() if asks_driver else (),
        host_bytes=host_memory.available_bytes(),
    )


@functools.cache
def devices() -> tuple[tuple[str, int], ...] | None:
    """Return (name, bytes of memory) of each GPU that processes may use, by nvidia-smi, in CUDA's order.

    If CUDA numbers the fastest first and the GPUs differ, the largest come first, as many as may be used. Returns None
    if there are GPUs that nvidia-smi does not describe, and for MIG slices.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = None if visible is None else visible_gpus(visible)
    if words == []:
        return ()
    gpus = _query_gpus()
    if not gpus:
        return None if gpu_count() else ()
    used = _visible(gpus, words)
    if used is None or any(gpu.memory is None or gpu.is_sliced for gpu in used):
        return None
    return tuple((gpu.name, gpu.memory) for gpu in used if gpu.memory is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gpu:
    """A GPU, as nvidia-smi has it."""

    name: str
    uuid: str
    memory: int | None
    """Bytes; None of one that has the host's."""
    is_sliced: bool


def _query_gpus() -> list[_Gpu] | None:
    """Return the GPUs of this node in bus order; None if nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.total,uuid,mig.mode.current", "--format=csv,noheader,nounits"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[field.strip() for field in line.rsplit(",", 3)] for line in finished.stdout.splitlines()]
    if finished.returncode != 0 or any(len(row) != 4 for row in rows):
        return None
    return [
        _Gpu(name=name, uuid=uuid, memory=int(mib) * 2**20 if mib.isdecimal() else None, is_sliced=mig == "Enabled")
        for name, mib, uuid, mig in rows
    ]


def _visible(gpus: Sequence[_Gpu], words: Sequence[str] | None) -> Sequence[_Gpu] | None:
    """Return the GPUs in CUDA_VISIBLE_DEVICES (None: all), in the order of `devices`; None if one is missing."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({(c.name, c.memory) for c in gpus}) == 1
    numbered = gpus if by_bus else sorted(gpus, key=lambda gpu: -(gpu.memory or 0))
    if words is None:
        return numbered
    if not by_bus and all(word.isdecimal() for word in words):  # Any of the GPUs may have these numbers.
        return numbered[: len(words)] if len(words) <= len(gpus) else None
    matches = [
        [gpu for number, gpu in enumerate(gpus) if gpu.uuid.startswith(word) or (by_bus and word == str(number))]
        for word in words
    ]
    return [each[0] for each in matches] if all(len(each) == 1 for each in matches) else None


def planned_model(config: Config, *, any_length: bool = False) -> PlannedModel:
    """Return the model of a config from its folder, the hub's cache, the built-in sizes, or the hub.

    From the hub only small files are downloaded. Raises UserError for a model that cannot be trained, and unless
    `any_length` for sequences longer than its positions.
    """
    return find_model(config, cache=hub_cache(), preview=with_small_files, any_length=any_length)


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder without importing it, which takes longer than a plan.

    By huggingface_hub.constants 1.x.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser()
