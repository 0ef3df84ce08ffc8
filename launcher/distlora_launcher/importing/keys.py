"""A reader of another tool's mapping that knows which keys nobody has read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distlora.config import UserError


class Keys:
    """The settings of a mapping, each marked as read when it is asked for. A key without a value counts as unset."""

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values = values
        self.place = place
        """Stands before a key's name in messages: `datasets[0].`."""
        self._read: set[str] = set()

    def any(self, *names: str) -> Any:
        """The first value that is set under one of the names (aliases), or None; all of them count as read."""
        self._read.update(names)
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def text(self, *names: str) -> str | None:
        """A string; empty and false count as unset."""
        value = self.any(*names)
        if isinstance(value, (dict, list)) or value is True:
            raise self._wrong(names, value, "a word")
        return None if value in (None, False, "") else str(value)

    def number(self, *names: str) -> float | None:
        """A number; also as text, which YAML makes of 2e-5."""
        value = self.any(*names)
        if value is None or value == "":
            return None
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError) as error:
            raise self._wrong(names, value, "a number") from error

    def integer(self, *names: str) -> int | None:
        """A whole number."""
        value = self.number(*names)
        if value is not None and not value.is_integer():
            raise self._wrong(names, value, "a whole number")
        return None if value is None else int(value)

    def flag(self, *names: str) -> bool:
        """true, or false when it is unset."""
        value = self.any(*names)
        if value is None or isinstance(value, bool):
            return bool(value)
        if str(value).lower() in ("true", "false", "yes", "no"):
            return str(value).lower() in ("true", "yes")
        raise self._wrong(names, value, "true or false")

    def words(self, *names: str) -> list[str] | None:
        """A list of words; a single one counts as a list."""
        value = self.any(*names)
        if isinstance(value, dict):
            raise self._wrong(names, value, "a list")
        if value in (None, False, ""):
            return None
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    def mapping(self, *names: str) -> dict[str, Any]:
        """A mapping, empty when it is unset or false."""
        value = self.any(*names) or {}
        if not isinstance(value, dict):
            raise self._wrong(names, value, "a mapping")
        return {str(key): item for key, item in value.items()}

    def unread(self) -> Iterator[tuple[str, Any]]:
        """The keys that nobody asked for."""
        return ((name, value) for name, value in self.values.items() if name not in self._read)

    def _wrong(self, names: tuple[str, ...], value: Any, kind: str) -> UserError:
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        return UserError(f"{self.place}{name}={value!r} is not {kind}; correct it in the Axolotl file")
