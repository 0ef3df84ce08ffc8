"""Render sbatch scripts: of a run or an array (slurm/job.sbatch.jinja), of a sweep (slurm/sweep.sbatch.jinja)."""

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
from distlora.config.base import is_hub_name
from distlora.run_folder.submission import SLURM
from distlora.system import atomic_io
from distlora_launcher.terminal.output import say, shown

SCRIPT_NAME = "job.sbatch"
"""File name of the script in the folder of a run or a sweep."""
SUM_NAME = f"{SCRIPT_NAME}.sha256"
"""File beside the script with its SHA-256 as it was written, in sha256sum's format."""

_RUN_TEMPLATE, _SWEEP_TEMPLATE = "job.sbatch.jinja", "sweep.sbatch.jinja"
_GPU_OPTION = re.compile(r"(--gpus|--gpus-per-(node|task|socket))\b|-G|--(gres|tres-per-\w+)\b.*\bgpu\b")
"""Options of sbatch that request GPUs; a --gres may also be for something else."""


def render(config: Config, *, gpus: bool, tasks: Sequence[Config] = ()) -> str:
    """Return the script of a run, or with `tasks` that of an array.

    config.run_dir is then the folder of the sweep, whose runs are in folders named by their numbers. gpus: whether to
    request GPUs. Raises UserError for a text that #SBATCH cannot hold.
    """
    return _fill(
        _RUN_TEMPLATE,
        Path(config.run_dir),
        config.name,
        config.cluster,
        what=f"{len(tasks)} runs, each " if tasks else "",
        gpus=gpus,
        tasks=[int(Path(task.run_dir).name) for task in tasks],
        log=f"%a/logs/{SLURM}%A_%a.log" if tasks else f"logs/{SLURM}%j.log",
        mounts=mounts(tasks or [config]),
        array=len(tasks) > 0,
        run=shlex.quote(config.run_dir),
        time_limit_in="cluster.time_limit in $RUN/config.yaml",
        again="distlora resume $RUN",
    )


def render_workers(
    folder: Path,
    name: str,
    cluster: ClusterConfig,
    *,
    gpus: bool,
    workers: int,
    worker: Sequence[str],
    trials: str,
    mounts: Sequence[str] = (),
) -> str:
    """Return the script of an array of workers of the sweep in a folder.

    Each runs `python -m` with the arguments `worker` and its number. trials: a bash pattern of the trials' folders.
    mounts: folders that a container needs beside the sweep's. Raises UserError for a text that #SBATCH cannot hold, and
    if bash cannot parse the script.
    """
    script = _fill(
        _SWEEP_TEMPLATE,
        folder,
        name,
        cluster,
        what=f"{workers} worker{'s' if workers > 1 else ''} of a sweep, each ",
        gpus=gpus,
        tasks=range(workers),
        log=f"logs/{SLURM}%A_%a.log",
        mounts=mounts,
        sweep=shlex.quote(str(folder)),
        submitter=shlex.quote(sys.executable),
        worker=f'{shlex.join(worker)} --index "$SLURM_ARRAY_TASK_ID"',
        trials=trials,
        time_limit_in=f"#SBATCH --time in {SCRIPT_NAME}",
        again="distlora resume $SWEEP",
    )
    check_shell(cluster.setup, script)
    return script


def _fill(
    template: str,
    folder: Path,
    name: str,
    cluster: ClusterConfig,
    *,
    what: str,
    gpus: bool,
    tasks: Sequence[int],
    log: str,
    mounts: Sequence[str],
    **values: Any,
) -> str:
    """Return a template rendered with `values` and the cluster's settings; `log` is relative to the folder."""
    import jinja2

    nodes = "one node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    processes = "one process" if cluster.gpus_per_node == 1 else f"{cluster.gpus_per_node} processes"
    per_node = " on each" if cluster.nodes > 1 else ""
    output = f"{folder}".replace("%", "%%") + f"/{log}"
    files = resources.files("distlora_launcher.slurm")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: files.joinpath(file).read_text(encoding="utf-8")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        title=f"distlora: {_one_line('name', name)}, {what}on {nodes}, {processes}{per_node}.",
        script=shlex.quote(str(folder / SCRIPT_NAME)),
        options=[*_options(name, cluster, gpus, tasks, output), *cluster.sbatch],
        port=cluster.port,
        python="python" if cluster.container else shlex.quote(sys.executable),
        setup=cluster.setup,
        environment=[(name, shlex.quote(value)) for name, value in cluster.environment.items()],
        signal_seconds=cluster.signal_seconds,
        requeue=cluster.requeue,
        srun=_srun_options(cluster, mounts),
        container=cluster.container is not None,
        **values,
    )


def write_script(folder: Path, script: str) -> bool:
    """Write a script unless the one there was changed by hand, which is printed; return whether it was written."""
    path, sums = folder / SCRIPT_NAME, folder / SUM_NAME
    if path.is_file():
        there = path.read_text(encoding="utf-8")
        # Without its sum it may be a person's; then it is kept, if there is something to keep.
        ours = sums.read_text(encoding="utf-8") == _sum(there) if sums.is_file() else there == script
        if not ours:
            again = "(remove it to have it written from config.yaml again)"
            say(f"{shown(path)} was changed by hand and is submitted as it is {again}")
            return False
    atomic_io.write_text(path, script)
    atomic_io.write_text(sums, _sum(script))
    return True


def check_shell(setup: Sequence[str], script: str) -> None:
    """Raise UserError if bash cannot parse the script; only its cluster.setup lines are the user's."""
    try:
        read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return  # It is for nodes that have SLURM.
    if read.returncode != 0:
        reason = "; ".join(line.removeprefix("bash: ") for line in read.stderr.splitlines())
        raise UserError(
            f"cluster.setup={list(setup)} is not valid bash ({reason}); correct it: each entry is a line of a script"
        )


def _sum(script: str) -> str:
    return f"{hashlib.sha256(script.encode()).hexdigest()}  {SCRIPT_NAME}\n"


def _options(name: str, cluster: ClusterConfig, gpus: bool, tasks: Sequence[int], output: str) -> list[str]:
    """Return sbatch's options. The user's own options follow them, and so win."""
    throttle = f"%{cluster.max_parallel}" if cluster.max_parallel is not None else ""
    asks_for_gpus = gpus and not any(_GPU_OPTION.match(option) for option in cluster.sbatch)
    options = {
        "job-name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_limit,
        "array": ranges(tasks) + throttle if tasks else None,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(cluster.gpus_per_node) if asks_for_gpus else None,
        "cpus-per-task": None if cluster.cpus_per_task is None else str(cluster.cpus_per_task),
        "mem": cluster.memory,
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "requeue" if cluster.requeue else "no-requeue": "",
        "chdir": str(Path.cwd()),
        "output": output,
        "open-mode": "append",
    }
    return [_option(option, value) for option, value in options.items() if value is not None]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `0-3,7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def array_option(script: str, numbers: Sequence[int]) -> str:
    """Return `--array` for some tasks of a script that stays as it is, with its limit of parallel tasks."""
    throttle = re.search(r"^#SBATCH\s+(?:--array=|-a\s*)\S*?(%\d+)\s*$", script, re.MULTILINE)
    return f"--array={ranges(numbers)}{throttle[1] if throttle is not None else ''}"


def _option(name: str, value: str) -> str:
    """Return `--name=value` as a line of #SBATCH, which knows double quotes and the backslash."""
    if not value:
        return f"--{name}"
    value = _one_line(f"--{name}", value)
    plain = re.fullmatch(r"[\w./:@%+,=\[\]-]+", value) is not None
    return f"--{name}={value}" if plain else '--{}="{}"'.format(name, re.sub(r'(["\\])', r"\\\1", value))


def _one_line(what: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise UserError(f"{what}={value!r} has a line break, which a script for sbatch cannot hold; leave it out")
    return value


def _srun_options(cluster: ClusterConfig, mounts: Sequence[str]) -> list[str]:
    """Return the options of srun, with those that a step does not inherit from its job."""
    options = ["--kill-on-bad-exit=1", "--export=ALL"]
    if cluster.cpus_per_task is not None:  # Not inherited since SLURM 22.05.
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container is not None:
        pairs = [f"{place}:{place}" for place in mounts] + list(cluster.container_mounts)
        options.append(f"--container-image={shlex.quote(cluster.container)}")
        # The run folder by its variable: each task of an array has its own.
        options.append(f'--container-mounts="$RUN:$RUN",{shlex.quote(",".join(pairs))}')
    return options


def mounts(runs: Sequence[Config]) -> list[str]:
    """Return the folders that runs read outside their run folders: models, data, quantized bases, adapters, rewards."""
    places = []
    for run in runs:
        if not is_hub_name(run.model.path):
            model = Path(run.model.path)
            # A snapshot of the hub's cache links into the folder two above it.
            places.append(model.parent.parent if model.parent.name == "snapshots" else model)
        places.append(Path(run.data.cache_dir))
        if run.quant.keeps_shards:  # In the container it would be kept in memory.
            places.append(Path(run.quant.cache_dir))
        others = (run.adapter.init_from, run.data.reward_folder, *run.data.reward_models.values())
        places += [Path(place) for place in others if place is not None]
    outer = [place for place in places if not any(other in place.parents for other in places)]
    return [str(place) for place in dict.fromkeys(outer)]
