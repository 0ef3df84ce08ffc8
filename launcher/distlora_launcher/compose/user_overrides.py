"""Find the settings that the user has chosen, which `plan=auto` leaves alone.

A setting is fixed if

- the command line names it: train.micro_batch=2;
- the command line or a recipe selects an option of its group that sets it to a value that another option does not
  have: parallel=hsdp fixes parallel.shard_degree and parallel.backend, quant=nf4 quant.method, train=default nothing;
- a recipe's file sets it, or a file that the recipe builds on.

All others have default values, and may be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from distlora.config import PlanConfig
from distlora.config.plan import CHOSEN

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
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
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
    yield from _names(OmegaConf.to_container(file.config))
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


def _names(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of nested values."""
    pairs: Iterable[tuple[Any, Any]] = values.items()
    for key, value in pairs:
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
