"""The arguments of a subcommand: mistakes are UserErrors, and an unknown flag is named with the nearest that exists."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from distlora.config import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse with our errors in place of its page of usage and its exit. --help is the command's own.

    `help` is the command line that shows the usage, where that is not `PROG --help`.
    """

    def __init__(self, prog: str, *, help: str | None = None) -> None:
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)
        self.usage_command = help or f"{prog} --help"

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """The options. Raises UserError for a word too many, an unknown flag, and a value of another kind."""
        options, extra = self.parse_known_intermixed_args(list(args), namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            if word.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                self.error(f"there is no option {word}{nearest(word, known)}")
            self.error(f"{word!r} is one argument too many")
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.usage_command}` shows the usage")


def numbers(flag: str, text: str) -> list[int]:
    """`8,64`, each once and in order."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{flag}={text} are no positive numbers; write {flag} 8,64")
    return sorted({int(word) for word in words})
