"""A command with subjects (`distlora analyze WHAT`, `distlora bench WHAT`): a module of its package for each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from distlora.config import UserError, nearest
from distlora.config.errors import named_settings
from distlora.system.exit_codes import BAD_INPUT, DONE

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
    """The subjects of a command: each is a module of `package`, whose main(arguments) -> exit code does the work,
    --help included, and which is imported when it is called."""

    command: str
    verb: str
    """What is done to a subject, in words."""
    package: str
    summaries: Mapping[str, str]
    """By name: its arguments and a line of what it does."""

    def run(self, arguments: list[str]) -> int:
        """Hand over to the subject that is named. UserError for one that there is not, with the nearest."""
        if not arguments or arguments[0] in ("-h", "--help"):
            print(self.usage())
            return DONE if arguments else BAD_INPUT
        name = arguments[0]
        if name not in self.summaries:
            raise UserError(
                f"distlora {self.command}: there is nothing named {name!r} to {self.verb}"
                f"{nearest(name, self.summaries)}; write one of {', '.join(self.summaries)}"
            )
        return call_main(f"{self.package}.{name}", arguments[1:])

    def usage(self) -> str:
        width = max(map(len, self.summaries))
        lines = [f"  {name.ljust(width)}  {summary}" for name, summary in self.summaries.items()]
        return USAGE.format(command=self.command, subjects="\n".join(lines))
