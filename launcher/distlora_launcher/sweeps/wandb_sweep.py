"""Create a wandb sweep from the section `sweep` and the settings with several values (`distlora sweep create`).

`distlora sweep agent`: wandb_agents.py.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distlora.config import TrackerConfig, UserError, require
from distlora.config.file import as_mapping
from distlora.config.places import means_hub
from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import words_of
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.compose import PATHS
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.parse import check_trials, parse_sweep
from distlora_launcher.sweeps.search import make_search
from distlora_launcher.sweeps.space import Dimension, Interval, Values
from distlora_launcher.terminal.output import say, shown, warn

FILE_NAME = "wandb_sweep.yaml"
"""File in the sweep's folder that is registered."""

USAGE = """usage: distlora sweep create [sweep=grid|random|optuna] [setting=a,b ...] [setting=value ...] [--dry-run]

Write a sweep for wandb, whose server chooses the values, and register it with `wandb sweep` (log in first: `wandb
login`). Settings with several values are searched, as with `distlora sweep`: grid tries all, random draws sweep.trials
of them, optuna stands for wandb's own search (bayes). sweep.pruner=hyperband or median ends trials that fall behind, by
wandb's hyperband. tracker.project and tracker.entity name its project. The file is RUN_DIR/wandb_sweep.yaml.

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
    check_settings(sweep.settings, sweep.space, sections)
    check_trials(sweep, make_search(sweep), first)
    options = [] if sweep.config_dir is None else [f"--config-dir={sweep.config_dir}"]
    overrides = [*options, *placed(sweep.overrides, sections)]
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
    sweep.folder.mkdir(parents=True, exist_ok=True)
    file = sweep.folder / FILE_NAME
    require(not file.exists(), f"{file} already exists; set another run_dir, or `wandb sweep {shown(file)}`")
    atomic_io.write_text(file, text)
    path = register(file, first.config.tracker)
    say(f"sweep {path}, as {shown(file)} says")
    say(f"start its runs with: distlora sweep agent {path}   (any number of times, on any node)")
    return DONE


def check_settings(settings: SweepConfig, space: Sequence[Dimension], sections: Mapping[str, Any]) -> None:
    """Refuse what wandb's search cannot do."""
    require(
        settings.method in METHODS,
        f"sweep={settings.method} chooses trials by their results, which wandb's server does here; write `distlora "
        f"sweep sweep={settings.method}` without create, or set sweep=grid, random or optuna",
    )
    require(
        settings.packed == 1,
        f"sweep.packed={settings.packed} trains trials together on one base, and wandb starts each by itself; leave it "
        "out, or write `distlora sweep` without create",
    )
    require(
        sections["tracker"]["name"] == "wandb",
        f"tracker={sections['tracker']['name']} logs nothing to wandb, which compares the logged values; leave it out",
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


def placed(overrides: Sequence[str], sections: Mapping[str, Any]) -> list[str]:
    """Return the overrides with absolute paths."""
    found = []
    for word in overrides:
        name = word.partition("=")[0].lstrip("+")
        section, _, key = name.partition(".")
        found += words_of({name: sections[section][key]}) if name in (*PATHS, "data.sources") else [word]
    return found


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
