"""The result of an import: settings by group, notes on keys that were not carried over, and both as text.

Keys that have no setting here are in axolotl_keys.yaml and llamafactory_keys.yaml, each with the reason and what to do
instead. A key that is off (false, empty) asks for nothing and is not mentioned, except where off is what changes the
run.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from distlora.config import Config, UserError, nearest


class Keys:
    """The settings of a mapping, each marked as read when it is asked for. A key without a value counts as unset."""

    def __init__(self, values: dict[str, Any], place: str = "", names: Mapping[str, str] | None = None) -> None:
        self.values = values
        self.names = names or {}
        """The file's own name of keys that it calls otherwise."""
        self.place = place
        """Stands before a key's name in messages: `datasets[0].`."""
        self.read: set[str] = set()
        """The names that were asked for."""

    def any(self, *names: str) -> Any:
        """Return the first value set under one of the names, or None; all names count as read."""
        self.read.update(names)
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def text(self, *names: str) -> str | None:
        """Return a string; empty and false count as unset."""
        value = self.any(*names)
        if isinstance(value, (dict, list)) or value is True:
            raise self._wrong(names, value, "a word")
        return None if value in (None, False, "") else str(value)

    def number(self, *names: str) -> float | None:
        """Return a number, also from text: YAML reads 2e-5 as text."""
        value = self.any(*names)
        if value is None or value is False or value == "":
            return None
        try:
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise TypeError
            return float(value)
        except (TypeError, ValueError) as error:
            raise self._wrong(names, value, "a number") from error

    def integer(self, *names: str) -> int | None:
        """Return a whole number."""
        value = self.number(*names)
        if value is not None and not value.is_integer():
            raise self._wrong(names, value, "a whole number")
        return None if value is None else int(value)

    def flag(self, *names: str) -> bool:
        """Return the boolean; False when it is unset."""
        value = self.any(*names)
        if value is None or isinstance(value, bool):
            return bool(value)
        if str(value).lower() in ("true", "false", "yes", "no"):
            return str(value).lower() in ("true", "yes")
        raise self._wrong(names, value, "true or false")

    def words(self, *names: str) -> list[str] | None:
        """Return a list of words; a single one counts as a list."""
        value = self.any(*names)
        if isinstance(value, dict):
            raise self._wrong(names, value, "a list")
        if value in (None, False, ""):
            return None
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    def mapping(self, *names: str) -> dict[str, Any]:
        """Return a mapping, empty when it is unset or false."""
        value = self.any(*names) or {}
        if not isinstance(value, dict):
            raise self._wrong(names, value, "a mapping")
        return {str(key): item for key, item in value.items()}

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Return the keys that were not read."""
        return ((name, value) for name, value in self.values.items() if name not in self.read)

    def _wrong(self, names: tuple[str, ...], value: Any, kind: str) -> UserError:
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        return UserError(f"{self.place}{self.names.get(name, name)}={value!r} is not {kind}; correct it in the file")


Group = Literal["changed", "idle", "unsupported", "refused", "unknown"]

HEADINGS: dict[Group, str] = {
    "changed": "changed",
    "idle": "no effect here",
    "unsupported": "not supported",
    "refused": "refused",
    "unknown": "unknown",
}
CARRIED: tuple[Group, ...] = ("idle",)
"""Groups that lose nothing of the run."""


@dataclass(frozen=True, slots=True)
class Note:
    """A key without an exact equal in distlora."""

    group: Group
    key: str
    """The key as written in the file, with its value where that matters."""
    reason: str
    """Why, and what to do."""


@dataclass(slots=True)
class Imported:
    """A configuration in our terms."""

    options: dict[str, str] = field(default_factory=dict)
    """Chosen option of a config group: {"optim": "adamw_8bit"}."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections and single settings, as in a recipe."""
    notes: list[Note] = field(default_factory=list)
    processes: int = 1
    """Number of GPUs that the global batch is for."""
    tool: str = "Axolotl"
    """The tool whose file it was."""

    def section(self, name: str) -> dict[str, Any]:
        """Return the settings of a section, to be filled."""
        return self.settings.setdefault(name, {})

    def note(self, group: Group, key: str, reason: str) -> None:
        """Add a note about a key, unless it is there."""
        if (note := Note(group, key, reason)) not in self.notes:
            self.notes.append(note)

    def tell(self, name: str, /, **values: Any) -> None:
        """Add the note `name` of NOTES, with these values in its key and its reason."""
        group, reason = NOTES[name]
        self.note(group, name.partition(" | ")[0].format(**values), reason.format(**values))

    @property
    def not_carried(self) -> list[Note]:
        """Return the notes of keys that were not carried over exactly."""
        return [note for note in self.notes if note.group not in CARRIED]


def recipe_text(imported: Imported, *, source: Path) -> str:
    """Return the recipe as a YAML file that Hydra composes over the defaults; settings in the order of `Config`."""
    many = f"{imported.processes} GPU{'s' if imported.processes > 1 else ''}"
    lines = ["# @package _global_", f"# Imported from {ascii(source.name)[1:-1]} ({imported.tool}), for {many}."]
    lines += ["defaults:", *(f"  - override /{group}: {option}" for group, option in imported.options.items()), ""]
    sections = typing.get_type_hints(Config)
    lines += [f"{name}: {_line(value)}" for name, value in imported.settings.items() if isinstance(value, str)]
    for name, section in sections.items():
        values = imported.settings.get(name)
        if isinstance(values, dict) and values:
            names = [item.name for item in dataclasses.fields(section) if item.name in values]
            assert len(names) == len(values), f"{name} has no such settings: {set(values) - set(names)}"
            lines += [f"{name}:", *(f"  {key}: {_line(values[key])}".replace(": \n", ":\n") for key in names)]
    return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    """Return a value as YAML on one line, or one line an item for a list of mappings."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n    - {_line(item)}" for item in value)
    text = yaml.safe_dump(escaped(value), default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def escaped(value: Any) -> Any:
    """OmegaConf reads ${...} as a reference; what another tool wrote is plain text."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def report(imported: Imported, *, source: Path, out: Path | None) -> str:
    """Return the report: the place of the recipe, and by group the keys that were not carried over exactly."""
    lines, counts = [], []
    for group, heading in HEADINGS.items():
        by_reason: dict[str, list[str]] = {}
        for note in imported.notes:
            if note.group == group:
                by_reason.setdefault(note.reason, []).append(note.key)
        if by_reason:
            lines += [f"{heading}:", *(f"  {', '.join(keys)}: {reason}" for reason, keys in by_reason.items())]
            counts.append(f"{sum(map(len, by_reason.values()))} {heading}")
    lines.append(f"imported {source}: {', '.join([*counts, 'all other keys exactly'])}")
    if out is not None:
        folder = out.parent.parent
        lines.append(f"wrote {out}; run it with `distlora train --config-dir {folder} recipe={out.stem}`")
    return "\n".join(lines)


def _table(tool: str) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(
        resources.files(__package__).joinpath(f"{tool}_keys.yaml").read_text("utf-8")
    )
    return table


_DATA, _LLAMAFACTORY = _table("axolotl"), _table("llamafactory")
NOTES: dict[str, tuple[Group, str]] = {
    name: (group, reason)
    for table in (_DATA, _LLAMAFACTORY)
    for group, rows in table["notes"].items()
    for name, reason in rows.items()
}
"""Group and reason of the notes of keys that are converted."""
_DATA_SET_KEYS = {name: (row["group"], row["reason"]) for row in _DATA["data_set"] for name in row["keys"]}

SECRETS = ("_key", "_secret", "_url", "_token")
"""Endings of keys whose values are not printed."""

PLUGINS: dict[str, tuple[Group, str]] = {
    name: (group, reason) for group, rows in _DATA["plugins"].items() for name, reason in rows.items()
}


def note_unread(keys: Keys, imported: Imported) -> None:
    """Note every unread key with its group and reason, or that the tool does not know it."""
    for plugin in keys.words("plugins") or []:
        name = plugin.rpartition(".")[2]
        group, reason = PLUGINS.get(name, ("unsupported", "plugins of Axolotl are not run"))
        imported.note(group, f"plugins: {name}", reason)
    is_axolotl = imported.tool == "Axolotl"
    table = _DATA["config"] if is_axolotl else _LLAMAFACTORY["config"] + _DATA["config"]
    when_off: dict[str, tuple[Group, str]] = (_DATA if is_axolotl else _LLAMAFACTORY)["when_off"]
    rows: dict[str, tuple[Group, str]] = {}
    for row in table:
        for name in row["keys"]:
            rows.setdefault(name, (row["group"], row["reason"]))
    patterns = {name: row for name, row in rows.items() if "*" in name}
    for name, value in keys.unread():
        row = rows.get(name) or next((row for pattern, row in patterns.items() if fnmatchcase(name, pattern)), None)
        if name in when_off and value is False:
            imported.note(when_off[name][0], f"{name}=false", when_off[name][1])
        elif row is None and name not in when_off:
            near = nearest(name, sorted(keys.read | rows.keys() - patterns.keys()))
            imported.note("unknown", name, f"not a known key of {imported.tool}{near}")
        elif row is not None and value not in (None, False, "", [], {}):
            is_shown = isinstance(value, (int, float, str)) and value is not True and not name.endswith(SECRETS)
            imported.note(row[0], f"{name}={value}" if is_shown else name, row[1])


def note_entry_key(entry: Keys, name: str, value: Any, imported: Imported) -> None:
    """Note an unread key of a data set."""
    if name not in _DATA_SET_KEYS:
        known = [*_DATA_SET_KEYS, "path", "type", "name", "split", "revision", "data_files", "ds_type"]
        imported.note("unknown", f"{entry.place}{name}", f"Axolotl has no such key{nearest(name, known)}")
    elif value not in (None, False, ""):
        group, reason = _DATA_SET_KEYS[name]
        imported.note(group, f"{entry.place}{name}", reason)
