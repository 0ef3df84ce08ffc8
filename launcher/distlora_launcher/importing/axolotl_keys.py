"""Note Axolotl's keys that have no setting here, each with the reason and what to do instead (axolotl_keys.yaml).

A key that is off (false, empty) asks for nothing and is not mentioned, except where off is what changes the run.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from distlora.config import nearest
from distlora_launcher.importing.recipe import Group, Imported, Keys

_DATA = yaml.safe_load(resources.files(__package__).joinpath("axolotl_keys.yaml").read_text("utf-8"))
_UNSUPPORTED: list[dict[str, Any]] = _DATA["config"]
WHEN_OFF: dict[str, tuple[Group, str]] = _DATA["when_off"]
SUPPORTED: list[str] = _DATA["supported"]
_DATA_SET_KEYS = {name: (row["group"], row["reason"]) for row in _DATA["data_set"] for name in row["keys"]}

KNOWN_PLUGINS = ("LigerPlugin", "CutCrossEntropyPlugin")
"""Plugins that make the loss and its memory cheaper, and change no result."""


_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")


def additional_special_tokens(keys: Keys) -> list[str]:
    """Return the tokens that special_tokens adds beside the tokens with a role."""
    special = keys.mapping("special_tokens")
    return [str(token) for name in _ADDITIONAL for token in special.get(name) or ()]


def note_unread(keys: Keys, imported: Imported) -> None:
    """Note every unread key with its group and reason, or that Axolotl does not know it."""
    for plugin in keys.words("plugins") or []:
        name = plugin.rpartition(".")[2]
        known = name in KNOWN_PLUGINS
        reason = "logits exist a few at a time only" if known else "plugins of Axolotl are not run"
        imported.note("idle" if known else "unsupported", f"plugins: {name}", reason)
    for name, value in keys.mapping("special_tokens").items():
        if name == "pad_token" and value is not None:
            imported.note("idle", "special_tokens.pad_token", "padding is never trained nor seen, any token does")
        elif value and name not in _ADDITIONAL:
            imported.note(
                "refused",
                f"special_tokens.{name}={value}",
                "the tokenizer decides which token this is; change it in a copy of the model",
            )
    exact, prefixes = _table()
    for name, value in keys.unread():
        row = exact.get(name) or next((row for prefix, row in prefixes.items() if _fits(name, prefix)), None)
        if name in WHEN_OFF and value is False:
            imported.note(WHEN_OFF[name][0], f"{name}=false", WHEN_OFF[name][1])
        elif row is None and name not in WHEN_OFF:
            near = nearest(name, [*SUPPORTED, *exact])
            imported.note("unknown", name, f"no key of Axolotl that is known here{near}; it was ignored")
        elif row is not None and value not in (None, False, "", [], {}):
            imported.note(row[0], _shown(name, value), row[1])


def note_entry_key(entry: Keys, name: str, value: Any, imported: Imported) -> None:
    """Note an unread key of a data set."""
    if name not in _DATA_SET_KEYS:
        known = [*_DATA_SET_KEYS, "path", "type", "name", "split", "revision", "data_files", "ds_type"]
        imported.note("unknown", f"{entry.place}{name}", f"Axolotl has no such key{nearest(name, known)}")
    elif value not in (None, False, ""):
        group, reason = _DATA_SET_KEYS[name]
        if (name, value) not in (
            ("field_thinking", "reasoning_content"),
            ("template_thinking_key", "reasoning_content"),
        ):
            imported.note(group, f"{entry.place}{name}", reason)


def _table() -> tuple[dict[str, tuple[Group, str]], dict[str, tuple[Group, str]]]:
    """Return the rows by whole name, and those by pattern."""
    exact: dict[str, tuple[Group, str]] = {}
    prefixes: dict[str, tuple[Group, str]] = {}
    for row in _UNSUPPORTED:
        for name in row["keys"]:
            (prefixes if "*" in name else exact)[name] = (row["group"], row["reason"])
    return exact, prefixes


def _fits(name: str, pattern: str) -> bool:
    start, _, end = pattern.partition("*")
    return len(name) >= len(start) + len(end) and name.startswith(start) and name.endswith(end)


def _shown(name: str, value: Any) -> str:
    """Return the key, with its value where that is a word or a number."""
    return f"{name}={value}" if isinstance(value, (int, float, str)) and value is not True else name
