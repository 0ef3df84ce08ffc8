"""A sweep: what it searches, in Hydra's grammar, and its file SWEEP/sweep.yaml."""

import contextlib
import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from distlora.config import Config, UserError, require
from distlora.config.checks import check_section
from distlora.config.errors import short
from distlora.config.file import build, parse_yaml
from distlora.config.json_files import Shape, check_shape
from distlora.config.sweep import METHODS, SweepConfig
from distlora.run_folder.sweep import SWEEP_NAME, trial_folder, words_of
from distlora_launcher.compose.compose import (
    Composed,
    compose_run,
    compose_section,
    parse_overrides,
    section_of,
)
from distlora_launcher.compose.overrides import leaves
from distlora_launcher.launch.local import write_new


@dataclass(frozen=True, slots=True)
class Values:
    """A setting that takes one of these values, in this order."""

    setting: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.setting}: {', '.join(map(str, self.values))}"


@dataclass(frozen=True, slots=True)
class Interval:
    """A setting that takes any number from `low` to `high`, both included."""

    setting: str
    low: float
    high: float
    log: bool = False
    """Draw by logarithm: as many values from 1e-5 to 1e-4 as from 1e-4 to 1e-3."""
    integer: bool = False

    def __str__(self) -> str:
        kind = ", by logarithm" if self.log else ""
        return f"{self.setting}: {'integers ' if self.integer else ''}{self.low:g} to {self.high:g}{kind}"


Dimension = Values | Interval


def split(
    overrides: Sequence[str], space: Mapping[str, str], *, config_dir: str | None = None
) -> tuple[tuple[Dimension, ...], list[str]]:
    """Return what is searched and the overrides that all trials share.

    `space` (`sweep.space`) adds to the command line; an override replaces its entry for the same setting. Raises
    UserError for what cannot be searched.
    """
    space_values = [f"{setting}={text}" for setting, text in space.items()]
    dimensions: dict[str, Dimension] = {}
    for override in parse_overrides(space_values, config_dir=config_dir):
        setting = _setting(override)
        require(
            override.is_sweep_override(),
            f"sweep.space has one value for {setting} ({space.get(setting)}); write several, separated by commas, or "
            f"leave it out of sweep.space and set {setting}",
        )
        dimensions[setting] = _dimension(override)
    shared = []
    for word, override in zip(overrides, parse_overrides(overrides, config_dir=config_dir), strict=True):
        setting = _setting(override)
        if override.is_sweep_override():
            dimensions[setting] = _dimension(override)
        else:
            dimensions.pop(setting, None)
            shared.append(word)
    return tuple(dimensions.values()), shared


def is_finite(space: Sequence[Dimension]) -> bool:
    """Return whether the space has no interval."""
    return all(isinstance(dimension, Values) for dimension in space)


def cells(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Yield every combination of a finite space, the last setting's values changing fastest, as Hydra's -m does."""
    lists = [dimension.values for dimension in space if isinstance(dimension, Values)]
    settings = [dimension.setting for dimension in space]
    for combination in itertools.product(*lists):
        yield dict(zip(settings, combination, strict=True))


def count_cells(space: Sequence[Dimension]) -> int:
    """Return the number of combinations of a finite space."""
    return math.prod(len(dimension.values) for dimension in space if isinstance(dimension, Values))


def first_cell(space: Sequence[Dimension]) -> dict[str, Any]:
    """Return one combination, to check what all trials share."""
    return {d.setting: d.values[0] if isinstance(d, Values) else d.low for d in space}


def as_records(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Return the space as plain values, for SWEEP/sweep.yaml."""
    return [dataclasses.asdict(d) | ({"values": list(d.values)} if isinstance(d, Values) else {}) for d in space]


def from_records(records: Sequence[Mapping[str, Any]]) -> tuple[Dimension, ...]:
    """Return the space that `as_records` wrote."""
    return tuple(
        Values(record["setting"], tuple(record["values"])) if "values" in record else Interval(**record)
        for record in records
    )


def _setting(override: Override) -> str:
    """Return the setting's name without Hydra's mark of a new key."""
    name: str = override.get_key_element()
    return name.lstrip("+")


def _dimension(override: Override) -> Dimension:
    setting, value = _setting(override), override.value()
    require(
        section_of(setting) not in ("sweep", "hydra") and setting != "run_dir",
        f"{override.input_line}: {setting} is a setting of the sweep, not of its trials; give it one value",
    )
    if isinstance(value, IntervalSweep):
        return _interval(setting, value)
    values = tuple(Override._convert_value(item) for item in override.sweep_iterator())
    require(len(values) > 0, f"{override.input_line} has no value; write {setting}=a,b")
    twice = [item for index, item in enumerate(values) if item in values[:index] and type(item) is not bool]
    require(not twice, f"{override.input_line} has {twice[0] if twice else ''} twice; leave one out")
    return Values(setting, values)


def _interval(setting: str, sweep: IntervalSweep) -> Interval:
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    unknown = sorted(sweep.tags - {"log"})
    if unknown:
        raise UserError(f"{setting}: unknown tag {unknown[0]}; write tag(log,interval(a,b)) or interval(a,b)")
    assert low is not None, "Hydra's grammar asks for both"
    assert high is not None, "Hydra's grammar asks for both"
    require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"{setting}=interval({low:g},{high:g}) is empty; write the smaller number first",
    )
    require(
        not log or low > 0,
        f"{setting}=tag(log,interval({low:g},{high:g})): a logarithmic interval must start above 0",
    )
    whole = float(low).is_integer() and float(high).is_integer()
    require(
        whole or not _is_whole_number(setting),
        f"{setting}=interval({low:g},{high:g}): {setting} is an integer; write integer bounds",
    )
    integer = (isinstance(low, int) and isinstance(high, int)) or _is_whole_number(setting)
    low, high = (int(low), int(high)) if integer else (low, high)
    return Interval(setting, low, high, log=log, integer=integer)


def _is_whole_number(setting: str) -> bool:
    """Return whether a setting takes integers only: Hydra's interval(8,64) is of floats."""
    section, _, name = setting.partition(".")
    cls = typing.get_type_hints(Config).get(section)
    kind = typing.get_type_hints(cls).get(name) if cls is not None and dataclasses.is_dataclass(cls) else None
    kinds = set(typing.get_args(kind) or (kind,)) - {type(None)}
    return kinds == {int}


OWNERS = {"sampler": "optuna"} | dict.fromkeys(
    ("rank_start", "rank_most", "confidence", "bootstrap", "full", "full_lr"), "rank_search"
)
"""Settings of the section `sweep` that belong to one method."""


def read_section(
    overrides: Sequence[str], *, config_dir: str | None = None
) -> tuple[SweepConfig, tuple[Dimension, ...], list[str]]:
    """Return the section `sweep`, what is searched, and the overrides that all trials share.

    The method is `grid` unless sweep=METHOD is given. Raises UserError for unknown or unused settings of the section
    and for what cannot be searched.
    """
    sweep_overrides = [word for word in overrides if section_of(word) == "sweep"]
    if not any(word.startswith("sweep=") for word in sweep_overrides):
        sweep_overrides.insert(0, "sweep=grid")
    for word in sweep_overrides:
        require(
            not parse_overrides([word])[0].is_sweep_override(),
            f"{word}: a sweep has one value of it; start another sweep for the other value",
        )
    _refuse_of_other_methods(sweep_overrides)
    values: Any = compose_section("sweep", sweep_overrides, config_dir=config_dir)
    require(isinstance(values, dict), "sweep=null is not a sweep; write sweep=grid, or use `distlora train`")
    space_values = dict(leaves(values.get("space") or {}))
    for setting, value in space_values.items():
        require(
            isinstance(value, str),
            f"sweep.space.{setting}={short(value)} is one value; write several, in quotes: "
            f"sweep.space.{setting}='\"a,b\"', or {setting}=a,b without sweep.space",
        )
    settings = build(SweepConfig, values | {"space": space_values}, prefix="sweep.")
    check_section("sweep", settings)
    others = [word for word in overrides if section_of(word) != "sweep"]
    return settings, *split(others, settings.space, config_dir=config_dir)


def _refuse_of_other_methods(sweep_overrides: Sequence[str]) -> None:
    """Refuse settings of another method, or without effect, with distlora's options of the group."""
    method = next(word for word in sweep_overrides if word.startswith("sweep=")).partition("=")[2]
    given = {word.partition("=")[0].lstrip("+"): word for word in sweep_overrides}
    for name, owner in OWNERS.items():
        word = given.get(f"sweep.{name}", "")
        require(
            method not in METHODS or owner == method or not word,
            f"{word} is a setting of sweep={owner}; add sweep={owner}, or leave it out",
        )
    if method == "grid":
        require(
            "sweep.seed" not in given, "sweep.seed has no effect with sweep=grid, which draws nothing; leave it out"
        )
    pruner = given.get("sweep.pruner", "sweep.pruner=median" if method == "optuna" else "sweep.pruner=none")
    require(
        pruner != "sweep.pruner=none" or "sweep.pruner_warmup" not in given or method not in METHODS,
        "sweep.pruner_warmup has no effect without a pruner; set sweep.pruner=median, or leave it out",
    )


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
    remedy = "restore a complete copy, or start the sweep again in another folder"
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
