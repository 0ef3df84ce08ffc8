"""Compose a `Config` from command-line overrides: Hydra composes conf/, distlora.config checks and types the result.

Hydra raises a dozen kinds of exceptions for a mistyped override, which explain.py turns into UserErrors.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, Node, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError
from omegaconf.resolvers import oc

from distlora.config import TARGET_PRESETS, Config, GpuConfig, UserError, require
from distlora.config.base import cache_root, means_hub
from distlora.config.file import build
from distlora.config.plan import GPUS
from distlora.config.rewards import BUILT_IN
from distlora.config.training import TRACKERS
from distlora.planner.mixed import with_formats
from distlora.rewards.find import source_digests
from distlora.run_folder.sweep import words_of
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter
from distlora_launcher.compose.explain import EXAMPLE, EXPLAINED, REQUIRED, explain, refuse_unusable
from distlora_launcher.compose.options import (
    CONF_MODULE,
    leaves,
    over_recipes,
    parsed,
    restore_options,
    user_settings,
    without_replaced,
)

VERSION_BASE = "1.3"
MISSING = "???"
UNSET = "/dev/null/unset"
"""Stands for a path that may still be missing; no folder can be there."""

MOST_JOBS_CHECKED = 64
"""Jobs of a sweep that are checked before the first one starts; the others are checked as they start."""


PATHS = (
    "model.path",
    "data.path",
    "data.eval_path",
    "data.cache_dir",
    "data.reward_folder",
    "quant.cache_dir",
    "quant.harm",
    "adapter.init_from",
    "train.teacher",
    "parallel.deepspeed_config",
)
"""Settings that are paths, beside data.sources and data.template."""

MAPPINGS = (
    "model.special_tokens",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "quant.formats",
    "data.columns",
    "data.reward_digests",
    "data.reward_columns",
    "data.reward_constants",
    "cluster.environment",
    "sweep.space",
)
"""Settings whose keys the user chooses."""
OF_ONE_OPTION = tuple(f"tracker.{name}" for name in TRACKERS)
"""Settings that only one option of their group has."""


# The group `gpu` is the table of GPUs, so that `gpu=h100` picks one by its name.
for _name in ("auto", *GPUS):
    ConfigStore.instance().store(group="gpu", name=_name, node=dataclasses.asdict(GpuConfig(name=_name)))
# `${cache_root:}` in conf/.
OmegaConf.register_new_resolver("cache_root", lambda: str(cache_root()), replace=True)


def _path_of_environment(name: str, *default: Any, _node_: Node) -> str | None:
    """Resolve `${oc.env:NAME}` and `${oc.env:NAME,DEFAULT}`: an absolute path, in a setting that is a path.

    RUN, trackers and model cards show the settings, so another value, which may be a credential, is refused unseen.
    """
    key = _node_._get_full_key(None)
    is_path = key in (*PATHS, "data.template", "run_dir", "hydra.run.dir", "hydra.sweep.dir")
    if not is_path and not re.fullmatch(r"(data\.sources\[\d+\]\.path|hydra\.searchpath\[\d+\])", key):
        reason = "an environment variable can be read in settings that are paths only"
    elif name in os.environ and not os.path.isabs(os.environ[name]):
        reason = "the environment variable is not an absolute path"
    else:
        return oc.env(name, *default)
    raise InterpolationResolutionError(
        f"{key} has ${{oc.env:{name}}}, and {reason}, because RUN/config.yaml and trackers show every setting; write "
        "the value itself if all may read it"
    )


OmegaConf.register_new_resolver("oc.env", _path_of_environment, replace=True)


def with_new_keys(word: str) -> str:
    """Return an override with Hydra's mark for new keys if the chosen options may lack its key."""
    key = word.partition("=")[0]
    return (
        f"++{word}" if any(key == name or key.startswith(name + ".") for name in (*MAPPINGS, *OF_ONE_OPTION)) else word
    )


def expand_home(word: str) -> str:
    """Return `data.path=~/x` with ~ expanded, which bash does not do and Hydra's grammar does not allow."""
    key, _, value = word.partition("=")
    return f"{key}={Path.home()}{value[1:]}" if value == "~" or value.startswith("~/") else word


def section_of(word: str) -> str:
    """Return the section or group of an override: `adapter` for adapter=full, +adapter.r=8 and ~adapter.r."""
    return re.split(r"[.@/]", word.lstrip("+~").partition("=")[0], maxsplit=1)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """The settings of one run."""

    config: Config
    fixed: frozenset[str] = frozenset()
    """Settings that plan=auto may not choose, as the user has set them (`user_settings`)."""
    job_overrides: tuple[str, ...] = ()
    """Overrides of a sweep's job that not all of its jobs have."""


def compose_config(overrides: Sequence[str], *, config_dir: str | None = None, may_lack_paths: bool = False) -> Config:
    """Return the settings of `compose_run`."""
    return compose_run(overrides, config_dir=config_dir, may_lack_paths=may_lack_paths).config


def compose_run(overrides: Sequence[str], *, config_dir: str | None = None, may_lack_paths: bool = False) -> Composed:
    """Return the settings of one run. Raises UserError for overrides that are unknown, missing or invalid.

    may_lack_paths: model.path and data.path may be missing; they are UNSET then.
    """
    overrides = [with_new_keys(word) for word in overrides]
    refuse_unusable(overrides)
    with _initialized(config_dir) as prefix:
        return _compose_one([*prefix, *overrides], may_lack_paths)


def compose_sweep(
    overrides: Sequence[str],
    *,
    config_dir: str | None = None,
    may_lack_paths: bool = False,
    most: int | None = MOST_JOBS_CHECKED,
) -> list[Composed]:
    """Return the settings of the jobs of a `-m` run in Hydra's order, at most `most` of them (None: all).

    A sweeper other than Hydra's chooses its values later: then the list has one entry, the settings that all jobs
    share.
    """
    overrides = [with_new_keys(word) for word in overrides]
    refuse_unusable(overrides)
    with _initialized(config_dir) as prefix:
        try:
            words = parsed(overrides)
            if any(override.key_or_group == "hydra/sweeper" for override in words):
                shared = [o.input_line for o in words if not o.is_sweep_override() and o.input_line is not None]
                return [_compose_one([*prefix, *shared], may_lack_paths)]
            jobs = BasicSweeper.split_arguments(words, max_batch_size=None)[0]
        except EXPLAINED as error:
            raise explain(error, overrides) from error
        everywhere = set(jobs[0]).intersection(*jobs)
        return [
            dataclasses.replace(
                _compose_one([*prefix, *job], may_lack_paths),
                job_overrides=tuple(word for word in job if word not in everywhere),
            )
            for job in jobs[:most]
        ]


def merge_file(settings: Mapping[str, Any], overrides: Sequence[str], *, config_dir: str | None = None) -> list[str]:
    """Return the settings of a file as overrides, followed by those of the command line, which win.

    `settings`: by dotted name, and options by group. An option or a recipe on the command line replaces what the file
    has for the same settings.
    """
    refuse_unusable(overrides)
    with _initialized(config_dir):
        try:
            return [*without_replaced(words_of(settings), overrides), *overrides]
        except EXPLAINED as error:
            raise explain(error, overrides) from error


def with_typed_options(overrides: Sequence[str], *, config_dir: str | None = None) -> list[str]:
    """Return overrides with which Hydra's own application composes what `compose_run` does (`over_recipes`)."""
    with _initialized(config_dir):
        return [*words_of(over_recipes(overrides)), *overrides]


def parse_overrides(overrides: Sequence[str], *, config_dir: str | None = None) -> list[Override]:
    """Return the overrides of a command line, parsed. Raises UserError for one that cannot be parsed."""
    refuse_unusable(overrides)
    with _initialized(config_dir):
        try:
            return parsed(overrides)
        except EXPLAINED as error:
            raise explain(error, overrides) from error


def compose_section(section: str, overrides: Sequence[str], *, config_dir: str | None = None) -> dict[str, Any]:
    """Return the plain values of a group of conf/ that is not part of a run's settings (`sweep`)."""
    overrides = [with_new_keys(word) for word in overrides]
    refuse_unusable(overrides)
    with _initialized(config_dir) as prefix:
        try:
            composed = hydra_compose("config", overrides=[*prefix, *overrides])
            values: Any = OmegaConf.to_container(composed[section], resolve=True)
        except EXPLAINED as error:
            raise explain(error, overrides) from error
    return _string_keys(values)


def config_from_hydra(composed: DictConfig, *, run_dir: str, may_lack_paths: bool = False) -> Config:
    """Return the settings of a run in the folder `run_dir`, from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    values.pop("sweep", None)  # What makes many runs of it (studies/).
    require(
        not isinstance(values.get("recipe"), dict),
        "the file of recipe= lacks its first line, `# @package _global_`; add it, or write distlora train "
        "FOLDER/recipe/NAME.yaml, where a file needs no such line",
    )
    missing = [name for name, value in leaves(values) if value == MISSING]
    if isinstance(values["data"], dict) and values["data"].get("path") is None and not values["data"].get("sources"):
        missing.append("data.path")
    if may_lack_paths:
        for key in {"model.path", "data.path"} & set(missing):
            section, _, name = key.partition(".")
            values[section][name] = UNSET
            missing.remove(key)
    if missing:
        lines = [f"{key} is not set" + (f": {REQUIRED[key]}" if key in REQUIRED else "") for key in missing]
        raise UserError(*lines, EXAMPLE)
    config = _absolute(build(Config, _string_keys(values) | {"run_dir": run_dir}))
    unresolved: Any = OmegaConf.to_container(composed, resolve=False)
    if config.cluster.on_each_node and not may_lack_paths:
        require(
            "${now" not in str(unresolved["run_dir"]) or Path(values["run_dir"]).name != Path(run_dir).name,
            "run_dir is not set, and by default it has the time in its name, which differs between the "
            f"{config.cluster.nodes} nodes (cluster.nodes); add run_dir=runs/{config.name} or another folder that all "
            "nodes share",
        )
    return config


def _compose_one(overrides: list[str], may_lack_paths: bool) -> Composed:
    try:
        composed = hydra_compose("config", overrides=overrides, return_hydra_config=True)
        with open_dict(composed):
            composed.hydra.job.num, composed.hydra.job.id = 0, "0"  # For names such as trial-${hydra:job.num}.
            HydraConfig.instance().set_config(composed)
            # Not composed.run_dir: an override of hydra.run.dir (wandb agents write one) names the folder too.
            run_dir = composed.hydra.run.dir
            del composed["hydra"]
        restore_options(composed, overrides)
        config = config_from_hydra(composed, run_dir=run_dir, may_lack_paths=may_lack_paths)
        config = with_formats(with_initial_adapter(config, overrides))
        return Composed(config=config, fixed=user_settings(config.plan, overrides))
    except EXPLAINED as error:
        raise explain(error, overrides) from error


@contextmanager
def _initialized(config_dir: str | None) -> Iterator[list[str]]:
    """Initialize Hydra with conf/ for the duration; yield the overrides that add the folder of `--config-dir`."""
    prefix = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(
                f"--config-dir {config_dir} is not a folder; name the one that holds your groups, as recipe/NAME.yaml"
            )
        prefix = [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"]
    with initialize_config_module(CONF_MODULE, version_base=VERSION_BASE):
        yield prefix


def _string_keys(value: Any) -> Any:
    """Return a value with all keys as strings: Hydra's grammar allows numbers and booleans."""
    return {str(k): _string_keys(v) for k, v in value.items()} if isinstance(value, dict) else value


def _absolute(config: Config) -> Config:
    """Return settings with absolute paths, for workers and for a resume from another folder; hub names stay."""
    paths = {name: config.value_of(name) for name in PATHS}
    if config.data.template is not None and config.data.template.endswith(".jinja"):
        paths["data.template"] = config.data.template
    changed: dict[str, Any] = {name: _absolute_path(name, path) for name, path in paths.items() if path is not None}
    changed["data.sources"] = tuple(
        dataclasses.replace(source, path=_absolute_path(f"data.sources[{index}].path", source.path))
        for index, source in enumerate(config.data.sources)
    )
    if any(name not in BUILT_IN for name in config.data.rewards):
        folder = changed.setdefault("data.reward_folder", os.getcwd())
        changed["data.reward_digests"] = source_digests(config.data.rewards, folder)
    return dataclasses.replace(config.with_settings(changed), run_dir=_absolute_path("run_dir", config.run_dir))


def _absolute_path(name: str, path: str) -> str:
    if not path.strip():
        raise UserError(f"{name} is empty; set {name}=..." + (f", {REQUIRED[name]}" if name in REQUIRED else ""))
    if name != "run_dir" and means_hub(path):
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise UserError(f"{name}={path}: {error} write the path from / on") from error


def with_initial_adapter(config: Config, overrides: Iterable[str]) -> Config:
    """Return the settings with those of the adapter at init_from; unchanged if there is none.

    overrides: the command line. Raises UserError for an override that the adapter contradicts.
    """
    if config.adapter.init_from is None:
        return config
    try:
        initial = read_peft_adapter(config.adapter.init_from, labels=config.train.needs.labels)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    check_quantization(initial, config.quant.method)
    keys = {word.lstrip("+").partition("=")[0]: word for word in overrides}
    typed = {key.split(".")[1]: word for key, word in keys.items() if key.startswith("adapter.")}
    if keys.get("adapter") == "adapter=dora":
        typed.setdefault("use_dora", keys["adapter"])
    for name, value in initial.settings.items():
        chosen = getattr(config.adapter, name)
        if name in typed and _comparable(chosen) != _comparable(value):
            raise UserError(
                f"{typed[name]} contradicts adapter.init_from={config.adapter.init_from}, whose {name} is "
                f"{_shown(value)} ({CONFIG_NAME}); leave adapter.{name} out, or start without init_from"
            )
    if "init" in typed:
        raise UserError(
            f"{typed['init']} has no effect with adapter.init_from={config.adapter.init_from}, which holds A and B; "
            "leave one of them out"
        )
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **initial.settings))


def _comparable(value: Any) -> Any:
    """Return target modules as a set of names."""
    if isinstance(value, str):
        value = TARGET_PRESETS.get(value, value)
    return frozenset(value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
