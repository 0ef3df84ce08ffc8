"""The sbatch script of a run, of runs as an array (slurm/job.sbatch.jinja), or of the workers of a sweep
(slurm/sweep.sbatch.jinja), filled with the settings."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from distlora.config import ClusterConfig, Config, UserError
from distlora.config.places import is_hub_name
from distlora.system import atomic_io
from distlora_launcher.launch.logs import SLURM

SCRIPT_NAME = "job.sbatch"
"""In the run folder, or in a sweep's."""
SUM_NAME = f"{SCRIPT_NAME}.sha256"
"""Beside it: its SHA-256 as it was written, as sha256sum prints it."""

_OF_RUNS, _OF_WORKERS = "job.sbatch.jinja", "sweep.sbatch.jinja"
_GPU_OPTION = re.compile(r"(--gpus|--gpus-per-(node|task|socket))\b|-G|--(gres|tres-per-\w+)\b.*\bgpu\b")
"""Options by which the user asks for GPUs his own way. A --gres may also be for something else."""


def render(config: Config, *, gpus: bool, tasks: Sequence[Config] = ()) -> str:
    """The script of a run; with `tasks` that of a sweep, whose folder is config.run_dir and whose runs lie in there by
    their numbers. `gpus`: whether to ask SLURM for GPUs. Raises UserError for a text that #SBATCH cannot hold.
    """
    numbers = [int(Path(task.run_dir).name) for task in tasks]
    folder = Path(config.run_dir)
    return _filled(
        _OF_RUNS,
        config,
        tasks or [config],
        title=_title(config, f"{len(tasks)} runs, each " if tasks else ""),
        options=_options(config, gpus, numbers),
        array=len(tasks) > 0,
        run=shlex.quote(str(folder)),
        time_limit_in="cluster.time_limit in $RUN/config.yaml",
        again="distlora resume $RUN",
    )


def render_workers(
    config: Config, *, gpus: bool, workers: int, worker: Sequence[str], trials: str, time_limit_in: str, again: str
) -> str:
    """The script of an array of workers of the sweep in config.run_dir, each `python -m` the words `worker` and its
    number. `trials`: where in there the trials' folders are, as bash finds them."""
    quoted = " ".join(map(shlex.quote, worker))
    return _filled(
        _OF_WORKERS,
        config,
        [config],
        title=_title(config, f"{workers} worker{'s' if workers > 1 else ''} of a sweep, each "),
        options=_options(config, gpus, range(workers), log=f"logs/{SLURM}%A_%a.log"),
        sweep=shlex.quote(config.run_dir),
        submitter=shlex.quote(sys.executable),
        worker=f'{quoted} --index "$SLURM_ARRAY_TASK_ID"',
        trials=trials,
        time_limit_in=time_limit_in,
        again=again,
    )


def _filled(
    template: str, config: Config, runs: Sequence[Config], *, options: Sequence[tuple[str, str | None]], **values: Any
) -> str:
    """A template with `values` and what all have of the section cluster."""
    import jinja2

    cluster, folder = config.cluster, Path(config.run_dir)
    files = resources.files("distlora_launcher.slurm")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        script=shlex.quote(str(folder / SCRIPT_NAME)),
        options=[_option(name, value) for name, value in options] + list(cluster.sbatch),
        port=cluster.port,
        python="python" if cluster.container else shlex.quote(sys.executable),
        setup=cluster.setup,
        environment=[(name, shlex.quote(value)) for name, value in cluster.environment.items()],
        signal_seconds=cluster.signal_seconds,
        requeue=cluster.requeue,
        srun=_srun_options(cluster, _places(runs)),
        container=cluster.container is not None,
        **values,
    )


def write_script(folder: Path, script: str) -> bool:
    """Write a script, unless one is there that somebody has changed since it was written. Returns whether it did."""
    path, sums = folder / SCRIPT_NAME, folder / SUM_NAME
    if path.is_file():
        there = path.read_text(encoding="utf-8")
        # Without its sum it may be a person's; then it is kept, if there is something to keep.
        ours = sums.read_text(encoding="utf-8") == _sum(there) if sums.is_file() else there == script
        if not ours:
            return False
    atomic_io.write_text(path, script)
    atomic_io.write_text(sums, _sum(script))
    return True


def check_shell(config: Config, script: str) -> None:
    """Raises UserError for a script that bash cannot read: of what it holds, only cluster.setup is not ours."""
    try:
        read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return  # It is for the machines that have SLURM.
    if read.returncode != 0:
        reason = "; ".join(line.removeprefix("bash: ") for line in read.stderr.splitlines())
        raise UserError(
            f"cluster.setup={list(config.cluster.setup)} is nothing that bash can read ({reason}); correct it: an "
            "entry is a line of a script"
        )


def _sum(script: str) -> str:
    return f"{hashlib.sha256(script.encode()).hexdigest()}  {SCRIPT_NAME}\n"


def _title(config: Config, what: str) -> str:
    """What the script does, in a line; `what`: of how much."""
    cluster = config.cluster
    name = f"distlora: {_one_line('name', config.name)}"
    machines = "one machine" if cluster.nodes == 1 else f"{cluster.nodes} machines"
    processes = "one process" if cluster.gpus_per_node == 1 else f"{cluster.gpus_per_node} processes"
    of_each = " on each" if cluster.nodes > 1 else ""
    return f"{name}, {what}on {machines}, {processes}{of_each}."


def _options(
    config: Config, gpus: bool, tasks: Sequence[int], *, log: str | None = None
) -> list[tuple[str, str | None]]:
    """Options of sbatch by name; None stands for an option without a value. Those that the user adds come after, where
    they win. `log`: its place in the folder, where not each task has a folder of its own."""
    cluster = config.cluster
    log = log or (f"logs/{SLURM}%j.log" if not tasks else f"%a/logs/{SLURM}%A_%a.log")
    folder = config.run_dir.replace("%", "%%")
    throttle = f"%{cluster.max_parallel}" if cluster.max_parallel is not None else ""
    options: list[tuple[str, str | None]] = [("job-name", config.name)]
    for name, value in (
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("time", cluster.time_limit),
    ):
        options += [(name, value)] if value is not None else []
    options += [("array", ranges(tasks) + throttle)] if tasks else []
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


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def array_option(script: str, numbers: Sequence[int]) -> str:
    """`--array` of some of its tasks for a script that is not to be written again; how many run at once stays its."""
    throttle = re.search(r"^#SBATCH\s+(?:--array=|-a\s*)\S*?(%\d+)\s*$", script, re.MULTILINE)
    return f"--array={ranges(numbers)}{throttle[1] if throttle is not None else ''}"


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
        if run.quant.keeps_shards:  # In the container it would be kept in memory.
            places.append(Path(run.quant.cache_dir))
        if run.adapter.init_from is not None:
            places.append(Path(run.adapter.init_from))
    outer = [place for place in places if not any(other in place.parents for other in places)]
    return [str(place) for place in dict.fromkeys(outer)]


def _with_links(model: Path) -> Path:
    """The folder that holds a model's files: a snapshot in the hub's cache is links into the folder two above it."""
    return model.parent.parent if model.parent.name == "snapshots" else model
