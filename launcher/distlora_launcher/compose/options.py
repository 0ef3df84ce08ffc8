"""Find what options and recipes of conf/ set, and which of them wins. Most functions need Hydra initialized."""

import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import yaml
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from distlora.config import PlanConfig
from distlora.config.plan import CHOSEN

CONF_MODULE = "distlora_launcher.conf"
_RECIPE = "recipe"
_SECTIONS = {name.partition(".")[0] for name in CHOSEN}
"""Groups whose options can fix a setting; the files of other groups are not read."""
_RIVALS = (
    ("optim.warmup_steps", "optim.warmup_ratio"),
    ("train.save_every", "train.saves_per_epoch"),
    ("train.eval_every", "train.evals_per_epoch"),
    ("data.path", "data.sources"),
)
"""Settings that exclude each other."""


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


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return overrides as Hydra parses them."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)) if overrides else []


def user_settings(plan: PlanConfig, overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted names, of the settings that a plan may choose, that the command line fixes.

    All of them unless plan=auto.
    """
    if plan.mode != "auto":
        return frozenset(CHOSEN)
    chosen = _chosen(overrides)
    found = {override.key_or_group for override in parsed(overrides)} - {group for group, _ in chosen}
    found.update(*(_set_by_options(group, option) for group, option in chosen))
    return frozenset(found & set(CHOSEN))


def restore_options(settings: DictConfig, overrides: Sequence[str]) -> None:
    """Give composed settings the values of the options in `overrides` that a recipe has replaced (`over_recipes`)."""
    for setting, value in over_recipes(overrides).items():
        OmegaConf.update(settings, setting, value)


def over_recipes(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what options in `overrides` set, and a recipe in them replaces.

    `recipe=tool_calls model=qwen25_14b` names two models. Hydra composes the recipe last, but the user typed the other.
    """
    chosen, typed = _chosen(overrides), {override.key_or_group for override in parsed(overrides)}
    by_recipe = {name for group, option in chosen if group == _RECIPE for name in _set_by_recipe(option)} - typed
    found: dict[str, Any] = {}
    for group, option in chosen:
        if group != _RECIPE and any(name.startswith(f"{group}.") for name in by_recipe):
            names = by_recipe.intersection(_distinct(group, option))
            found |= {name: _values(group, option)[name.partition(".")[2]] for name in names}
    return found


def without_replaced(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a file without those that the command line's `overrides` replace.

    Those have the same name, exclude a typed setting, belong to another model than the typed one, are set by a typed
    option or recipe, or have no effect with a typed option.
    """
    replaced = {override.key_or_group for override in parsed(overrides)}
    known: dict[str, set[str]] = {}  # Settings that the typed options of a group have.
    for group, option in _chosen(overrides):
        replaced.update(_set_by_recipe(option) if group == _RECIPE else _distinct(group, option))
        known[group] = {*known.get(group, ()), *_values(group, option)} if group != _RECIPE else set()
    unset = {override.key_or_group for override in parsed(overrides) if override.value() is None}
    replaced.update(name for rivals in _RIVALS if (replaced - unset).intersection(rivals) for name in rivals)
    if "model.path" in replaced:
        replaced |= {"model.revision", "model.name", "model.gguf_file"}
    kept = []
    for word, override in zip(words, parsed(words), strict=True):
        group, *names = override.key_or_group.split(".")
        if override.key_or_group not in replaced and (not names or names[0] in known.get(group, names)):
            kept.append(word)
    return kept


def _chosen(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return (group, option) of each existing option in overrides, in a sweep of each of its options."""
    found = []
    for override in parsed(overrides):
        group, value = override.key_or_group, typing.cast("Any", override.value())
        is_option = "." not in group and override.package is None and not override.is_delete()
        options = _group_options(group) if is_option else []
        if options and override.is_sweep_override():
            value = list(override.sweep_string_iterator())
        found += [(group, option) for option in (value if isinstance(value, list) else [value]) if option in options]
    return found


def _set_by_options(group: str, chosen: Any) -> Iterator[str]:
    """Yield what the selected options of a group fix, among the settings that a plan may choose."""
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
    others = [_values(group, other) for other in _group_options(group)]
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


def _repository() -> Any:
    """Return Hydra's reader of conf/ and of --config-dir. The loader's own methods copy it at each call, in 7 ms."""
    loader: Any = GlobalHydra.instance().config_loader()
    return loader.repository


def _group_options(group: str) -> list[str]:
    options: list[str] = _repository().get_group_options(group, ObjectType.CONFIG)
    return options


def _load(path: str) -> Any:
    return _repository().load_config(path)


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested settings; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
