"""A command with subjects (`distlora analyze WHAT`, `distlora bench WHAT`): a module of its package for each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from distlora.config import UserError, nearest
from distlora.system.exit_codes import BAD_INPUT, DONE

USAGE = """usage: distlora {command} WHAT ...

{subjects}

`distlora {command} WHAT --help` says more."""


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
        code: int = importlib.import_module(f"{self.package}.{name}").main(arguments[1:])
        return code

    def usage(self) -> str:
        width = max(map(len, self.summaries))
        lines = [f"  {name.ljust(width)}  {summary}" for name, summary in self.summaries.items()]
        return USAGE.format(command=self.command, subjects="\n".join(lines))
