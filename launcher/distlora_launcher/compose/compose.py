"""Compose a `Config` from command-line overrides: Hydra composes conf/, distlora.config checks and types the result.

This is the only way from words to settings, for the commands and the Python API. `train -m` is a list of such words,
one entry per job. Hydra raises a dozen kinds of exceptions for a mistyped override, which overrides.py turns into
UserErrors.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, Node, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError
from omegaconf.resolvers import oc

from distlora.config import TARGET_PRESETS, AdapterConfig, Config, GpuConfig, UserError, check_settings, require
from distlora.config.base import cache_root, means_hub
from distlora.config.errors import as_typed
from distlora.config.file import build
from distlora.config.plan import GPUS
from distlora.config.training import TRACKERS
from distlora.planner.mixed import with_formats
from distlora.rewards.find import source_digests, tool_schemas
from distlora.rewards.models import weights_digests
from distlora.run_folder.sweep import words_of
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter
from distlora_launcher.compose.overrides import (
    CONF_MODULE,
    EXAMPLE,
    EXPLAINED,
    REQUIRED,
    explain,
    leaves,
    over_recipes,
    parsed,
    refuse_unusable,
    user_settings,
    without_replaced,
)

VERSION_BASE = "1.3"
MISSING = "???"
UNSET = "/dev/null/unset"
"""Stands for a path that may still be missing; no folder can be there."""

MOST_JOBS_CHECKED = 64
"""Jobs of a sweep that are composed, and whose model and data are checked, before the first one starts."""


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
    "serve.folder",
)
"""Settings that are paths, beside data.sources and data.template."""

MAPPINGS = (
    "model.special_tokens",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "quant.formats",
    "data.columns",
    "data.reward_digests",
    "data.reward_models",
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
    is_path = key in (*PATHS, "data.template", "run_dir", "hydra.run.dir")
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
    with _hydra(overrides, config_dir) as words:
        return _compose_one(words, may_lack_paths)


def expand_sweep(overrides: Sequence[str], *, config_dir: str | None = None) -> list[list[str]]:
    """Return the overrides of each job of `train -m`: one job per combination of the values, as Hydra orders them.

    Of two overrides of one setting the last counts. Raises UserError for values that cannot be listed, an interval.
    """
    values: dict[str, list[str]] = {}
    for override in parse_overrides(overrides, config_dir=config_dir):
        key, word = override.get_key_element(), str(override.input_line)
        if override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            cure = f"write a list of values, or search it with `distlora sweep ... {word}`"
            require(not override.is_sweep_override(), f"{word} has no list of values for the jobs of -m; {cure}")
            values[key] = [word]
    return [list(job) for job in itertools.product(*values.values())]


def compose_sweep(
    jobs: Sequence[Sequence[str]],
    numbers: Iterable[int],
    *,
    folder: Path | None = None,
    config_dir: str | None = None,
) -> list[Composed]:
    """Return the settings of the jobs of `expand_sweep` with these numbers, each of which takes about half a second.

    Their run folders are their numbers in `folder`; None: in run_dir, where a time is that of the first of them.
    """
    runs: list[Composed] = []
    everywhere = set(jobs[0]).intersection(*jobs)
    for number in numbers:
        with _hydra(jobs[number], config_dir) as words:
            run = _compose_one(words, may_lack_paths=False, number=number)
        folder = folder or Path(run.config.run_dir)
        config = dataclasses.replace(run.config, run_dir=str(folder / str(number)))
        distinct = tuple(word for word in jobs[number] if word not in everywhere)
        runs.append(dataclasses.replace(run, config=config, job_overrides=distinct))
    return runs


def merge_file(settings: Mapping[str, Any], overrides: Sequence[str], *, config_dir: str | None = None) -> list[str]:
    """Return the settings of a file as overrides, followed by those of the command line, which win.

    `settings`: by dotted name, and options by group. An option or a recipe on the command line replaces what the file
    has for the same settings.
    """
    with _hydra(overrides, config_dir):
        return [*without_replaced(words_of(settings), overrides), *overrides]


def parse_overrides(overrides: Sequence[str], *, config_dir: str | None = None) -> list[Override]:
    """Return the overrides of a command line, parsed. Raises UserError for one that cannot be parsed."""
    with _hydra(overrides, config_dir):
        return parsed(overrides)


def compose_section(section: str, overrides: Sequence[str], *, config_dir: str | None = None) -> dict[str, Any]:
    """Return the plain values of a group of conf/ that is not part of a run's settings (`sweep`, `serve`)."""
    with _hydra(overrides, config_dir) as words:
        values: Any = OmegaConf.to_container(hydra_compose("config", overrides=words)[section], resolve=True)
    return _string_keys(values)


def print_settings(
    overrides: Sequence[str],
    *,
    cfg: Literal["job", "hydra", "all"] | None = None,
    info: str = "all",
    package: str | None = None,
    resolve: bool = False,
    config_dir: str | None = None,
) -> None:
    """Print the composed settings (`cfg`), or where they come from (`info`, as in Hydra's --info).

    package: print this section alone. resolve: replace interpolations by their values. Exits with code 1 for a package
    that does not exist.
    """
    with _hydra(overrides, config_dir) as words:
        hydra_compose("config", overrides=words)
        words = [*words_of(over_recipes(words)), *words]
        hydra: Any = GlobalHydra.instance().hydra
        if cfg is None:
            hydra.show_info(info, config_name="config", overrides=words)
        else:
            hydra.show_cfg("config", words, cfg, package, resolve)


def complete_words(words: list[str]) -> None:
    """Answer the shell functions of Hydra's tab completion: install=SHELL, uninstall=SHELL, query=SHELL."""
    with _hydra([], None):
        hydra: Any = GlobalHydra.instance().hydra
        hydra.shell_completion("config", words)


def config_from_hydra(composed: DictConfig, *, run_dir: str, may_lack_paths: bool = False) -> Config:
    """Return the settings of a run in the folder `run_dir`, from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    values.pop("sweep", None)  # What makes many runs of it (studies/).
    values.pop("serve", None)  # Of `distlora serve`, which is no run.
    typed_run_dir = str(values["run_dir"])
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
    values = _string_keys(values) | {"run_dir": run_dir}
    _make_absolute(values)
    config = build(Config, values)
    check_settings(config)
    if config.data.functions:
        folder = config.data.reward_folder or os.getcwd()
        digests = source_digests(config.data.functions, folder)
        config = config.with_settings({"data.reward_folder": folder, "data.reward_digests": digests})
        if config.data.tools:
            config = config.with_settings({"data.tool_schemas": json.dumps(tool_schemas(config.data))})
    if config.data.reward_models:
        digests = {**config.data.reward_digests, **weights_digests(config.data.reward_models)}
        config = config.with_settings({"data.reward_digests": digests})
    unresolved: Any = OmegaConf.to_container(composed, resolve=False)
    if config.cluster.on_each_node and not may_lack_paths:
        require(
            "${now" not in str(unresolved["run_dir"]) or Path(typed_run_dir).name != Path(run_dir).name,
            "run_dir is not set, and by default it has the time in its name, which differs between the "
            f"{config.cluster.nodes} nodes (cluster.nodes); add run_dir=runs/{config.name} or another folder that all "
            "nodes share",
        )
    return config


def _compose_one(overrides: list[str], may_lack_paths: bool, number: int = 0) -> Composed:
    composed = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    if replaced := words_of(over_recipes(overrides)):
        composed = hydra_compose("config", overrides=[*replaced, *overrides], return_hydra_config=True)
    with open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)  # For names such as trial-${hydra:job.num}.
        HydraConfig.instance().set_config(composed)
        # Not composed.run_dir: an override of hydra.run.dir (wandb agents write one) names the folder too.
        run_dir = composed.hydra.run.dir
        del composed["hydra"]
    config = config_from_hydra(composed, run_dir=run_dir, may_lack_paths=may_lack_paths)
    labels = config.train.needs.labels
    adapter = with_initial_adapter(config.adapter, overrides, quant=config.quant.method, labels=labels)
    quant = with_formats(config.quant, config.train.dtype)
    typed, config = config, dataclasses.replace(config, adapter=adapter, quant=quant)
    if config != typed:  # Files have settings too.
        check_settings(config)
    return Composed(config=config, fixed=user_settings(config.plan, overrides))


@contextmanager
def _hydra(overrides: Sequence[str], config_dir: str | None) -> Iterator[list[str]]:
    """Initialize Hydra with conf/ for the block; yield the overrides to compose, with the folder of `--config-dir`.

    The block may run within another Hydra application, whose state is put back. What Hydra raises is explained.
    """
    words = [with_new_keys(word) for word in overrides]
    refuse_unusable(words)
    prefix = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(
                f"--config-dir {config_dir} is not a folder; name the one that holds your groups, as recipe/NAME.yaml"
            )
        prefix = [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"]
    others, settings = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF_MODULE, version_base=VERSION_BASE):
            try:
                yield [*prefix, *words]
            except EXPLAINED as error:
                raise explain(error, words) from error
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = others, settings


def _string_keys(value: Any) -> Any:
    """Return a value with all keys as strings: Hydra's grammar allows numbers and booleans."""
    return {str(k): _string_keys(v) for k, v in value.items()} if isinstance(value, dict) else value


def _make_absolute(values: dict[str, Any]) -> None:
    """Make the paths in composed values absolute, for workers and a resume from another folder; hub names stay."""
    data: dict[str, Any] = values["data"] if isinstance(values["data"], dict) else {}
    template = data.get("template")
    names = [*PATHS, *["data.template"] * (isinstance(template, str) and template.endswith(".jinja"))]
    places = [(name, values.get(name.partition(".")[0]), name.partition(".")[2]) for name in names]
    sources = data["sources"] if isinstance(data.get("sources"), list) else []
    places += [(f"data.sources[{number}].path", source, "path") for number, source in enumerate(sources)]
    models = data["reward_models"] if isinstance(data.get("reward_models"), dict) else {}
    places += [(f"data.reward_models.{name}", models, name) for name in models]
    for name, section, key in [*places, ("run_dir", values, "run_dir")]:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _absolute_path(name, section[key])
    if isinstance(values["train"], dict) and "sample_images" in values["train"]:
        values["train"]["sample_images"] = made_absolute("train.sample_images", values["train"]["sample_images"])


def made_absolute(name: str, value: Any) -> Any:
    """Return the value of a setting with its paths absolute. Raises UserError for an empty path."""
    if name == "train.sample_images" and isinstance(value, list):
        return [_absolute_path(name, item) if isinstance(item, str) and item else item for item in value]
    return _absolute_path(name, value) if name in PATHS and isinstance(value, str) else value


def _absolute_path(name: str, path: str) -> str:
    if not path.strip():
        raise UserError(f"{name} is empty; set {name}=..." + (f", {REQUIRED[name]}" if name in REQUIRED else ""))
    if name != "run_dir" and means_hub(path):
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise UserError(f"{name}={path}: {error} write the path from / on") from error


def with_initial_adapter(
    adapter: AdapterConfig, overrides: Iterable[str], *, quant: str, labels: int = 0
) -> AdapterConfig:
    """Return the settings with those of the adapter at init_from; unchanged if there is none.

    overrides: the command line. labels: outputs of the score that replaces the LM head. Raises UserError for an
    override that the adapter contradicts.
    """
    if adapter.init_from is None:
        return adapter
    try:
        initial = read_peft_adapter(adapter.init_from, labels=labels)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    check_quantization(initial, quant)
    keys = {word.lstrip("+").partition("=")[0]: word for word in overrides}
    typed = {key.split(".")[1]: word for key, word in keys.items() if key.startswith("adapter.")}
    if keys.get("adapter") == "adapter=dora":
        typed.setdefault("use_dora", keys["adapter"])
    for name, value in initial.settings.items():
        if name in typed and _comparable(getattr(adapter, name)) != _comparable(value):
            raise UserError(
                f"{typed[name]} contradicts adapter.init_from={adapter.init_from}, whose {name} is {as_typed(value)} "
                f"({CONFIG_NAME}); leave adapter.{name} out, or start without init_from"
            )
    if "init" in typed:
        raise UserError(
            f"{typed['init']} has no effect with adapter.init_from={adapter.init_from}, which holds A and B; leave one "
            "of them out"
        )
    return dataclasses.replace(adapter, **initial.settings)


def _comparable(value: Any) -> Any:
    """Return target modules as a set of names."""
    if isinstance(value, str):
        value = TARGET_PRESETS.get(value, value)
    return frozenset(value) if isinstance(value, (list, tuple)) else value
