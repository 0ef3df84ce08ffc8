"""Compose a `Config` from command-line overrides: Hydra composes conf/, distlora.config checks and types the result.

Hydra raises a dozen kinds of exceptions for a mistyped override. Each becomes one UserError that names the override and
what to type instead (`explain`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from distlora.config import TARGET_PRESETS, Config, GpuConfig, ModelConfig, UserError, nearest, require
from distlora.config.base import cache_root, is_hub_name, means_hub
from distlora.config.cluster import OWN_OPTION
from distlora.config.file import build, parse_yaml
from distlora.config.peer_names import ACCUMULATION, nearest_peer, peer_hint
from distlora.config.plan import GPUS
from distlora.run_folder.sweep import words_of
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter
from distlora_launcher.compose.options import (
    leaves,
    over_recipes,
    parsed,
    restore_options,
    user_settings,
    without_replaced,
)

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


def merge_file(settings: Mapping[str, Any], overrides: Sequence[str], *, config_dir: str | None = None) -> list[str]:
    """Return the settings of a file as overrides, followed by those of the command line, which win.

    `settings`: by dotted name, and options by group. An option or a recipe on the command line replaces what the file
    has for the same settings.
    """
    refuse_unusable(overrides)
    with _initialized(config_dir):
        try:
            words = [with_new_keys(word) for word in words_of(settings)]
            return [*without_replaced(words, overrides), *overrides]
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


def names_model(model: ModelConfig) -> bool:
    """Return whether settings that may lack paths name a model."""
    return model.path != UNSET


def config_from_hydra(composed: DictConfig, *, run_dir: str, may_lack_paths: bool = False) -> Config:
    """Return the settings of a run in the folder `run_dir`, from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    values.pop("sweep", None)  # What makes many runs of it (sweeps/).
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
        advice = f"to compare them write distlora sweep ... {word}; `distlora train -m` runs one job per value"
        if _takes_list(key):
            advice = f"write {key}=[{value}] for a list; {advice}"
        return UserError(f"{word} holds several values; {advice}")
    compose = functools.cache(lambda *words: _composed(list(words)))
    for override in parsed(overrides):
        message = _bad_option(override, compose) or _unknown_key(override, overrides, compose)
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
        named = [f"{group}={word}" for group in ("model", "recipe") if word in options_of(group)]
        named += [f"{name}={word}" for name in REQUIRED] if Path(word).exists() else []
        meant = f"write {' or '.join(named)}" if named else "write it as setting=value"
        return UserError(f"{word!r} is not a setting; {meant}")
    return UserError(
        f"cannot read {word!r}: a value with any of = , : ~ # [ ] {{ }} ( ) or quotes in it must be quoted, twice for "
        f"the shell: '{key}=\"{value}\"'"
    )


def _groups() -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)


def _options(group: str) -> list[str]:
    if "." in group:  # A setting, for which Hydra would look through all folders.
        return []
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _bad_option(override: Override, compose: Callable[..., Any]) -> str | None:
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
    if group == "recipe" and written.endswith((".yaml", ".yml")):
        return (
            f"recipe={written}: a recipe is named without a folder and .yaml; for a file write distlora train {written}"
        )
    for names, hint in OPTION_HINTS.get(group, {}).items():
        if str(absent[0]).lower() in names.split():
            return f"{group}={written} is not an option of {group}; {hint}"
    meant = _family(str(absent[0]), options_of(group) if group == "model" else options)
    message = f"{group}={written} is not an option of {group} (did you mean {meant}?)"
    if not meant:
        message = (
            f"{group}={written}: the options of {group} are {', '.join(options)}{nearest(str(absent[0]), options)}"
        )
    defaults = compose()
    if value is None and group not in defaults:
        message += f"; ~{group} chooses none"
    elif f"{group}.path" in dict(leaves(defaults)):
        message += f"; to name a file or folder write {group}.path={written}"
    return message


OPTION_HINTS = {
    "adapter": {
        "qlora": "QLoRA is a LoRA adapter on a 4-bit base: write recipe=qlora",
        "none null": "write adapter=full to train every parameter, or adapter=lora",
    },
    "quant": {
        "4bit 4 int4 bnb bitsandbytes 4-bit fp4 nf4_double": "4 bits are NF4: write quant=nf4 (or recipe=qlora)",
        "8bit 8 int8 8-bit fp8": "write quant=nf4 (4 bits) or quant=none (16 bits)",
        "bf16 fp16 16bit 16 false": "write quant=none (16 bits)",
        "gptq awq": "write quant=nf4, which quantizes a 16-bit checkpoint as it is loaded",
    },
    "parallel": {
        "deepspeed ds zero": "write parallel=zero3 for DeepSpeed",
        "ddp dp": "write parallel.shard_degree=1 for a whole base on every GPU",
        "tp pp": "write parallel=fsdp2, which shards the base over all GPUs",
    },
    "optim": {
        "adamw_torch adamw_torch_fused adamw_hf adam": "write optim=adamw",
        "adamw_bnb_8bit adamw8bit": "write optim=adamw_8bit",
        "paged_adamw_32bit": "write optim=paged_adamw",
    },
    "tracker": {"null false off disabled": "write tracker=none"},
    "recipe": {"lora": "write recipe=qlora, with quant=none for an unquantized base", "sft": "write recipe=qlora"},
}
"""Names of other tools by group, and what to write."""


def _family(word: str, options: Sequence[str]) -> str:
    """Return the options that `word` is another spelling of, or else those that begin with it: llama3, Llama-3.1-8B."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = {plain(word), plain(re.sub(r"(\d)\.\d", r"\1", word))} - {""}
    same = [option for option in options if plain(option) in names]
    kin = [o for o in options if o.partition("_")[0] in names or (len(word) > 2 and o.startswith(word.lower()))]
    return " or ".join(", ".join(map(repr, same or kin)).rsplit(", ", 1))


def _takes_list(key: str) -> bool:
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(typing.get_type_hints(Config).get(section, object))
    return "tuple" in str(hints.get(name))


def _unknown_key(override: Override, overrides: Sequence[str], compose: Callable[..., Any]) -> str | None:
    """Return the message for a key that is neither a setting nor a group, with the nearest one."""
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or (override.package is None and _options(key)):
        return None
    defaults = compose()
    pairs = zip(overrides, parsed(overrides), strict=True)
    chosen = [word for word, item in pairs if item.package is None and _options(item.key_or_group)]
    try:
        composed = compose(*chosen)
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
    peer = "" if is_hydras else _accumulation(override, overrides) or peer_hint(key)
    return f"there is no setting {key}{peer or _axolotl_reason(key) or nearest_setting(key, settings, _groups())}"


def _accumulation(override: Override, overrides: Sequence[str]) -> str:
    """Return what to write for a number of accumulation steps, by the other sizes on the command line."""
    steps: Any = override.value()
    if override.key_or_group.rpartition(".")[2] not in ACCUMULATION or not isinstance(steps, int):
        return ""
    typed: dict[str, Any] = {each.key_or_group: each.value() for each in parsed(overrides)}
    names = ("train.micro_batch", "per_device_train_batch_size"), ("cluster.gpus_per_node",), ("cluster.nodes",)
    micro, gpus, nodes = (next((typed[n] for n in each if isinstance(typed.get(n), int)), 1) for each in names)
    ranks = gpus * nodes
    return (
        f"; write train.global_batch={micro * ranks * steps} (micro-batch {micro} x {ranks} GPU{'s' * (ranks > 1)} x "
        f"{steps} steps of accumulation)"
    )


def _axolotl_reason(key: str) -> str:
    """Return why a key of Axolotl has no setting, from the importer's table."""
    table = Path(__file__).parents[1] / "importing" / "axolotl_keys.yaml"
    rows = parse_yaml(table.read_bytes())["config"]
    reason = next((row["reason"] for row in rows if key in row["keys"]), None)
    return f", which is a key of Axolotl: {reason}" if reason else ""


def _composed(overrides: list[str]) -> Any:
    composed = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    return OmegaConf.to_container(composed, resolve=False)


def nearest_setting(key: str, settings: list[str], groups: list[str]) -> str:
    """Return the closest dotted name; a last part in the wrong place (lr=...), or half of one, counts as close."""
    last = key.rpartition(".")[2]
    same_last = [name for name in settings if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, [*settings, *groups], n=1, cutoff=0.7) or same_last
    close = close or [name for name in settings if last in name.rpartition(".")[2].split("_")]
    if close:
        return f" (did you mean {close[0]!r}?)"
    return (
        nearest_peer(last) or nearest(key, [*settings, *groups]) or "; `distlora train --help` lists all that there are"
    )


def _nodes(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{key}.")
