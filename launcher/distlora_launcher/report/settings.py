"""The settings of a run: those that it has otherwise than the defaults first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from distlora.config import Config
from distlora.config.file import as_plain, settings_by_name
from distlora_launcher.report.document import table
from distlora_launcher.report.markup import Html, tag, text
from distlora_launcher.report.run_records import as_text

NONE = "none"
"""Of a setting that has no default."""


def default_settings() -> dict[str, Any]:
    """What each setting is where nobody says; NONE where somebody must. Plain values by whole names."""
    found: dict[str, Any] = {}
    hints = get_type_hints(Config)
    for item in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[item.name]):
            for inner in dataclasses.fields(hints[item.name]):
                found[f"{item.name}.{inner.name}"] = _default(inner)
        else:
            found[item.name] = _default(item)
    return found


def own_settings(config: Config) -> dict[str, Any]:
    """Those of a run, as plain values by whole names; without run_dir, which the report says by itself."""
    return {name: value for name, value in settings_by_name(config).items() if name != "run_dir"}


def settings_part(config: Config) -> Html:
    """Two tables: what differs from the defaults, and, folded away, what does not."""
    own, usual = own_settings(config), default_settings()
    changed = {name: value for name, value in own.items() if value != usual.get(name)}
    rows = [
        tag("tr", _cell("th", name), _cell("td", value), _cell("td", usual.get(name), soft=True))
        for name, value in changed.items()
    ]
    heads = [tag("th", name, scope="col") for name in ("setting", "value", "default")]
    same = {name: value for name, value in own.items() if name not in changed}
    return text([table(heads, rows), _folded(same)])


def _folded(same: Mapping[str, Any]) -> Html:
    sections: dict[str, list[Html]] = {}
    for name, value in same.items():
        row = tag("tr", _cell("th", name), _cell("td", value))
        sections.setdefault(name.partition(".")[0] if "." in name else "run", []).append(row)
    tables = [tag("div", tag("h3", section), tag("table", tag("tbody", rows))) for section, rows in sections.items()]
    summary = tag("summary", f"{len(same)} settings are as the defaults have them")
    return tag("details", summary, tag("div", tables, cls="columns"))


def _cell(name: str, value: Any, *, soft: bool = False) -> Html:
    is_none = soft and value == NONE
    shown = tag("span", "has none", cls="note") if is_none else tag("code", as_text(value))
    return tag(name, shown, cls="long" if name == "td" else None, scope="row" if name == "th" else None)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return NONE
    return as_plain(value)
