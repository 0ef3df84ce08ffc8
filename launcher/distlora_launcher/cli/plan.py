"""Show the needs of a run before it starts, for any model on any GPUs (`distlora plan`).

Nothing is started, and nothing is downloaded but the config.json of a model that is neither local nor known.
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import ModelConfig, UserError, nearest, require
from distlora.config.base import is_hub_name
from distlora.config.plan import GPUS
from distlora.planner import Plan, suggest
from distlora.planner.choose import Search, SettingChange, choose, typed
from distlora.planner.machine import machine_of
from distlora.planner.report import (
    assumptions,
    leverage_table,
    machines_of,
    matrix,
    page,
    plot_memory,
    plot_scaling,
    scaling_tables,
    settings,
)
from distlora.planner.speed.scaling import FABRICS, Scaling, scaling
from distlora.planner.suggest import Fitting, LargerRun, MultiTrialPlan, Nearest, larger_runs
from distlora.system.exit_codes import DONE
from distlora.training.multi_trial.protocol import check_pack
from distlora_launcher.compose.checks import check_parallel, check_writable
from distlora_launcher.compose.compose import UNSET, compose_run, expand_home
from distlora_launcher.compose.overrides import known_models
from distlora_launcher.compose.planning import check_planned, choices, planned_model
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.studies.multi_trial import compose_for_plan, plan_together
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import shown, warn

PROGRAM = "distlora plan"
REPORT_FROM = 20
"""Number of plans in a table from which progress is reported."""
MODELS = (
    "mistral_7b",
    "llama3_8b",
    "phi4_14b",
    "gemma3_27b",
    "qwen25_32b",
    "mixtral_8x7b",
    "llama_65b",
    "llama2_70b",
    "llama3_70b",
    "gpt_oss_120b",
    "qwen3_235b_a22b",
    "llama3_405b",
)
MACHINES = ("rtx4090", "rtx3090x2", "rtx5090x2", "a10x4", "l40sx4", "a100_80gbx8", "h100x8", "b200x8")
"""Default nodes of --table."""
GPUS_PER_NODE = 8
"""GPUs per node of a plan on more GPUs than that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArguments:
    """Predict what a run needs, from the sizes of the model.

    Prints GPU memory by category, host memory, disk, network traffic, FLOPs and time. If the run does not fit, it
    prints settings that do. Needs no GPU and downloads no weights.

    Examples:
      distlora plan model=llama3_8b gpu=rtx4090
      distlora plan model=llama3_70b gpu=h100 cluster.gpus_per_node=8 plan=auto
      distlora plan mine.yaml gpu=l40s

    settings:
      model=NAME         one of the models below; or model.path=FOLDER, or model.path=ORG/NAME on the hub
      gpu=NAME           one of the GPUs below, or its data: gpu.memory_gib=80 gpu.tflops=989 (default: this node)
      FILE.yaml          settings from a file, as `distlora train` reads it
      setting=value      any setting of `distlora train`, including recipe=NAME. cluster.gpus_per_node=8: GPUs per
                         node. plan=auto: choose the fastest settings that fit. quant=auto: 16 bits if they fit and
                         are not much slower. sweep.packed=4 or auto: that many trials trained together on one base
    """

    settings: list[str] = field(default_factory=list)
    """FILE.yaml|setting=value: settings of `distlora train`, as above."""
    table: bool = False
    """Print a Markdown table of many models on many nodes, each with the fastest settings that fit."""
    models: tuple[str, ...] | None = None
    """NAME,...: models of --table (default: listed below)."""
    gpus: tuple[str, ...] | None = None
    """NAMExNUMBER,...: nodes of --table, such as h100x8 (default: listed below)."""
    scaling: bool = False
    """Plan the run on 1 to 1,024 GPUs, with a fixed batch per GPU: tokens/s and the bottleneck of a step."""
    strong: bool = False
    """With --scaling: a fixed global batch (strong scaling)."""
    fabrics: bool = False
    """With --scaling: compare common network links too."""
    assumptions: bool = False
    """Print the assumptions of the time estimate; with --scaling the effect of each."""
    json: bool = False
    """Print every figure as JSON, in bytes."""
    plot: Path | None = None
    """FILE.png: plot the memory by category for each model and node; with --scaling tokens/s."""
    config_dir: str | None = None
    """DIR: folder with your own recipes and config groups."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PlanResult:
    """The plan of a run: the chosen settings, and settings that would fit. Printed as `distlora plan` prints it."""

    plan: Plan
    changes: tuple[SettingChange, ...] = ()
    """Settings that plan=auto and quant=auto chose."""
    near: Nearest | None = None
    """Settings that would fit; None if the plan fits."""
    larger: tuple[LargerRun, ...] = ()
    """Larger runs that would fit too."""
    packed: MultiTrialPlan | None = None
    """Trials trained together that the plan is for; None without sweep.packed."""

    def __repr__(self) -> str:
        return page(self.plan, changes=self.changes, near=self.near, larger=self.larger, packed=self.packed)

    @property
    def fits(self) -> bool | None:
        """True if the run fits the GPUs, or host memory without GPUs; None if their memory is unknown."""
        return self.plan.fits

    def bars(self) -> dict[str, Plan]:
        """Return the plans to draw by name: this one, and what would fit in its place."""
        name = f"{self.plan.model.name.rpartition('/')[2]}\n{machines_of(self.plan)}"
        drawn = {name: self.plan}
        if self.near is not None and self.near.same is not None:
            words = (typed(setting, value) for setting, value in self.near.same.settings.items())
            drawn["\n".join(("with", *words))] = self.near.same.plan
        return drawn

    def as_json(self) -> dict[str, Any]:
        """Every figure, for a program to read."""
        values = self.plan.as_json() | {"chosen": [dict(c.settings) | {"why": c.why} for c in self.changes]}
        values |= {"packed": None if self.packed is None else self.packed.as_json()}
        return values | {"larger": [dataclasses.asdict(each) for each in self.larger], "nearest": _nearest(self.near)}


def _nearest(near: Nearest | None) -> dict[str, Any] | None:
    if near is None:
        return None
    fitting = {"same_result": near.same, "other_result": near.other, "more_gpus": near.more, "other_gpu": near.gpu}
    nearest: dict[str, Any] = {name: None if change is None else _fitting(change) for name, change in fitting.items()}
    gpu = None if near.gpu is None else near.gpu.plan.machine.gpu
    ranks = None if near.more is None else near.more.plan.machine.ranks
    return nearest | {"gpus": ranks, "gpu": None if gpu is None else gpu.name}


def _fitting(fitting: Fitting) -> dict[str, Any]:
    return {"settings": dict(fitting.settings), "total": fitting.plan.device.total}


def main(arguments: list[str]) -> int:
    """Print the plan. Returns the exit code."""
    require("--cards" not in arguments, "--cards is now --gpus; write --gpus NAMExNUMBER,...")
    names = {"models": [*known_models()], "GPUs": [*GPUS], "models of --table": MODELS, "nodes of --table": MACHINES}
    epilog = "\n\n".join(textwrap.fill(f"{title}: {', '.join(of)}", 112) for title, of in names.items())
    options = read(PlanArguments, PROGRAM, [expand_home(word) for word in arguments], epilog=epilog)
    options = dataclasses.replace(options, settings=with_file(options.settings, PROGRAM, config_dir=options.config_dir))
    check(options)
    if options.table:
        show_table(options)
    elif options.scaling:
        show_scaling(options)
    else:
        result = plan_run(options.settings, config_dir=options.config_dir)
        if options.json:
            print(json.dumps(result.as_json(), indent=1))
        else:
            print(result)
            if options.assumptions:
                print("\n".join(["", *assumptions(result.plan)]))
        if options.plot is not None:
            plot_memory(result.bars(), settings(result.plan), options.plot)
    if options.plot is not None:
        warn(f"drawn in {shown(options.plot)}")
    return DONE


def check(options: PlanArguments) -> None:
    """Refuse arguments that are not settings, options of another table, and a plot that cannot be written."""
    for word in options.settings:
        if "=" not in word:
            known = f"; for a model, model={word}" if word in known_models() else ""
            raise UserError(
                f"{PROGRAM}: {word!r} is not a setting{known}; write setting=value; --help lists the options"
            )
    for name in ("models", "gpus"):
        is_given = getattr(options, name) is not None
        require(options.table or not is_given, f"--{name} belongs to --table; add --table, or leave it out")
    for name in ("strong", "fabrics"):
        require(options.scaling or not getattr(options, name), f"--{name} belongs to --scaling; add --scaling")
    require(not (options.scaling and options.table), "--table and --scaling cannot be combined; leave one of them out")
    if (path := options.plot) is not None:
        require(
            path.suffix.lower() == ".png", f"--plot {path} is drawn as a PNG; write --plot {path.with_suffix('.png')}"
        )
        require(not path.is_dir(), f"--plot {path} is a folder; write --plot {path / 'plan.png'}")
        check_writable(path.absolute().parent, "--plot")
        require(
            path.parent.is_dir(), f"--plot {path}: there is no folder {path.parent}; make it, or name another place"
        )
    if options.table:
        check_named_elsewhere(options.settings)


def check_named_elsewhere(overrides: Sequence[str]) -> None:
    """Refuse settings that --table has options for."""
    options = {"model": "--models", "gpu": "--gpus", "cluster": "--gpus"}
    for word in overrides:
        key = word.lstrip("+").partition("=")[0]
        flag = options.get(key.partition(".")[0])
        require(
            flag is None or key in ("gpu.price_per_hour", "model.new_tokens"),
            f"{word} cannot be used with --table; write {flag} {'NAME,NAME' if flag == '--models' else 'h100x8,a10'}",
        )


def plan_run(settings: Sequence[str], *, config_dir: str | None = None) -> PlanResult:
    """Return the plan of a run. Raises UserError for settings that `distlora train` refuses."""
    sweep, trials = compose_for_plan(settings, config_dir=config_dir)
    composed = trials[0]
    require_model(composed.config.model)
    check_parallel(composed.config.parallel, composed.config.cluster.ranks)
    if sweep is not None and sweep.packed != 1:
        check_pack([trial.config for trial in trials])
        packed = plan_together(sweep, [choices(trial).plan for trial in trials])
        if packed.most != 0:
            return PlanResult(plan=packed.plan, packed=packed)
    choice = choices(composed)
    plan, changes = choice.plan, choice.changes
    if plan.fits is False:
        return PlanResult(plan=plan, changes=changes, near=suggest.nearest(plan))
    return PlanResult(plan=plan, changes=changes, larger=tuple(larger_runs(choice)))


def require_model(model: ModelConfig) -> None:
    """Refuse settings that name no model, and list the known names."""
    if model.path == UNSET:
        raise UserError(
            f"no model is named; write for example {PROGRAM} model=llama3_8b gpu=rtx4090",
            f"names for model= are {', '.join(known_models())}; or set model.path to a folder, or to ORG/NAME of the "
            "hub",
        )


def show_table(options: PlanArguments) -> None:
    """Print the table, and draw it for --plot."""
    models, machines = options.models or MODELS, options.gpus or MACHINES
    cells = len(models) * len(machines)
    if cells >= REPORT_FROM:
        warn(f"choosing the settings of {cells} plans (a few seconds)")
    planned = plans(models, machines, options.settings, config_dir=options.config_dir)
    if options.json:
        rows = [
            {"model": model, "gpus": gpus} | ({"fits": False} if plan is None else plan.as_json())
            for (model, gpus), plan in planned.items()
        ]
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(matrix(planned)))
    if options.plot is not None:
        bars = {f"{model}, {gpus}": plan for (model, gpus), plan in planned.items() if plan is not None}
        plot_memory(bars, "memory per rank, with the fastest settings that fit", options.plot)


def plans(
    models: Sequence[str], machines: Sequence[str], overrides: Sequence[str], *, config_dir: str | None = None
) -> dict[tuple[str, str], Plan | None]:
    """Return plans by (model, GPUs), with free settings chosen; None if `distlora train` would refuse them.

    Raises UserError for an unknown name, and for settings that are possible on none.
    """
    words_of = {machine: machine_words(machine) for machine in machines}
    paths = {model: path_named(model) for model in models}
    named = {word.lstrip("+").partition("=")[0] for word in overrides}
    auto = [] if named & {"quant", "quant.method", "recipe", "adapter"} else ["quant=auto"]
    best: dict[tuple[str, str], Plan | None] = {}
    refused: UserError | None = None
    for machine in machines:
        settings = ["plan=auto", *auto, *words_of[machine], *overrides]
        composed = compose_run(settings, config_dir=config_dir, may_lack_paths=True)
        for model in models:
            config = composed.config.with_settings({"model.path": paths[model]})
            best[model, machine] = None
            try:
                check_parallel(config.parallel, config.cluster.ranks)
                planned = planned_model(config)
                check_planned(config, planned)
                nodes = machine_of(config.gpu, config.cluster)
                search = Search(config=config, model=planned, machine=nodes, fixed=composed.fixed)
                best[model, machine] = choose(search).plan
            except UserError as error:
                if is_hub_name(model):  # Which may not be there at all.
                    raise
                refused = error
    if refused is not None and not any(best.values()):
        raise refused
    return {(model, machine): best[model, machine] for model in models for machine in machines}


def machine_words(machine: str) -> list[str]:
    """Return `h100x8` as overrides; more than eight GPUs are nodes of eight. Raises UserError for an unknown GPU."""
    match = re.fullmatch(r"(.+)x(\d+)", machine)
    gpu, number = (match[1], int(match[2])) if match and machine not in GPUS else (machine, 1)
    if gpu not in GPUS:
        raise UserError(
            f"--gpus {machine}: there is no GPU {gpu!r}{nearest(gpu, GPUS)}; write --gpus rtx4090,h100x8 with of "
            f"{', '.join(GPUS)}"
        )
    if number < 1 or (number > GPUS_PER_NODE and number % GPUS_PER_NODE):
        full = number // GPUS_PER_NODE * GPUS_PER_NODE
        sizes = f"{gpu}x{full} or {gpu}x{full + GPUS_PER_NODE}" if full else f"{gpu}x1"
        raise UserError(f"--gpus {machine}: {number} GPUs do not fill whole nodes of {GPUS_PER_NODE}; write {sizes}")
    if number <= GPUS_PER_NODE:
        return [f"gpu={gpu}", f"cluster.gpus_per_node={number}"]
    nodes = number // GPUS_PER_NODE
    return [f"gpu={gpu}", "cluster=slurm", f"cluster.gpus_per_node={GPUS_PER_NODE}", f"cluster.nodes={nodes}"]


def path_named(name: str) -> str:
    """Return a model's name on the hub, from that name or its name for model=. Raises UserError for an unknown one."""
    known = known_models()
    if name not in known and not is_hub_name(name):
        raise UserError(
            f"--models {name}: there is no model of that name{nearest(name, known)}; write names for model=, or "
            "ORG/NAME of the hub"
        )
    return known.get(name, name)


def show_scaling(options: PlanArguments) -> None:
    """Print the scaling of the run over its own links, and with --fabrics over common ones."""
    plan = plan_run(options.settings, config_dir=options.config_dir).plan
    kind: Scaling = "strong" if options.strong else "weak"
    rows = scaling(plan, kind=kind)
    if options.fabrics:
        rows += scaling(plan, kind=kind, fabrics=FABRICS)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        what = "same global batch" if options.strong else "same batch per GPU"
        print(f"{plan.model.name} on {plan.machine.name}, {what}; {settings(plan)}\n")
        print("\n".join(scaling_tables(rows)))
        if options.assumptions:
            print("\n".join(["", *leverage_table(rows)]))
    if options.plot is not None:
        plot_scaling(rows, f"{plan.model.name} on {plan.machine.name}, calculated", options.plot)
