"""Explain Hydra's errors about a mistyped override: the override, the reason, the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlora.config import UserError, nearest
from distlora.config.cluster import OWN_OPTION
from distlora.config.file import peer_hint
from distlora.config.places import is_hub_name

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
            f"{word} holds several values; add -m to run one job a value, or write {key}=[{value}] for a list"
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
