"""Map a checkpoint's tensor names to a model's parameter names by transformers' rules, without torch and transformers.

weights/conversion.py makes the rules from a model. They equal transformers' rename_source_key (test_conversion.py
compares them for every model type).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """Replace the first match of a pattern in a name."""

    pattern: str
    """Regular expression; the alternatives are the named groups g0, g1, ..."""
    targets: tuple[str, ...]
    r"""Replacements, in which \1 is the group after the named one. All but the first name further parameters that a
    converter makes from the same tensor."""
    scope: str | None = None
    """Path of the submodule whose names alone are replaced, without `base_prefix`; None: all names are."""
    base_prefix: str = ""
    """Prefix of the scope that a name may have or lack."""
    offset: int = 0
    r"""Added to the index \1."""
    divisor: int = 1
    r"""The index \1 is divided by it after the addition, rounded down."""

    guard: str | None = None
    """Pattern that a name on disk must match, else the rule has no effect on any."""

    def apply(self, name: str) -> str | None:
        """Return the new name; None if nothing matches."""
        prefix = ""
        if self.scope is not None:
            scope, base = (f"{path}." if path else "" for path in (self.scope, self.base_prefix))
            prefix = base + scope if name.startswith(base + scope) else scope
            if not name.startswith(prefix):
                return None
            name = name.removeprefix(prefix)
        match = re.search(self.pattern, name)
        if match is None:
            return None
        replacement = self.targets[0]
        if r"\1" in replacement:
            group = next(group for group, value in match.groupdict().items() if value is not None)
            value = match[match.re.groupindex[group] + 1]
            if (self.offset, self.divisor) != (0, 1):
                value = str((int(value) + self.offset) // self.divisor)
            replacement = replacement.replace(r"\1", value)
        return prefix + name.replace(match[0], replacement, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNames:
    """The rules by which transformers renames a checkpoint's tensors for one model."""

    renamings: tuple[Rename, ...]
    """Applied in order, each to the result of the one before."""
    converters: tuple[Rename, ...]
    """Applied after the renamings; only the first that matches. They put parameters together from tensors or cut them
    out of one."""
    base_model_prefix: str
    """Prefix that the names in a checkpoint of the bare decoder lack."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DiskNames:
        """Return the rules of a JSON object that dataclasses.asdict made."""
        rules = {
            key: tuple(Rename(**{**rule, "targets": tuple(rule["targets"])}) for rule in values[key])
            for key in ("renamings", "converters")
        }
        return cls(**rules, base_model_prefix=values["base_model_prefix"])

    def rename(self, name: str, known: Collection[str]) -> tuple[str, Rename | None]:
        """Return (the model's name, the converter that matched). `known`: the model's names."""
        target, converter = self._rename(name, known, self.renamings, self.converters)
        if target not in known and name in known:
            target, converter = self._rename(name, known, (), ())
        return target, converter

    def _rename(
        self, name: str, known: Collection[str], renamings: Iterable[Rename], converters: Iterable[Rename]
    ) -> tuple[str, Rename | None]:
        for rule in renamings:
            name = rule.apply(name) or name
        matched = None
        for rule in converters:
            if (renamed := rule.apply(name)) is not None:
                name, matched = renamed, rule
                break
        prefix = self.base_model_prefix
        without = re.sub(f"^{prefix}.", "", name, count=1)
        if name.startswith(prefix) and without in known:
            name = without
        elif f"{prefix}.{name}" in known:
            name = f"{prefix}.{name}"
        return name, matched


def model_names(rules: DiskNames, on_disk: Iterable[str], known: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the names on disk that each of the model's parameters (`known`) comes from; absent ones are left out."""
    stored_names: dict[str, list[str]] = {}
    names = sorted(on_disk, key=natural_order)
    active = (rule for rule in rules.renamings if rule.guard is None or any(re.search(rule.guard, n) for n in names))
    rules = replace(rules, renamings=tuple(active))
    for name in names:
        target, converter = rules.rename(name, known)
        if target not in known:
            continue
        if converter is None:
            stored_names.setdefault(target, [name])  # Of two names for one parameter transformers takes the first.
            continue
        first = converter.targets[0]
        for other in converter.targets:
            stored_names.setdefault(target.replace(first, other), []).append(name)
    return {target: tuple(stored) for target, stored in stored_names.items() if target in known}


def natural_order(name: str) -> list[tuple[Any, ...]]:
    """Return transformers' sort key of a name: experts.2 comes before experts.10."""
    parts: list[tuple[Any, ...]] = []
    for word in name.split("."):
        text = word.rstrip("0123456789")
        digits = word[len(text) :]
        parts.append((0, int(word)) if word.isdigit() else (1, text, *([int(digits)] if digits else [])))
    return parts
