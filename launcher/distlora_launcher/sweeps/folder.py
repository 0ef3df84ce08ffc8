"""Write and read SWEEP/sweep.yaml, and compose the settings of a trial."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError, require
from distlora.config.file import build, parse_yaml
from distlora.config.json_files import Shape, check_shape
from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import SWEEP_NAME, trial_folder, words_of
from distlora_launcher.compose.compose import Composed, compose_run, section_of
from distlora_launcher.launch.local import write_new
from distlora_launcher.sweeps.space import Dimension, as_records, from_records

LOGS = "logs"
"""Folder in SWEEP for the output of workers and trials."""

_SWEEP: Shape = {
    "settings": dict,
    "words": [str],
    "space": [dict],
    "config_dir": (str, type(None)),
    "cwd": str,
    "name": (str, type(None)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep: what is searched, how, and what all trials share."""

    folder: Path
    settings: SweepConfig
    overrides: tuple[str, ...]
    """Overrides of `distlora train` that all trials share."""
    space: tuple[Dimension, ...]
    config_dir: str | None
    """Folder of --config-dir."""
    cwd: str
    """Folder of the command, to which relative paths in the overrides refer."""
    name: str | None = None
    """Name of the runs, to which each trial's number is added; None if `name` is searched."""

    def run_dir(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return trial_folder(self.folder, number)

    def trial_overrides(self, number: int, values: Mapping[str, Any], extra: tuple[str, ...] = ()) -> list[str]:
        """Return the overrides of `distlora train` for a trial.

        The user's overrides go before `extra`, which are the search's. For full fine-tuning in a rank search, overrides
        of `adapter` and `quant` are left out.
        """
        unused = (
            ("adapter", "quant") if values.get("adapter") == "full" and self.settings.method == "rank_search" else ()
        )
        shared = [word for word in self.overrides if section_of(word) not in unused]
        settings = {} if self.name is None else {"name": f"{self.name}-{number:04d}"}
        settings["run_dir"] = str(self.run_dir(number))
        return [*extra, *shared, *words_of(values), *words_of(settings)]

    def compose(self, number: int, values: Mapping[str, Any], extra: tuple[str, ...] = ()) -> Composed:
        """Return the settings of a trial. Raises UserError as `distlora train` does."""
        require(
            Path(self.cwd).is_dir(),
            f"{self.cwd} no longer exists: {self.folder} was started there, and relative paths refer to it; restore "
            f"it, or make the paths in {self.folder / SWEEP_NAME} absolute and set cwd there to another folder",
        )
        with contextlib.chdir(self.cwd):
            return compose_run(self.trial_overrides(number, values, extra), config_dir=self.config_dir)


def make_sweep(sweep: Sweep) -> None:
    """Write SWEEP/sweep.yaml atomically; raise UserError if it exists, so that one of two starts is refused."""
    values = {
        "settings": dataclasses.asdict(sweep.settings),
        "words": list(sweep.overrides),
        "space": as_records(sweep.space),
        "config_dir": sweep.config_dir,
        "cwd": sweep.cwd,
        "name": sweep.name,
    }
    write_new(sweep.folder / SWEEP_NAME, values, "sweep")


def load_sweep(folder: Path) -> Sweep:
    """Return the sweep in a folder. Raises UserError if there is none, or if it is damaged."""
    path = folder / SWEEP_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no sweep (no {SWEEP_NAME}); start one with `distlora sweep`")
    remedy = "put a whole copy in its place, or start the sweep again in another folder"
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    check_shape(values, _SWEEP, path, remedy)
    try:
        settings, space = build(SweepConfig, values["settings"], prefix="sweep."), from_records(values["space"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    return Sweep(
        folder=folder,
        settings=settings,
        overrides=tuple(values["words"]),
        space=space,
        config_dir=values["config_dir"],
        cwd=values["cwd"],
        name=values["name"],
    )
