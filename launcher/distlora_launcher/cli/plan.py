"""Show the needs of a run before it starts, for any model on any GPUs (`distlora plan`).

Nothing is started, and nothing is downloaded but the config.json of a model that is neither local nor known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distlora.config import ModelConfig, UserError, require
from distlora.config.plan import GPUS
from distlora.planner import Plan
from distlora.planner.choose import Change, typed
from distlora.planner.memory import Kind
from distlora.planner.model import PlannedModel
from distlora.planner.report import assumptions, machines_of, page, settings
from distlora.planner.speed.scaling import FABRICS, Scaling, scaling
from distlora.planner.suggest import Fitting, Nearest, Packing, Room, nearest, room
from distlora.planner.tables import KINDS, leverage_table, matrix, scaling_tables
from distlora.system.exit_codes import DONE
from distlora.training.multi_trial.protocol import check_pack
from distlora_launcher.cli.plan_table import MACHINES, MODELS, path_named, plans
from distlora_launcher.compose.checks import check_parallel, check_writable
from distlora_launcher.compose.compose import expand_home, known_models, names_model
from distlora_launcher.compose.planning import choices, planned_model
from distlora_launcher.sweeps.multi_trial import compose_for_plan, plan_together
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

PROGRAM = "distlora plan"
WORTH_SAYING = 20
"""Plans of a table that take long enough to be announced."""
Value = TypeVar("Value")

USAGE = """usage: distlora plan model=NAME [gpu=NAME] [setting=value ...] [--assumptions] [--json] [--plot FILE]
       distlora plan model=NAME gpu=NAME [setting=value ...] --scaling [--strong] [--fabrics] [--json] [--plot FILE]
       distlora plan --table [--models NAME,...] [--gpus NAMExNUMBER,...] [setting=value ...] [--json] [--plot FILE]

What a run needs before it starts, calculated from the model's sizes alone: memory of a GPU by kind, host memory, disk,
what travels between GPUs, operations. Where it does not fit, what would. Nothing is downloaded, no GPU is needed.

  model=NAME         a well-known model, below; or model.path=FOLDER, or model.path=ORG/NAME of the hub
  gpu=NAME           a GPU, below; or what is better known: gpu.memory_gib=80 gpu.tflops=989 ...; without one, this
                     machine
  setting=value      any setting of `distlora train`, recipes too; without one what `distlora train` would do.
                     cluster.gpus_per_node=8: GPUs of a machine; plan=auto: the fastest settings that fit, where you
                     name none; quant=auto: 16 bits where they fit and are not far slower; sweep.packed=4 or auto:
                     so many trials of a sweep that share one base, and how many would fit
  --table            many models on many machines, as Markdown, each with the fastest settings that fit
  --models, --gpus   for --table: {table_models};
                     {table_machines}
  --scaling          the same run on 1 to 1,024 GPUs: tokens/s, of a GPU too, what a step waits for; as many rows on
                     each GPU, or with --strong in all; with --fabrics over usual links too
  --assumptions      print what the time rests on too; with --scaling what each of that decides
  --json             every figure, in bytes, for a program to read
  --plot FILE.png    a bar of what takes the memory, or one for each model and machine; with --scaling tokens/s
  --config-dir DIR   your own recipes

models: {models}

GPUs: {gpus}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to `distlora plan`: a choice of settings, with what would fit."""

    plan: Plan
    changes: tuple[Change, ...] = ()
    """What was chosen."""
    near: Nearest | None = None
    """What would fit, where this does not."""
    rooms: tuple[Room, ...] = ()
    """What a larger run would take."""
    packed: Packing | None = None
    """Of which pack of trials the plan is, where sweep.packed asks for one."""

    def bars(self) -> dict[str, Plan]:
        """Return the plans to draw by name: this one, and what would fit in its place."""
        name = f"{self.plan.model.name.rpartition('/')[2]}\n{machines_of(self.plan)}"
        found = {name: self.plan}
        if self.near is not None and self.near.same is not None:
            words = (typed(setting, value) for setting, value in self.near.same.settings.items())
            found["\n".join(("with", *words))] = self.near.same.plan
        return found

    def as_json(self) -> dict[str, Any]:
        """Every figure, for a program to read."""
        values = self.plan.as_json() | {"chosen": [dict(c.settings) | {"why": c.why} for c in self.changes]}
        values |= {"packed": None if self.packed is None else self.packed.as_json()}
        return values | {"larger": [dataclasses.asdict(each) for each in self.rooms], "nearest": _nearest(self.near)}


def _nearest(near: Nearest | None) -> dict[str, Any] | None:
    if near is None:
        return None
    fitting = {"same_result": near.same, "other_result": near.other, "more_gpus": near.more, "other_gpu": near.gpu}
    found: dict[str, Any] = {name: None if each is None else _fitting(each) for name, each in fitting.items()}
    gpu = None if near.gpu is None else near.gpu.plan.machine.gpu
    ranks = None if near.more is None else near.more.plan.machine.ranks
    return found | {"gpus": ranks, "gpu": None if gpu is None else gpu.name}


def _fitting(each: Fitting) -> dict[str, Any]:
    return {"settings": dict(each.settings), "total": each.plan.device.total}


def main(arguments: list[str]) -> int:
    """Print the plan. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return DONE
    options = parse(arguments)
    if options.table:
        show_table(options)
    elif options.scaling:
        show_scaling(options)
    else:
        answer = answered(options.settings, config_dir=options.config_dir)
        if options.json:
            print(json.dumps(answer.as_json(), indent=1))
        else:
            near, rooms, packed = answer.near, answer.rooms, answer.packed
            print(page(answer.plan, changes=answer.changes, near=near, rooms=rooms, packed=packed))
            if options.assumptions:
                print("\n".join(["", *assumptions(answer.plan)]))
        if options.plot is not None:
            draw(answer.bars(), settings(answer.plan), options.plot)
    if options.plot is not None:
        print(f"drawn in {shown(options.plot)}", file=sys.stderr)
    return DONE


def usage() -> str:
    """Return the text of `distlora plan --help`."""
    return USAGE.format(
        models=wrapped(known_models(), 8, 112),
        gpus=wrapped([*GPUS], 8, 112),
        table_models=wrapped(MODELS, 21, 98),
        table_machines=wrapped(MACHINES, 21, 98),
    )


def wrapped(names: Iterable[str], indent: int, width: int) -> str:
    """Names in lines of so many characters, all but the first indented."""
    return ("\n" + " " * indent).join(textwrap.wrap(", ".join(names), width))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options and settings.

    Raises UserError for an unknown flag or word, and for a plot that cannot be written.
    """
    parser = Parser(PROGRAM)
    parser.add_argument("settings", nargs="*")
    for flag in ("--table", "--scaling", "--strong", "--fabrics", "--assumptions", "--json"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--models")
    parser.add_argument("--gpus")
    require("--cards" not in arguments, "--cards is now --gpus; write --gpus NAMExNUMBER,...")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--config-dir")
    options: argparse.Namespace = parser.parse_args([expand_home(word) for word in arguments])
    for word in options.settings:
        if "=" not in word:
            known = f"; for a model, model={word}" if word in known_models() else ""
            raise UserError(f"{PROGRAM}: {word!r} is no setting{known}; write setting=value, or --help for the rest")
    for flag in ("models", "gpus"):
        value = getattr(options, flag)
        require(options.table or value is None, f"--{flag} {value} belongs to --table; add --table, or leave it out")
    for flag in ("strong", "fabrics"):
        require(options.scaling or not getattr(options, flag), f"--{flag} belongs to --scaling; add --scaling")
    require(not (options.scaling and options.table), "--table and --scaling are two tables; leave one of them out")
    options.models = MODELS if options.models is None else listed("--models", options.models)
    options.machines = MACHINES if options.gpus is None else listed("--gpus", options.gpus)
    if options.plot is not None:
        check_picture(options.plot)
    if options.table:
        check_named_elsewhere(options.settings)
    return options


def listed(flag: str, text: str) -> list[str]:
    """Split `a,b` into names, without repetitions."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    require(all(names), f"{flag} {text!r} names nothing between two commas; write {flag} NAME,NAME")
    return names


def check_named_elsewhere(words: Sequence[str]) -> None:
    """Refuse settings that the options of a table say."""
    options = {"model": "--models", "gpu": "--gpus", "cluster": "--gpus"}
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        flag = options.get(key.partition(".")[0])
        require(
            flag is None or key in ("gpu.price_per_hour", "model.new_tokens"),
            f"{word} is said by {flag} in a table; write {flag} {'NAME,NAME' if flag == '--models' else 'h100x8,a10'}",
        )


def check_picture(path: Path) -> None:
    """Refuse a file that is no PNG by its name, or in no folder."""
    require(path.suffix.lower() == ".png", f"--plot {path} is drawn as a PNG; write --plot {path.with_suffix('.png')}")
    require(not path.is_dir(), f"--plot {path} is a folder; write --plot {path / 'plan.png'}")
    check_writable(path.absolute().parent, "--plot")
    require(path.parent.is_dir(), f"--plot {path}: there is no folder {path.parent}; make it, or name another place")


def answered(settings: Sequence[str], *, config_dir: str | None = None) -> Answer:
    """Return the plan of a run. Raises UserError for settings that `distlora train` refuses."""
    sweep, trials = compose_for_plan(settings, config_dir=config_dir)
    composed = trials[0]
    require_model(composed.config.model)
    check_parallel(composed.config.parallel, composed.config.cluster.ranks)
    if sweep is not None and sweep.packed != 1:
        check_pack([trial.config for trial in trials])
        packed = plan_together(sweep, [choices(trial.config, trial.fixed).plan for trial in trials])
        if packed.most != 0:
            return Answer(plan=packed.plan, packed=packed)
    choice = choices(composed.config, composed.fixed)
    plan, changes = choice.plan, choice.changes
    if plan.fits is False:
        return Answer(plan=plan, changes=changes, near=nearest(plan))
    return Answer(plan=plan, changes=changes, rooms=tuple(room(choice, larger_than(plan))))


def larger_than(plan: Plan) -> tuple[str, PlannedModel] | None:
    """Return the next larger known model with a similar name (`model=llama3_70b` after llama3_8b), or None."""
    known = known_models()
    own = next((name for name, path in known.items() if path == plan.config.model.path), None)
    if own is None:
        return None
    kin = own.partition("_")[0]
    found = [
        (f"model={name}", planned_model(plan.config.with_settings({"model.path": path_named(name)})))
        for name in known
        if name.partition("_")[0] == kin and name != own
    ]
    larger = [each for each in found if each[1].shapes.numel > plan.model.shapes.numel]
    return min(larger, key=lambda each: each[1].shapes.numel, default=None)


def require_model(model: ModelConfig) -> None:
    """Refuse settings that name none, with the names that are known."""
    if not names_model(model):
        raise UserError(
            f"no model is named, and a plan is of a model; write for example {PROGRAM} model=llama3_8b gpu=rtx4090",
            f"names for model= are {', '.join(known_models())}; or set model.path to a folder, or to ORG/NAME of the "
            "hub",
        )


def show_table(options: argparse.Namespace) -> None:
    """Print the table, and draw it where that is asked for."""
    cells = len(options.models) * len(options.machines)
    if cells >= WORTH_SAYING:
        print(f"choosing the settings of {cells} plans (a few seconds)", file=sys.stderr, flush=True)
    found = plans(options.models, options.machines, options.settings, config_dir=options.config_dir)
    if options.json:
        rows = [
            {"model": model, "gpus": gpus} | ({"fits": False} if plan is None else plan.as_json())
            for (model, gpus), plan in found.items()
        ]
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(matrix(found)))
    if options.plot is not None:
        bars = {f"{model}, {gpus}": plan for (model, gpus), plan in found.items() if plan is not None}
        draw(bars, "memory of a rank, with the fastest settings that fit", options.plot)


def show_scaling(options: argparse.Namespace) -> None:
    """Print how the run scales, over its own links and, where that is asked for, over usual ones."""
    plan = answered(options.settings, config_dir=options.config_dir).plan
    kind: Scaling = "strong" if options.strong else "weak"
    rows = scaling(plan, kind=kind)
    if options.fabrics:
        rows += scaling(plan, kind=kind, fabrics=FABRICS)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        what = "as many rows in all" if options.strong else "as many rows on each GPU"
        print(f"{plan.model.name} on {plan.machine.name}, {what}; {settings(plan)}\n")
        print("\n".join(scaling_tables(rows)))
        if options.assumptions:
            print("\n".join(["", *leverage_table(rows)]))
    if options.plot is not None:
        from distlora.planner.tables import plot_scaling

        plot_scaling(rows, f"{plan.model.name} on {plan.machine.name}, calculated", options.plot)


def draw(found: Mapping[str, Plan], title: str, path: Path) -> None:
    """Draw a bar per plan."""
    from distlora.planner.tables import MemoryBar, plot_memory

    bars = [
        MemoryBar(name=name, kinds=named(plan.device.by_kind), usable=plan.machine.usable_bytes)
        for name, plan in found.items()
    ]
    plot_memory(bars, named(KINDS), title, path)


def named(by_kind: Mapping[Kind, Value]) -> dict[str, Value]:
    """Return the memory by plain names."""
    return {str(kind): value for kind, value in by_kind.items()}
