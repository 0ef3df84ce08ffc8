"""Build a Config from plain values and back: RUN/config.yaml, a composed mapping, wandb. No torch, no hydra."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from distlora.config import Config, SourceConfig, UserError, nearest, require
from distlora.config.errors import short
from distlora.config.peer_names import peer_hint

Section = TypeVar("Section")

_EXAMPLES = {int: "a whole number, such as 1", float: "a number, such as 0.1", bool: "true or false"}
"""Words for a value of each type; a string is the value itself, in quotes for Hydra and for the shell."""
_EXAMPLES_OF = {"cluster.time_limit": "it in quotes, '12:00:00', since YAML reads 12:00:00 as a number of seconds"}
"""Words for a value of a setting that a number would turn into another."""


def build(cls: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
    """Build a config dataclass, and those nested in it, from a mapping of plain values (a composed YAML).

    Raises UserError for a key that the dataclass lacks (naming the nearest), a missing required one, and a value of
    another type.
    """
    hints = typing.get_type_hints(cls)
    for key in map(str, values):
        hint = "" if key in hints else peer_hint(prefix + key) or nearest(key, hints) or "; leave it out"
        require(key in hints, f"there is no setting {prefix}{key}{hint}")
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name in values:
            arguments[item.name] = coerce(hints[item.name], values[item.name], prefix + item.name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{item.name} is not set; add {prefix}{item.name}=...")
    return cls(**arguments)


def coerce(hint: Any, value: Any, name: str) -> Any:
    """Return a value as a field's type: sections are built, lists become tuples, ints stand for floats.

    Raises UserError for a value of another type.
    """
    if dataclasses.is_dataclass(hint):
        advice = f"set one of its fields, {name}.<field>=..."
        if hint is SourceConfig:
            advice = f"write {name.partition('[')[0]}=[{{path: {_plain(value)}}}]"
        require(isinstance(value, Mapping), f"{name}={short(value)} is a section; {advice}")
        return build(hint, value, prefix=name + ".")  # type: ignore[arg-type]
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:  # The section's own check knows the choices and says which is nearest.
        return str(value).lower() if value is None or isinstance(value, bool) else value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        word = str(value).lower() if isinstance(value, bool) and bool not in kinds else value
        if isinstance(word, str) and any(typing.get_origin(kind) is Literal for kind in kinds):
            return word  # In a number's place, as above.
        is_list = isinstance(value, (list, tuple))
        kind = next((k for k in kinds if (typing.get_origin(k) is tuple) == is_list), kinds[0])
        return coerce(kind, value, name)
    if origin in (tuple, list):
        example = f"{{path: {_plain(value)}}}" if options[0] is SourceConfig else "a,b"
        require(isinstance(value, (list, tuple)), f"{name}={short(value)} must be a list; write {name}=[{example}]")
        return origin(coerce(options[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        require(isinstance(value, Mapping), f"{name}={short(value)} must be a mapping; write {name}={{key: value}}")
        return {str(key): coerce(options[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    matches = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    example = _EXAMPLES_OF.get(name) or _EXAMPLES.get(hint) or f"{name}='\"{_plain(value)}\"'"
    require(matches, f"{name}={short(value)} must be of type {hint.__name__}; write {example}")
    return value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else short(value)


def load_config(run_dir: str | Path) -> Config:
    """Return the Config in RUN/config.yaml, with the place where the folder is now. UserError when it holds no run."""
    path = Path(run_dir) / "config.yaml"
    require(path.is_file(), f"{run_dir} holds no run (no config.yaml); start one with `distlora train`")
    remedy = "restore a complete copy, or start the run again in another folder"
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    require(isinstance(values, dict), f"{path} is damaged: it holds no settings; {remedy}")
    # What was cut off would silently be the defaults.
    require("run_dir" in values, f"{path} is truncated: its last setting, run_dir, is missing; {remedy}")
    _rename_old(values)
    try:
        return build(Config, {**values, "run_dir": str(run_dir)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _rename_old(values: dict[str, Any]) -> None:
    """Replace settings of earlier versions by those that stand for them now, in place."""
    if "card" in values:
        values.setdefault("gpu", values.pop("card"))
    train, tracker = values.get("train"), values.get("tracker")
    if isinstance(train, dict):
        train.pop("keep_dequantized", None)  # It changed no result.
        if "liger" in train:
            train.setdefault("fused_kernels", "own" if train.pop("liger") else "none")
    if isinstance(tracker, dict) and "name" in tracker:  # It named the only tracker.
        values["tracker"] = {**tracker, name: True} if (name := tracker.pop("name")) != "none" else {}


MAX_YAML_VALUES = 100_000
"""Largest number of values in a YAML file, those of aliases counted at each use."""


def parse_yaml(content: bytes) -> Any:
    """Return the plain values of a YAML file. Raises ValueError with the reason, in one line, for what is no YAML."""
    import yaml

    try:
        # PyYAML's own parser takes seconds for a few thousand open brackets; libyaml refuses them at once.
        values = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(content.decode("utf-8")).get_single_data()
    # No YAML, no UTF-8; a date that is none, an integer of thousands of digits; brackets nested without end; and values
    # with a tag that they do not fit (`!!timestamp x`, `!!bool x`), which PyYAML does not expect.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    left, stack = MAX_YAML_VALUES, [values]
    while stack and left:  # Aliases (*name) make of a few lines more values than memory holds, or one inside of itself.
        value, left = stack.pop(), left - 1
        stack += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if stack:
        raise ValueError(f"it holds more than {MAX_YAML_VALUES:,} values, or one that holds itself by an alias")
    return values


def as_mapping(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values (tuples become lists), as in RUN/config.yaml and in wandb."""
    values: dict[str, Any] = as_plain(dataclasses.asdict(config))
    return values


def as_plain(value: Any) -> Any:
    """Return a setting's value as YAML has it: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def settings_by_name(config: Config) -> dict[str, Any]:
    """Return the settings as plain values by the names that users type: section.name."""
    settings: dict[str, Any] = {}
    for section, values in as_mapping(config).items():
        if isinstance(values, dict):
            settings |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            settings[section] = values
    return settings
