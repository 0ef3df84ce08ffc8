"""The arguments of a subcommand: mistakes are UserErrors, and an unknown flag is named with the nearest that exists."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from distlora.config import UserError, nearest
from distlora.config.errors import named_settings
from distlora.system.exit_codes import BAD_INPUT, DONE

Request = TypeVar("Request")

USAGE = """usage: distlora {command} WHAT ...

{subjects}

`distlora {command} WHAT --help` says more."""


def call_main(module: str, arguments: list[str]) -> int:
    """Import a command's module, call its main and return the exit code.

    A module that has NAMES (setting -> argument of the command) gets its UserErrors in these names.
    """
    command = importlib.import_module(module)
    with named_settings(getattr(command, "NAMES", {})):
        code: int = command.main(arguments)
    return code


@dataclass(frozen=True, slots=True)
class Subjects:
    """The subjects of a command, each a module of `package`.

    Its main(arguments) -> exit code does the work, --help included. It is imported when it is called.
    """

    command: str
    verb: str
    """Verb for messages."""
    package: str
    summaries: Mapping[str, str]
    """Arguments and a one-line summary by name."""

    def run(self, arguments: list[str]) -> int:
        """Call the named subject and return its exit code. Raises UserError as `named` does."""
        name = self.named(arguments)
        if name is None:
            return DONE if arguments else BAD_INPUT
        return call_main(f"{self.package}.{name}", arguments[1:])

    def named(self, arguments: list[str]) -> str | None:
        """Return the subject that the first argument names, or None after printing the help text.

        Raises UserError for an unknown one, with the nearest.
        """
        if not arguments or arguments[0] in ("-h", "--help"):
            print(self.usage())
            return None
        name = arguments[0]
        if name not in self.summaries:
            raise UserError(
                f"distlora {self.command}: there is nothing named {name!r} to {self.verb}"
                f"{nearest(name, self.summaries)}; write one of {', '.join(self.summaries)}"
            )
        return name

    def usage(self) -> str:
        """Return the help text."""
        width = max(map(len, self.summaries))
        lines = [f"  {name.ljust(width)}  {summary}" for name, summary in self.summaries.items()]
        return USAGE.format(command=self.command, subjects="\n".join(lines))


class Parser(argparse.ArgumentParser):
    """Parse a command's arguments into its request, and make its help text of their descriptions.

    Mistakes are UserErrors in place of argparse's usage page and its exit. `help` is the command line that shows the
    usage, where that is not `PROG --help`.
    """

    def __init__(self, prog: str, description: str | None = None, *, help: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.usage_command = help or f"{prog} --help"

    def read(self, request: type[Request], arguments: Sequence[str]) -> Request | None:
        """Return the arguments as a `request`, a dataclass with one field per argument.

        Prints the help text and returns None where that is asked for. Raises UserError as parse_args does.
        """
        if {"-h", "--help"} & set(arguments):
            print(self.format_help().rstrip())
            return None
        return request(**vars(self.parse_args(arguments)))

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options. Raises UserError for a word too many, an unknown flag, and a value of another kind."""
        options, extra = self.parse_known_intermixed_args(list(args), namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            if word.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                self.error(f"there is no option {word}{nearest(word, known)}")
            self.error(f"{word!r} is one argument too many")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the parser's message."""
        raise UserError(f"{self.prog}: {message}; `{self.usage_command}` shows the usage")


def numbers(flag: str, text: str) -> list[int]:
    """`8,64`, each once and in order."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{flag}={text} are no positive numbers; write {flag} 8,64")
    return sorted({int(word) for word in words})
