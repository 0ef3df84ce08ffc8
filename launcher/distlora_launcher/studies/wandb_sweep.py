"""Create a wandb sweep from the section `sweep` and the settings with several values (`distlora sweep create`).

Run wandb agents (`distlora sweep agent`) in workers, and support `distlora train` when an agent starts it. Agents are
stopped as runs are, and pass the signal on to their run. Runs that saved are resumed when the same command is given
again, before new values are requested.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from distlora.config import ClusterConfig, Config, DataConfig, QuantConfig, TrackerConfig, UserError, require
from distlora.config.base import means_hub
from distlora.config.checks import check_section
from distlora.config.file import as_mapping, build
from distlora.config.json_files import read_object
from distlora.config.sweep import SweepConfig
from distlora.run_folder.layout import find_result
from distlora.run_folder.sweep import words_of
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED
from distlora.system.stop_signals import Forwarder, forwarding
from distlora.training.trackers.wandb_agent import ASKED, VARIABLES, AgentRun
from distlora_launcher.compose.compose import PATHS, compose_section, parse_overrides, section_of
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.script import render_workers
from distlora_launcher.jobs.submit import check_with_slurm, in_job
from distlora_launcher.launch.bound import start_command
from distlora_launcher.launch.failures import read_ending
from distlora_launcher.launch.lock import CONFIG_NAME, MACHINES, holders, host_name, worker_place
from distlora_launcher.studies.sources import make_source
from distlora_launcher.studies.start import (
    WORKER,
    check_trials,
    parse_sweep,
    refuse_live,
    run_together,
    submit_workers,
    visible_devices,
)
from distlora_launcher.studies.sweep import LOGS, Dimension, Interval, Sweep, Values
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import say, shown, warn

FILE_NAME = "wandb_sweep.yaml"
"""File in the sweep's folder that is registered."""

USAGE = """usage: distlora sweep create [sweep=grid|random|optuna] [setting=a,b ...] [setting=value ...] [--dry-run]

Write a sweep for wandb, whose server chooses the values, and register it with `wandb sweep` (log in first: `wandb
login`). Settings with several values are searched, as with `distlora sweep`: grid tries all, random draws sweep.trials
of them, optuna stands for wandb's own search (bayes). sweep.pruner=hyperband or median ends trials that fall behind, by
wandb's hyperband. tracker.project and tracker.entity name its project. The file is RUN_DIR/wandb_sweep.yaml.

examples:
    distlora sweep create optim.lr=1e-4,2e-4 adapter.r=8,16 model.path=... data.path=... tracker.artifact=true
    distlora sweep agent ENTITY/PROJECT/ID          any number of times, on any node

--dry-run    print the file, and register nothing"""

METHODS = {"grid": "grid", "random": "random", "optuna": "bayes"}


def create(arguments: list[str]) -> int:
    """Write and register a sweep (`distlora sweep create ...`). Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    sweep, first = parse_sweep([word for word in arguments if word != "--dry-run"])
    sections = as_mapping(first.config)
    check_searchable(sweep.settings, sweep.space, sections)
    check_trials(sweep, make_source(sweep), first)
    options = [] if sweep.config_dir is None else [f"--config-dir={sweep.config_dir}"]
    overrides = list(options)
    for word in sweep.overrides:  # With absolute paths: an agent may run in another folder.
        name = word.partition("=")[0].lstrip("+")
        is_path = name in (*PATHS, "data.sources")
        overrides += words_of({name: sections[section_of(name)][name.partition(".")[2]]}) if is_path else [word]
    if sweep.name is not None:
        overrides += words_of({"name": sweep.name})
    text = yaml.safe_dump(
        described(sweep, overrides, first.config.name, first.config.tracker), sort_keys=False, width=1000
    )
    for line in differences(sweep.settings, sweep.space):
        warn(line)
    if "--dry-run" in arguments:
        print(text, end="")
        return DONE
    atomic_io.private_folder(sweep.folder)
    file = sweep.folder / FILE_NAME
    require(not file.exists(), f"{file} already exists; set another run_dir, or `wandb sweep {shown(file)}`")
    atomic_io.write_text(file, text)
    path = register(file, first.config.tracker)
    say(f"sweep {path}, as {shown(file)} says")
    say(f"start its runs with: distlora sweep agent {path}   (any number of times, on any node)")
    return DONE


def check_searchable(settings: SweepConfig, space: Sequence[Dimension], sections: Mapping[str, Any]) -> None:
    """Refuse what wandb's search cannot do."""
    require(
        settings.method in METHODS,
        f"sweep={settings.method} chooses trials by their results, which wandb's server does; write `distlora "
        f"sweep sweep={settings.method}` without create, or set sweep=grid, random or optuna",
    )
    require(
        settings.packed == 1,
        f"sweep.packed={settings.packed} trains trials together on one base, and wandb starts each by itself; leave it "
        "out, or write `distlora sweep` without create",
    )
    require(
        sections["tracker"].get("wandb"),
        "tracker names no wandb, which compares the logged values; leave it out, or add wandb to it",
    )
    group = next((d.setting for d in space if isinstance(sections.get(d.setting), Mapping)), None)
    if group is not None:
        raise UserError(
            f"{group} is a config group, and wandb would record its name in place of the section {group}; search "
            f"settings of the section instead, such as {group}.{next(iter(sections[group]))}=a,b"
        )


def described(sweep: Sweep, overrides: Sequence[str], name: str, tracker: TrackerConfig) -> dict[str, Any]:
    """Return the sweep in wandb's format; `name`: its name on wandb's pages."""
    settings, space = sweep.settings, sweep.space
    values: dict[str, Any] = {
        "name": name,
        "project": tracker.project,
        **({} if tracker.entity is None else {"entity": tracker.entity}),
        "method": METHODS[settings.method],
        "metric": {"name": settings.metric, "goal": settings.direction},
        "parameters": {d.setting: parameter(d, numbers=settings.method != "grid") for d in space},
    }
    if settings.trials is not None:
        values["run_cap"] = settings.trials
    if settings.pruner != "none":
        values["early_terminate"] = {"type": "hyperband", "min_iter": settings.pruner_warmup + 1}
    return {**values, "command": ["${env}", "distlora", "train", *overrides, "${args_no_hyphens}"]}


def parameter(dimension: Dimension, *, numbers: bool) -> dict[str, Any]:
    """Return a setting in wandb's format. `numbers`: successive integers are a range, not unordered values."""
    if isinstance(dimension, Values):
        values = dimension.values
        whole = all(type(value) is int for value in values)
        if numbers and len(values) > 1 and whole and all(b - a == 1 for a, b in itertools.pairwise(values)):
            return {"distribution": "int_uniform", "min": values[0], "max": values[-1]}
        return {"values": [_value(place(dimension.setting, value)) for value in values]}
    low, high = dimension.low, dimension.high
    if dimension.integer and dimension.log:
        return {"values": doublings(int(low), int(high))}
    if dimension.integer:
        return {"distribution": "int_uniform", "min": int(low), "max": int(high)}
    distribution = "log_uniform_values" if dimension.log else "uniform"
    return {"distribution": distribution, "min": float(low), "max": float(high)}


def _value(value: Any) -> Any:
    """Return a value that Hydra reads back after the agent wrote it by Python's str."""
    return value if isinstance(value, (bool, int, float)) else words_of({"x": value})[0].partition("=")[2]


def place(setting: str, value: Any) -> Any:
    """Return a path as an absolute path; any other value unchanged."""
    is_path = setting in PATHS and isinstance(value, str) and not means_hub(value)
    return str(Path(value).expanduser().absolute()) if is_path else value


def doublings(low: int, high: int) -> list[int]:
    """Return `low`, its doublings below `high`, and `high`: wandb's logarithmic draws are not integers."""
    return [*(low * 2**power for power in range(math.ceil(math.log2(high / low)))), high]


def differences(settings: SweepConfig, space: Sequence[Dimension]) -> Iterator[str]:
    """Yield a sentence per difference between wandb's search and `distlora sweep`."""
    if settings.pruner == "median":
        yield "sweep.pruner=median: wandb supports hyperband only, which is used"
    if settings.method == "optuna":
        yield f"sweep=optuna: wandb's search (bayes) proposes the values, not Optuna's {settings.sampler}"
    for dimension in space:
        if isinstance(dimension, Interval) and dimension.integer and dimension.log:
            values = ", ".join(map(str, doublings(int(dimension.low), int(dimension.high))))
            yield f"{dimension.setting}: wandb draws no integers by logarithm; the values are {values}"


def register(file: Path, tracker: TrackerConfig) -> str:
    """Register the sweep with wandb's server; return ENTITY/PROJECT/ID. Raises UserError with its reason."""
    options = ["--project", tracker.project, *(() if tracker.entity is None else ("--entity", tracker.entity))]
    command = [sys.executable, "-m", "wandb", "sweep", *options, str(file)]
    ended = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )
    output = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout + ended.stderr)
    path = re.search(r"wandb agent (\S+)", output)
    if ended.returncode == 0 and path is not None:
        return path[1]
    lines = [line.removeprefix("wandb: ").strip() for line in output.splitlines() if line.strip()]
    reason = "; ".join(lines[-3:]) or f"exit code {ended.returncode}"
    raise UserError(
        f"wandb did not register the sweep: {reason}. The file is written; with a key (`wandb login`) and a network, "
        f"register it by: wandb sweep {' '.join(options)} {shown(file)}"
    )


AGENT_USAGE = """usage: distlora sweep agent ENTITY/PROJECT/ID [--count N] [run_dir=FOLDER] [sweep.workers=N]
                            [cluster=slurm ...]

Start wandb agents for the sweep that `distlora sweep create` or `wandb sweep` registered. Each agent requests
values and trains with them, until the sweep is done. The run folders are FOLDER/<id of the run>, by default
runs/<ID>/<id of the run>. sweep.workers=N starts N agents: on this node with an equal number of GPUs each; with
cluster=slurm as the tasks of an array, each with cluster.nodes nodes. The output of one agent is printed, that of
several is in FOLDER/logs.

Ctrl-C, SIGTERM and `distlora cancel FOLDER` have the runs save. `distlora resume FOLDER`, or the same command, resumes
them.

--count N    runs per agent (default: until the sweep is done)

example: distlora sweep agent my-team/my-project/ab12cd34 --count 5"""

RECORD_NAME = "agents.json"
"""File in the agents' folder with their command line."""

DEFAULTS = {
    # Failed trials are recorded; by default three in the first minute would end the agent.
    "WANDB_AGENT_DISABLE_FLAPPING": "true",
    "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000",
    # Seconds from wandb's SIGTERM (early termination) to its SIGKILL: a save may take longer than the default 30 s.
    "WANDB_AGENT_KILL_DELAY": "600",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsRequest:
    """The command line of `distlora sweep agent`."""

    sweep: str
    """[[ENTITY/]PROJECT/]ID"""
    folder: Path
    count: int | None
    workers: int
    cluster: ClusterConfig
    words: tuple[str, ...]
    """The command line, in FOLDER/agents.json for `distlora resume`: that of the last command of a folder."""

    @property
    def worker(self) -> list[str]:
        """Return the module of a worker and its arguments; commands that share a folder differ in them."""
        return [WORKER, str(self.folder), f"--agent={shlex.join(self.words)}"]

    @property
    def sweep_id(self) -> str:
        """Return the sweep's ID."""
        return self.sweep.rpartition("/")[2]


def start_agents(arguments: Sequence[str]) -> int:
    """Start agents and wait for them, or submit them. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(AGENT_USAGE)
        return DONE
    request = parse_agents(arguments)
    folder, cluster, workers = request.folder, request.cluster, request.workers
    require(
        importlib.util.find_spec("wandb") is not None,
        "wandb agents need wandb, which is not installed; pip install wandb",
    )
    is_job = cluster.launcher == "slurm"
    script = _checked_script(request) if is_job else ""
    atomic_io.private_folder(folder)
    atomic_io.write_json(folder / RECORD_NAME, {"words": request.words})
    if is_job:
        submit_workers(folder, script, workers, cluster)
        say(f"stop with: distlora cancel {shown(folder)}")
        return DONE
    logs = folder / LOGS
    logs.mkdir(exist_ok=True)
    with _registered(folder), forwarding() as forwarder:
        gpus = visible_devices(workers, cluster.gpus_per_node)
        codes = run_together(request.worker, gpus, forwarder, logs=logs if workers > 1 else None)
    if forwarder.received is None:
        return DONE if set(codes) == {DONE} else FAILED
    say(f"stopped; continue with: distlora resume {shown(folder)}")
    return INTERRUPTED if forwarder.killed else STOPPED


def _checked_script(request: AgentsRequest) -> str:
    """Return the script of agents as the tasks of a SLURM array. Raises UserError if it cannot be submitted."""
    refuse_live(request.folder)
    script = render_workers(
        request.folder,
        request.sweep_id,
        request.cluster,
        gpus=scheduler.has_gpus(request.cluster.partition),
        workers=request.workers,
        worker=request.worker,
        trials="*",
        mounts=[str(request.folder), DataConfig(path=".").cache_dir, QuantConfig().cache_dir],
    )
    check_with_slurm(script)
    return script


def is_agents_folder(folder: Path) -> bool:
    """Return whether agents have, or had, their runs in a folder."""
    return (folder / RECORD_NAME).is_file()


def recorded_words(folder: Path) -> list[str]:
    """Return the command line of a folder's agents. Raises UserError if it is damaged."""
    remedy = f"delete it, and start the agents in run_dir={folder}"
    words: list[str] = read_object(folder / RECORD_NAME, remedy, {"words": [str]})["words"]
    return words


def parse_agents(arguments: Sequence[str]) -> AgentsRequest:
    """Return what a command line asks for. Raises UserError for what agents cannot do."""
    parser = Parser("distlora sweep agent")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--count", type=int)
    options = parser.parse_args(list(arguments))
    sweeps = [word for word in options.words if "=" not in word]
    require(
        len(sweeps) == 1 and re.fullmatch(r"([^/\s]+/){0,2}[\w-]+", sweeps[0]) is not None,
        f"{' '.join(sweeps) or 'no sweep'}: name one sweep, as `distlora sweep create` prints it: distlora sweep agent "
        "ENTITY/PROJECT/ID",
    )
    require(
        options.count is None or options.count > 0,
        f"--count {options.count} is not a valid number of runs; write --count 1 or more",
    )
    overrides = [word for word in options.words if "=" in word]
    for word in overrides:
        require(
            re.match(r"(run_dir|sweep\.workers|cluster)=|cluster\.", word) is not None,
            f"{word}: the settings of its runs are in the sweep; an agent accepts run_dir=, sweep.workers= and "
            "cluster=",
        )
    values = {override.get_key_element(): override.value() for override in parse_overrides(overrides)}
    workers = values.get("sweep.workers", 1)
    if not isinstance(workers, int) or workers < 1:
        raise UserError(f"sweep.workers={workers} is not a number of agents; set sweep.workers=2")
    of_cluster = [word for word in overrides if word.startswith("cluster")]
    cluster = build(ClusterConfig, compose_section("cluster", of_cluster), prefix="cluster.")
    check_section("cluster", cluster)
    folder = Path(str(values.get("run_dir", agent_runs_folder(sweeps[0].rpartition("/")[2])))).expanduser().absolute()
    count = [] if options.count is None else ["--count", str(options.count)]
    settings = words_of({"run_dir": str(folder), "sweep.workers": workers})
    return AgentsRequest(
        sweep=sweeps[0],
        folder=folder,
        count=options.count,
        workers=workers,
        cluster=cluster,
        words=(sweeps[0], *count, *settings, *of_cluster),
    )


@contextlib.contextmanager
def _registered(folder: Path) -> Iterator[None]:
    """Name this process in FOLDER/machines for `distlora cancel`; several may share a folder, also of several nodes."""
    name = f"agents_{host_name()}_{os.getpid()}"
    with worker_place(folder, name):
        yield
    (folder / MACHINES / f"{name}.json").unlink(missing_ok=True)


def work_as_agent(words: Sequence[str], index: int) -> int:
    """Resume the unfinished runs of a sweep one after the other, then run an agent. Returns the exit code.

    words: the command line (AgentsRequest.words).
    """
    request = parse_agents(words)
    with _registered(request.folder), forwarding() as forwarder:
        code = _run_agent(request, index, forwarder)
    if forwarder.received is None:
        return DONE if code == DONE else FAILED
    return INTERRUPTED if forwarder.killed else STOPPED


FOLDER = "DISTLORA_SWEEP_FOLDER"
"""Environment variable: folder of the agents' runs; default runs/<id of the sweep>."""


def _run_agent(request: AgentsRequest, index: int, forwarder: Forwarder) -> int:
    stop_mark = request.folder / LOGS / f"asked_{host_name()}_{os.getpid()}"
    stop_mark.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {FOLDER: str(request.folder)}
    environment = {**DEFAULTS, "WANDB_DIR": str(request.folder), **environment, ASKED: str(stop_mark)}
    # The sweep's command `distlora` must be this one.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"

    def run(*arguments: str) -> int:
        process = start_command(*arguments, environment=environment)

        def ask_to_stop(_: int) -> None:
            stop_mark.touch()  # First, or a stopped run would take this for wandb's early termination.
            process.send_signal(signal.SIGTERM)

        forwarder.attach(process, ask_to_stop)
        code = process.wait()
        forwarder.detach()
        return code

    pending = unfinished(request)
    first = index % max(1, len(pending))
    for path in pending[first:] + pending[:first]:  # Several agents begin with different ones.
        if forwarder.received is None and find_result(path) is None and not holders(path):
            say(f"{shown(path)} resumes")
            run("distlora_launcher.cli.main", "resume", str(path))
    count = [] if request.count is None else ["--count", str(request.count)]
    code = DONE
    if forwarder.received is None:
        code = run("wandb", "agent", "--forward-signals", *count, request.sweep)
    stop_mark.unlink(missing_ok=True)
    return code


def unfinished(request: AgentsRequest) -> list[Path]:
    """Return the sweep's runs that were stopped or killed: wandb's server hands none out twice.

    Runs that wandb ended early and runs that failed are left out.
    """
    runs = []
    for record in sorted(request.folder.glob(f"*/{CONFIG_NAME}")):
        run = record.parent
        sweep_overrides = AgentRun.of_run(run)
        if sweep_overrides is None or sweep_overrides.sweep_id != request.sweep_id or was_ended_early(run):
            continue
        if find_result(run) is None and read_ending(run).error is None:
            runs.append(run)
    return runs


_ENDED_EARLY = Path("wandb") / "ended_early"
"""Marker file in RUN."""


def add_run_dir(overrides: Sequence[str]) -> list[str]:
    """Return the arguments with a unique run folder if an agent runs this command.

    Two agents may start in the same second, which names the default folder.
    """
    agent = AgentRun.started()
    if agent is None or any(word.lstrip("+").startswith(("run_dir=", "hydra.run.dir=")) for word in overrides):
        return list(overrides)
    return [*overrides, *words_of({"run_dir": str(agent_runs_folder(agent.sweep_id) / agent.run_id)})]


def agent_runs_folder(sweep_id: str) -> Path:
    """Return the default folder of a sweep's runs."""
    return Path(os.environ.get(FOLDER) or Path("runs") / sweep_id)


def find_begun_run(run_dir: Path) -> Path | None:
    """Return the agent's run folder if it exists already: an agent is given a preempted run again."""
    agent = AgentRun.started()
    if agent is None or not (run_dir / CONFIG_NAME).is_file():
        return None
    kept = AgentRun.of_run(run_dir)
    return run_dir if kept is not None and kept.run_id == agent.run_id else None


def check_agent(configs: Sequence[Config]) -> None:
    """Refuse settings that differ from the sweep's values, which wandb would record all the same."""
    agent = AgentRun.started()
    if agent is None:
        return
    require(
        len(configs) == 1,
        f"-m starts {len(configs)} runs, and an agent of the sweep {agent.sweep_id} starts one; remove -m from the "
        "sweep's command, and search those settings in its parameters",
    )
    require(
        configs[0].cluster.launcher != "slurm" or in_job(),
        f"cluster=slurm would submit a run of the sweep {agent.sweep_id}, which its agent would treat as complete; "
        "start the agents in SLURM: distlora sweep agent ENTITY/PROJECT/ID cluster=slurm",
    )
    agent = dataclasses.replace(agent, values={name: parse_value(name, value) for name, value in agent.values.items()})
    refused = list(agent.disagreements(as_mapping(configs[0])))
    if refused:
        raise UserError(*refused)


def note_end(run_dir: Path, code: int) -> None:
    """Record the sweep of a stopped run, and mark a run that wandb stopped (early termination) as ended."""
    agent, mark = AgentRun.started(), os.environ.get(ASKED)
    if code != STOPPED or agent is None or not run_dir.is_dir():
        return
    if AgentRun.of_run(run_dir) is None:
        agent.keep(run_dir)
    if mark is not None and not Path(mark).exists():
        (run_dir / _ENDED_EARLY).touch()


def was_ended_early(run_dir: Path) -> bool:
    """Return whether wandb ended a run before its last step."""
    return (run_dir / _ENDED_EARLY).exists()


def parse_value(name: str, value: Any) -> Any:
    """Return a value as Hydra reads it: an agent writes it by Python's str."""
    if not isinstance(value, str):
        return value
    try:
        (override,) = parse_overrides([f"{name}={value}"])
    except UserError:
        return value  # Compare the text; the run was composed without it.
    parsed: Any = override.value()
    return value if override.is_sweep_override() else Override._convert_value(parsed)
