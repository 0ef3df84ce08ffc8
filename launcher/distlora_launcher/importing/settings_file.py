"""A settings file on the command line: `distlora train mine.yaml [setting=value ...]`.

The file holds distlora's settings, nested by section, or is a file of Axolotl or LLaMA-Factory, which its keys tell. It
becomes overrides in front of those of the command line, which win; so a sweep or a job in a queue does not depend on
the file.
"""

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlora.config import Config, SweepConfig, UserError, nearest, require
from distlora.config.errors import FILES
from distlora.config.file import coerce, parse_yaml
from distlora.config.peer_names import peer_hint, same_setting
from distlora.run_folder.sweep import words_of
from distlora_launcher.compose.compose import merge_file
from distlora_launcher.compose.overrides import nearest_setting, options_of
from distlora_launcher.importing import import_settings, tool_of

SUFFIXES = (".yaml", ".yml")
SECTIONS: dict[str, Any] = {
    name: hint
    for name, hint in {**typing.get_type_hints(Config), "sweep": SweepConfig}.items()
    if dataclasses.is_dataclass(hint)
}
WITHOUT_SECTION = ("name", "run_dir")
OPTION_FIELDS = {
    "adapter": "method",
    "quant": "method",
    "parallel": "backend",
    "optim": "name",
    "cluster": "launcher",
    "plan": "mode",
    "sweep": "method",
}
"""The setting that names a group's option, which has settings of its own: `cluster: {launcher: slurm, qos: high}`."""

PEERS = {
    "torchtune": {"_component_"},
    "LLaMA-Factory V1": {"peft_config", "dist_config", "kernel_config", "train_dataset"},
    "TRL": {"model_name_or_path", "dataset_name", "per_device_train_batch_size"},
    "Accelerate": {"compute_environment", "distributed_type"},
    "DeepSpeed": {"zero_optimization"},
}
"""Other tools, and keys by which a file of each is known."""


def with_file(words: Sequence[str], program: str, *, config_dir: str | None = None) -> list[str]:
    """Return overrides in which a settings file, if there is one, has become its settings.

    Relative paths in the file are from the working folder, as on the command line. Differences of an imported file are
    printed on stderr. Raises UserError for a file that cannot be read, or that holds what distlora does not have.
    """
    files = [word for word in words if "=" not in word and word.endswith(SUFFIXES)]
    overrides = [word for word in words if word not in files]
    if not files:
        return overrides
    require(len(files) == 1, f"{' and '.join(files)} are two settings files; write all settings into one of them")
    path = Path(files[0]).expanduser()
    values = read_values(path, program)
    if (tool := tool_of(values)) is not None:
        return merge_file(import_tool(path, values, overrides, tool), overrides, config_dir=config_dir)
    refuse_peers(path, values)
    text = path.read_text(encoding="utf-8")
    try:  # OmegaConf reads 2e-4 as a number, and refuses a key that stands there twice.
        settings = own_settings(typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(text))))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from error
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {error}") from error
    return merge_file(settings, overrides, config_dir=config_dir)


def read_values(path: Path, program: str) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    require(not path.is_dir(), f"{program}: {path} is a folder; name a settings file")
    if not path.is_file():
        others = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, others, cutoff=FILES) or f"; `distlora init {path}` writes one to start from"
        raise UserError(f"{program}: there is no file {path}{hint}")
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not YAML ({error}); correct it") from error
    require(
        isinstance(values, dict) and bool(values), f"{path} holds no settings; `distlora init FILE` shows how it looks"
    )
    return {str(key): value for key, value in values.items()}


def own_settings(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings of a file in distlora's terms by group or dotted name. Raises UserError for unknown ones."""
    settings: dict[str, Any] = {}
    for name, value in _flat(values):
        section, _, field = name.partition(".")
        require(name not in settings and f"++{name}" not in settings, f"{name} is set twice; leave one of them out")
        if name == "sweep.space" and isinstance(value, dict):  # A list is written as on the command line: 8,16.
            value = {k: words_of({"": v})[0][2:-1] if isinstance(v, list) else v for k, v in value.items()}
        if field:
            name = _checked(name, value)
        elif section not in (*SECTIONS, *WITHOUT_SECTION, "recipe"):
            raise UserError(f"there is no setting {name}{_hint(name)}")
        settings[name] = value
    return settings


def _checked(name: str, value: Any) -> str:
    """Return the name to write before a setting's value: a group's where the value is its option.

    A default may stand in a section whose option does not have the setting, as in RUN/config.yaml: `++` allows that.
    """
    section, _, field = name.partition(".")
    fields = {item.name: item for item in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
    require(field.partition(".")[0] in fields, f"there is no setting {name}{_hint(name)}")
    if field not in fields or "${" in str(value):
        return name
    try:
        typed = coerce(typing.get_type_hints(SECTIONS[section])[field], value, name)
    except UserError as error:
        if isinstance(value, str) and "," in value:
            raise UserError(
                f"{error}; several values are for the command line: distlora sweep FILE {name}=A,B"
            ) from error
        raise
    if field == OPTION_FIELDS.get(section) and value in options_of(section):
        return section
    item = fields[field]
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return f"++{name}" if typed == default else name


def _flat(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (group, option) and (dotted name, value) of a file, also of a recipe's `defaults`."""
    for key, value in values.items():
        if key == "defaults" and isinstance(value, list):
            for entry in value:
                for group, option in (entry if isinstance(entry, dict) else {"recipe": entry}).items():
                    if option != "_self_":
                        yield str(group).removeprefix("override ").lstrip("/"), option
        elif key in SECTIONS and isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        elif value is not None or key not in (*SECTIONS, "recipe"):
            yield str(key), value


def _hint(name: str) -> str:
    settings = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
    return peer_hint(name) or nearest_setting(name, settings, [*SECTIONS, *WITHOUT_SECTION, "recipe"])


def refuse_peers(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a file of a tool that is not imported, with the settings that have an equal here."""
    keys = {*values, *("_component_" for item in values.values() if isinstance(item, dict) and "_component_" in item)}
    tool = next((name for name, known in PEERS.items() if keys & known), None)
    if tool is None:
        return
    advice = {
        "Accelerate": "it starts processes, for which distlora has cluster.gpus_per_node=N and cluster.nodes=N",
        "DeepSpeed": f"write parallel=zero3 parallel.deepspeed_config={path}",
    }
    known = {same_setting(key): value for key, value in values.items() if not isinstance(value, (dict, list))}
    shown = " ".join(f"{name}={value}" for name, value in known.items() if name and value is not None)
    same = f" These of its keys have the same meaning here: {shown}" if shown else ""
    cure = "write its settings into a file of distlora's, which `distlora init FILE` starts." + same
    raise UserError(f"{path} is a file of {tool}, which distlora does not read; {advice.get(tool, cure)}")


def import_tool(path: Path, values: dict[str, Any], overrides: Sequence[str], tool: str) -> dict[str, Any]:
    """Return a file of one of importing.TOOLS as settings, and print what differs. Raises UserError for lost keys.

    The global batch is for as many GPUs as the command line sets, or else the file.
    """
    from distlora_launcher.importing.recipe import escaped  # Reads a table, which other files do not need.

    typed = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    sizes = (typed.get(name, "") for name in ("cluster.gpus_per_node", "cluster.nodes"))
    gpus_per_node, nodes = (max(1, int(size)) if size.isdecimal() else None for size in sizes)
    nodes = nodes or 1
    imported = import_settings(values, processes=gpus_per_node and gpus_per_node * nodes, tool=tool)
    require(
        imported.processes % nodes == 0,
        f"cluster.nodes={nodes}: {path} is for {imported.processes} GPUs in all; add cluster.gpus_per_node=N",
    )
    imported.section("cluster")["gpus_per_node"] = imported.processes // nodes
    notes = imported.not_carried
    refused = [f"  {note.key}: {note.reason}" for note in notes if note.group != "changed"]
    if refused:
        cure = f"remove them, or convert the rest: distlora import {tool} {path} --out mine/recipe/NAME.yaml"
        raise UserError(f"{path} has keys that distlora does not follow:", *refused, cure)
    gpus = f"{imported.processes} GPU{'s' if imported.processes > 1 else ''}"
    lines = [f"{path} ({imported.tool}), for {gpus}: {len(notes) or 'no'} difference{'s' if len(notes) != 1 else ''}"]
    print("\n".join([*lines, *(f"  {note.key}: {note.reason}" for note in notes)]), file=sys.stderr)
    settings = dict(_flat(imported.settings))
    return {**imported.options, **typing.cast("dict[str, Any]", escaped(settings))}
