"""Compose a `Config` from command-line overrides: Hydra composes conf/, distlora.config checks and types the result.

Hydra raises a dozen kinds of exceptions for a mistyped override. Each becomes one UserError that names the override and
what to type instead (`explain`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from distlora.config import TARGET_PRESETS, Config, GpuConfig, ModelConfig, PlanConfig, UserError, nearest, require
from distlora.config.base import cache_root, is_hub_name, means_hub
from distlora.config.cluster import OWN_OPTION
from distlora.config.file import build, peer_hint
from distlora.config.plan import CHOSEN, GPUS
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter

CONF_MODULE = "distlora_launcher.conf"
VERSION_BASE = "1.3"
MISSING = "???"
UNSET = "/dev/null/unset"
"""Stands for a path that may still be missing; no folder can be there."""

MOST_JOBS_CHECKED = 64
"""Jobs of a sweep that are checked before the first one starts; the others are checked as they start."""

REQUIRED = {
    "model.path": "a local folder in Hugging Face format (config.json, safetensors, tokenizer), or a name on the hub",
    "data.path": "a file (jsonl, json, parquet, csv, txt), a folder of them, or a data set on the hub",
}
EXAMPLE = "for example: distlora train model.path=./Llama-3.2-1B data.path=documents.jsonl"


PATHS = (
    "model.path",
    "data.path",
    "data.eval_path",
    "data.cache_dir",
    "quant.cache_dir",
    "adapter.init_from",
    "parallel.deepspeed_config",
)
"""Settings that are paths, beside data.sources and data.template."""

MAPPINGS = (
    "model.special_tokens",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "data.columns",
    "model.special_tokens",
    "cluster.environment",
    "sweep.space",
)
"""Settings whose keys the user chooses."""


# The group `gpu` is the table of GPUs, so that `gpu=h100` picks one by its name.
for _name in ("auto", *GPUS):
    ConfigStore.instance().store(group="gpu", name=_name, node=dataclasses.asdict(GpuConfig(name=_name)))
# `${cache_root:}` in conf/.
OmegaConf.register_new_resolver("cache_root", lambda: str(cache_root()), replace=True)


def with_new_keys(word: str) -> str:
    """Return an override with Hydra's mark for new keys if its setting takes the user's own keys."""
    key = word.partition("=")[0]
    return f"++{word}" if any(key == name or key.startswith(name + ".") for name in MAPPINGS) else word


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


def names_model(model: ModelConfig) -> bool:
    """Return whether settings that may lack paths name a model."""
    return model.path != UNSET


def config_from_hydra(composed: DictConfig, *, run_dir: str, may_lack_paths: bool = False) -> Config:
    """Return the settings of a run in the folder `run_dir`, from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    values.pop("sweep", None)  # What makes many runs of it (sweeps/).
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
        config = config_from_hydra(composed, run_dir=run_dir, may_lack_paths=may_lack_paths)
        config = with_initial_adapter(config, overrides)
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


def options_of(group: str) -> list[str]:
    """Return the options of a group sorted by name, with numbers in numeric order: llama3_8b before llama3_70b."""
    names = [entry.name.removesuffix(".yaml") for entry in _folder(group).iterdir() if entry.name.endswith(".yaml")]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


@functools.cache
def known_models() -> dict[str, str]:
    """Return the names for model=, each with its name on the hub."""
    folder = _folder("model")
    return {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["path"]
        for name in options_of("model")
        if name != "local"
    }


def _folder(group: str) -> Traversable:
    return resources.files(CONF_MODULE) / group


_RECIPE = "recipe"
_SECTIONS = {name.partition(".")[0] for name in CHOSEN}
"""Groups whose options can fix a setting; the files of other groups are not read."""


def user_settings(plan: PlanConfig, overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted names, of the settings that a plan may choose, that the command line fixes.

    All of them unless plan=auto. Hydra must be initialized.
    """
    if plan.mode != "auto":
        return frozenset(CHOSEN)
    loader = GlobalHydra.instance().config_loader()
    found: set[str] = set()
    for override in parsed(overrides):
        key = override.key_or_group
        if override.package is None and loader.get_group_options(key):
            found.update(_set_by_options(key, override.value()))
        else:
            found.add(key)
    return frozenset(found & set(CHOSEN))


def _set_by_options(group: str, chosen: Any) -> Iterator[str]:
    """Yield what the selected options of a group fix."""
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if group == _RECIPE and option is not None:
            yield from _set_by_recipe(option)
        elif option is not None and group in _SECTIONS:
            yield from _distinct(group, option)


def _set_by_recipe(name: str) -> Iterator[str]:
    """Yield what a recipe's file sets, its options and the recipes that it builds on."""
    file = _load(f"{_RECIPE}/{name}")
    values: Any = OmegaConf.to_container(file.config)
    yield from (setting for setting, _ in leaves(values))
    for group, option in _defaults(file):
        yield from _set_by_options(group or _RECIPE, option)


def _distinct(group: str, option: str) -> Iterator[str]:
    """Yield settings of an option for which another option of its group has another value."""
    others = [_values(group, other) for other in GlobalHydra.instance().config_loader().get_group_options(group)]
    for name, value in _values(group, option).items():
        if any(other.get(name, value) != value for other in others):
            yield f"{group}.{name}"


def _values(group: str, option: str) -> dict[str, Any]:
    """Return the values that an option sets, with those that it builds on."""
    file = _load(f"{group}/{option}")
    found: dict[str, Any] = {}
    own_values: Any = OmegaConf.to_container(file.config)
    for _, other in _defaults(file):
        found |= _values(group, other)
    return found | own_values


def _defaults(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield (group, option) of each entry of a file's defaults list but itself; the group is empty for its own."""
    for default in file.defaults_list or ():
        if isinstance(default, GroupDefault):
            assert default.group is not None
            yield default.group.lstrip("/"), default.value
        elif not default.is_self():
            yield "", default.path


def _load(path: str) -> Any:
    """Return a file of conf/ or of --config-dir."""
    loader: Any = GlobalHydra.instance().config_loader()
    return loader.repository.load_config(path)


def with_initial_adapter(config: Config, overrides: Iterable[str]) -> Config:
    """Return the settings with those of the adapter at init_from; unchanged if there is none.

    overrides: the command line. Raises UserError for an override that the adapter contradicts.
    """
    if config.adapter.init_from is None:
        return config
    try:
        initial = read_peft_adapter(config.adapter.init_from)
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


EXPLAINED = (HydraException, OmegaConfBaseException, ValueError, TypeError)
"""Exceptions of composing wrong overrides: Hydra leaks ValueError and TypeError for odd group values (adapter=1)."""


def explain(error: Exception, overrides: Sequence[str]) -> UserError:
    """Return the UserError for what Hydra raised while it composed `overrides`."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    if first_line.startswith("Ambiguous value for argument"):
        word = first_line.split("'", 1)[1].rstrip("'")
        key, _, value = word.partition("=")
        return UserError(
            f"{word} holds several values; add -m to run one job per value, or write {key}=[{value}] for a list"
        )
    for override in parsed(overrides):
        message = _bad_option(override) or _unknown_key(override, overrides)
        if message:
            return UserError(message)
    missing = (
        f" (options: {', '.join(error.options)})" if isinstance(error, MissingConfigException) and error.options else ""
    )
    return UserError(f"{first_line}{missing}")


def refuse_unusable(overrides: Sequence[str]) -> None:
    """Refuse names of old settings, and overrides without a name (`=value`, `+@package=value`), where Hydra fails."""
    for word in overrides:
        if re.match(r"[+~]*\s*[@:=]", word):
            raise UserError(f"{word!r} names no setting; write setting=value")
        if re.match(r"[+~]*card[.@=]", word):
            raise UserError(f"{word}: the setting `card` is now `gpu`; write {word.replace('card', 'gpu', 1)}")


def _unreadable(error: OverrideParseException) -> UserError:
    word = str(error.override)
    key, _, value = word.partition("=")
    if "=" not in word or not re.fullmatch(r"[+~]*[A-Za-z_][\w./@:-]*", key):
        return UserError(f"{word!r} is not a setting; write it as setting=value")
    return UserError(
        f"cannot read {word!r}: a value with any of = , : ~ # [ ] {{ }} ( ) or quotes in it must be quoted, twice for "
        f"the shell: '{key}=\"{value}\"'"
    )


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return overrides as Hydra parses them. Hydra must be initialized."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)) if overrides else []


def _groups() -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _bad_option(override: Override) -> str | None:
    """Return the message for `group=option` if the group exists and the option does not."""
    group, value = override.key_or_group, override.value()
    options = _options(group) if override.package is None else []
    chosen = value if isinstance(value, list) else [value]
    absent = [item for item in chosen if item not in options]
    if not options or override.is_delete() or not absent:
        return None
    written = override.get_value_element_as_str()
    if group == "model" and is_hub_name(str(value)):
        return f"model={written}: names for model= have no '/'; for a model of the hub write model.path={written}"
    message = f"{group}={written}: the options of {group} are {', '.join(options)}{nearest(str(absent[0]), options)}"
    defaults = _composed([])
    if value is None and group not in defaults:
        message += f"; ~{group} chooses none"
    elif f"{group}.path" in dict(leaves(defaults)):
        message += f"; to name a file or folder write {group}.path={written}"
    return message


def _unknown_key(override: Override, overrides: Sequence[str]) -> str | None:
    """Return the message for a key that is neither a setting nor a group, with the nearest one."""
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or (override.package is None and _options(key)):
        return None
    defaults = _composed([])
    pairs = zip(overrides, parsed(overrides), strict=True)
    chosen = [word for word, item in pairs if item.package is None and _options(item.key_or_group)]
    try:
        composed = _composed(chosen)
    except EXPLAINED:  # A chosen group is wrong too, and gets its own complaint once this one is corrected.
        composed = defaults
    if key in set(_nodes(composed)):
        return None
    if key in set(_nodes(defaults)):
        reasons = [word for word in chosen if word.lstrip("~").partition("=")[0] == key.partition(".")[0]]
        return f"{key} has no effect with {' '.join(reasons or chosen)}; remove it"
    section, _, name = key.partition(".")
    if section == "cluster" and name.partition(".")[0] in OWN_OPTION:
        return f"{key} is a setting of cluster={OWN_OPTION[name.partition('.')[0]]}; add that, or leave it out"
    is_hydras = section == "hydra"
    settings = [name for name, _ in leaves(composed) if name.startswith("hydra.") == is_hydras]
    peer = "" if is_hydras else peer_hint(key)
    return f"there is no setting {key}{peer or _nearest_setting(key, settings, _groups())}"


def _composed(overrides: list[str]) -> Any:
    composed = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    return OmegaConf.to_container(composed, resolve=False)


def _nearest_setting(key: str, settings: list[str], groups: list[str]) -> str:
    """Return the closest dotted name; a last part in the wrong place (lr=...), or half of one, counts as close."""
    last = key.rpartition(".")[2]
    same_last = [name for name in settings if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, [*settings, *groups], n=1, cutoff=0.7) or same_last
    close = close or [name for name in settings if last in name.rpartition(".")[2].split("_")]
    if close:
        return f" (did you mean {close[0]!r}?)"
    return nearest(key, [*settings, *groups]) or "; `distlora train --cfg job` prints all that there are"


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested settings; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nodes(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{key}.")
