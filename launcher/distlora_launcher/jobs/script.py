"""The sbatch script of a run, or of a sweep as an array: slurm/job.sbatch.jinja filled with the settings."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from distlora.config import ClusterConfig, Config, UserError
from distlora.config.places import is_hub_name
from distlora_launcher.logs import SLURM

SCRIPT_NAME = "job.sbatch"
"""In the run folder, or in a sweep's."""

_TEMPLATE = "job.sbatch.jinja"
_GPU_OPTION = re.compile(r"--(gpus|gpus-per-node|gpus-per-task|gpus-per-socket|gres|tres-per-\w+)\b|-G")
"""Options by which the user asks for GPUs his own way."""


def render(config: Config, *, gpus: bool, tasks: Sequence[Config] = ()) -> str:
    """The script of a run; with `tasks` that of a sweep, whose folder is config.run_dir and whose runs lie in there by
    their numbers. `gpus`: whether to ask SLURM for GPUs. Raises UserError for a text that #SBATCH cannot hold.
    """
    numbers = [int(Path(task.run_dir).name) for task in tasks]
    import jinja2

    cluster, folder = config.cluster, Path(config.run_dir)
    source = resources.files("distlora_launcher.slurm").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(
        title=_title(config, len(tasks)),
        script=shlex.quote(str(folder / SCRIPT_NAME)),
        options=[_option(name, value) for name, value in _options(config, gpus, numbers)] + list(cluster.sbatch),
        array=len(tasks) > 0,
        run=shlex.quote(str(folder)),
        port=cluster.port,
        python="python" if cluster.container else shlex.quote(sys.executable),
        setup=cluster.setup,
        environment=[(name, shlex.quote(value)) for name, value in cluster.environment.items()],
        signal_seconds=cluster.signal_seconds,
        requeue=cluster.requeue,
        srun=_srun_options(cluster, _places(tasks or [config])),
        container=cluster.container is not None,
    )


def _title(config: Config, tasks: int) -> str:
    """What the script does, in a line."""
    cluster = config.cluster
    name = f"distlora: {_one_line('name', config.name)}"
    machines = "one machine" if cluster.nodes == 1 else f"{cluster.nodes} machines"
    processes = "one process" if cluster.gpus_per_node == 1 else f"{cluster.gpus_per_node} processes"
    of_each = " on each" if cluster.nodes > 1 else ""
    return f"{name}, {f'{tasks} runs, each ' if tasks else ''}on {machines}, {processes}{of_each}."


def _options(config: Config, gpus: bool, tasks: Sequence[int]) -> list[tuple[str, str | None]]:
    """Options of sbatch by name; None stands for an option without a value. Those that the user adds come after, where
    they win."""
    cluster = config.cluster
    log = f"{SLURM}%j.log" if not tasks else f"%a/logs/{SLURM}%A_%a.log"
    folder = config.run_dir.replace("%", "%%") + ("" if tasks else "/logs")
    throttle = f"%{cluster.max_parallel}" if cluster.max_parallel is not None else ""
    options: list[tuple[str, str | None]] = [("job-name", config.name)]
    for name, value in (
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("time", cluster.time_limit),
    ):
        options += [(name, value)] if value is not None else []
    options += [("array", _ranges(tasks) + throttle)] if tasks else []
    options += [("nodes", str(cluster.nodes)), ("ntasks-per-node", "1")]
    if gpus and not any(_GPU_OPTION.match(option) for option in cluster.sbatch):
        options.append(("gpus-per-node", str(cluster.gpus_per_node)))
    options += [("cpus-per-task", str(cluster.cpus_per_task))] if cluster.cpus_per_task is not None else []
    options += [("mem", cluster.memory)] if cluster.memory is not None else []
    return [
        *options,
        ("signal", f"B:USR1@{cluster.signal_seconds}"),
        ("requeue" if cluster.requeue else "no-requeue", None),
        ("chdir", str(Path.cwd())),
        ("output", f"{folder}/{log}"),
        ("open-mode", "append"),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for ascending numbers."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _option(name: str, value: str | None) -> str:
    """`--name=value` as a line of #SBATCH, whose quotes are double and know the backslash."""
    if value is None:
        return f"--{name}"
    value = _one_line(f"--{name}", value)
    plain = re.fullmatch(r"[\w./:@%+,=\[\]-]+", value) is not None
    return f"--{name}={value}" if plain else '--{}="{}"'.format(name, re.sub(r'(["\\])', r"\\\1", value))


def _one_line(what: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise UserError(f"{what}={value!r} has a line break, which a script for sbatch cannot hold; leave it out")
    return value


def _srun_options(cluster: ClusterConfig, places: Sequence[str]) -> list[str]:
    """Options of the step. Those that a step does not take from its job by itself are said again."""
    options = ["--kill-on-bad-exit=1", "--export=ALL"]
    if cluster.cpus_per_task is not None:  # Not inherited since SLURM 22.05.
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container is not None:
        mounts = [f"{place}:{place}" for place in places] + list(cluster.container_mounts)
        options.append(f"--container-image={shlex.quote(cluster.container)}")
        # The run folder by its variable: each task of an array has its own.
        options.append(f'--container-mounts="$RUN:$RUN",{shlex.quote(",".join(mounts))}')
    return options


def _places(runs: Sequence[Config]) -> list[str]:
    """What runs read outside their own folders, each once: bases, prepared data, adapters to start from."""
    places = []
    for run in runs:
        if not is_hub_name(run.model.path):
            places.append(_with_links(Path(run.model.path)))
        places.append(Path(run.data.cache_dir))
        if run.adapter.init_from is not None:
            places.append(Path(run.adapter.init_from))
    outer = [place for place in places if not any(other in place.parents for other in places)]
    return [str(place) for place in dict.fromkeys(outer)]


def _with_links(model: Path) -> Path:
    """The folder that holds a model's files: a snapshot in the hub's cache is links into the folder two above it."""
    return model.parent.parent if model.parent.name == "snapshots" else model
