"""Which settings the user has chosen, so that `plan=auto` leaves them alone.

A setting is fixed where
- the command line names it: train.micro_batch=2;
- the command line or a recipe takes an option of its group that sets it to what not all options of that group do:
  parallel=hsdp fixes parallel.shard_degree and parallel.backend, quant=nf4 quant.method, train=default nothing;
- a recipe's file sets it, or one that the recipe builds on.
Everything else has the value of a default, and may be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from distlora.config import Config
from distlora.config.plan import CHOSEN

_RECIPE = "recipe"
_SECTIONS = {name.partition(".")[0] for name in CHOSEN}
"""Groups whose options can fix something: a word for another, gpu=h100, has none of its files read."""


def fixed_settings(config: Config, overrides: Sequence[str]) -> frozenset[str]:
    """Dotted names, of those that a plan may choose, that the words of a command line fix; those of no plan=auto fix
    all. Hydra must be initialized, and `config` is what the words compose to."""
    if config.plan.mode != "auto":
        return frozenset(CHOSEN)
    loader = GlobalHydra.instance().config_loader()
    found: set[str] = set()
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.package is None and loader.get_group_options(key):
            found.update(_of_options(key, override.value()))
        else:
            found.add(key)
    return frozenset(found & set(CHOSEN))


def _of_options(group: str, chosen: Any) -> Iterator[str]:
    """What the options of a group that are taken fix."""
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if group == _RECIPE and option is not None:
            yield from _of_recipe(option)
        elif option is not None and group in _SECTIONS:
            yield from _distinct(group, option)


def _of_recipe(name: str) -> Iterator[str]:
    """What a recipe's file sets, the options that it takes, and the recipes that it builds on."""
    file = _load(f"{_RECIPE}/{name}")
    yield from _names(OmegaConf.to_container(file.config))
    for group, option in _defaults(file):
        yield from _of_options(group or _RECIPE, option)


def _distinct(group: str, option: str) -> Iterator[str]:
    """Settings of an option for which another of its group has another value."""
    others = [_values(group, other) for other in GlobalHydra.instance().config_loader().get_group_options(group)]
    for name, value in _values(group, option).items():
        if any(other.get(name, value) != value for other in others):
            yield f"{group}.{name}"


def _values(group: str, option: str) -> dict[str, Any]:
    """What an option sets, with those that it builds on."""
    file = _load(f"{group}/{option}")
    found: dict[str, Any] = {}
    own: Any = OmegaConf.to_container(file.config)
    for _, other in _defaults(file):
        found |= _values(group, other)
    return found | own


def _defaults(file: Any) -> Iterator[tuple[str, Any]]:
    """(group, option) of each entry of a file's defaults list but itself; no group: of the file's own."""
    for default in file.defaults_list or ():
        if isinstance(default, GroupDefault):
            assert default.group is not None
            yield default.group.lstrip("/"), default.value
        elif not default.is_self():
            yield "", default.path


def _load(path: str) -> Any:
    """A file of conf/ or of --config-dir."""
    loader: Any = GlobalHydra.instance().config_loader()
    return loader.repository.load_config(path)


def _names(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of values."""
    pairs: Iterable[tuple[Any, Any]] = values.items()
    for key, value in pairs:
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
