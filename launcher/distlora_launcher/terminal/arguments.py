"""Parse a command's arguments into one typed request, and make its help text of that. Mistakes are UserErrors."""

import argparse
import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from distlora.config import UserError, nearest
from distlora.config.errors import named_settings
from distlora.config.field_docs import field_docs
from distlora.system.exit_codes import DONE

Request = TypeVar("Request")


class HelpShownError(Exception):
    """The arguments asked for the help text, which has been printed."""


def call_main(module: str, arguments: list[str]) -> int:
    """Import a command's module, call its main and return the exit code; 0 if its help text was printed instead.

    A module that has NAMES (setting -> argument of the command) gets its UserErrors in these names.
    """
    command = importlib.import_module(module)
    with named_settings(getattr(command, "NAMES", {})):
        try:
            code: int = command.main(arguments)
        except HelpShownError:
            return DONE
    return code


def listed(rows: Mapping[str, str], *, width: int = 0) -> str:
    """Return the names and summaries of a help text, one line each; names have `width` characters or more."""
    width = max(width, *map(len, rows))
    return "\n".join(f"  {name.ljust(width)}  {summary}" for name, summary in rows.items())


def nearest_option(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean --x?)` for the option that starts with `name`, or else is most like it."""
    longer = [option for option in known if len(name) > 3 and option.startswith(name)]
    return f" (did you mean {longer[0]!r}?)" if longer else nearest(name, known)


def subject(command: str, arguments: Sequence[str], summaries: Mapping[str, str]) -> str:
    """Return the subject that a command's first argument names, one of `summaries`.

    Raises HelpShownError after printing the help text, and UserError for an unknown subject, with the nearest.
    """
    example = f"distlora {command} {next(iter(summaries))} --help"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: distlora {command} WHAT ...\n\n{listed(summaries)}")
        print(f"\nexample: {example}")
        raise HelpShownError
    if not arguments:
        raise UserError(f"distlora {command} needs one of {', '.join(summaries)}; for example {example}")
    name = arguments[0]
    if name not in summaries:
        raise UserError(
            f"distlora {command}: {name} is not known{nearest(name, [*summaries, '--help'])}; write one of "
            f"{', '.join(summaries)}"
        )
    return name


def read(request: type[Request], program: str, arguments: Sequence[str], *, epilog: str | None = None) -> Request:
    """Return the arguments as a `request`, a dataclass whose docstrings make the help text.

    The docstring under a field is its help, after `METAVAR: ` where it takes any value; `[METAVAR]: ` makes the value
    optional. A field without a default and a list are positional; other fields are options named `--like-this` (`for_`
    is `--for`); one without a docstring is not an argument. A tuple is given as `a,b`. Raises HelpShownError after
    printing the help text, and UserError as Parser.parse_args does.
    """
    parser = Parser(program, inspect.getdoc(request), epilog)
    hints = get_type_hints(request)
    texts = {name: text.removesuffix(".").replace("%", "%%") for name, text in field_docs(request).items()}
    for item in dataclasses.fields(request):  # type: ignore[arg-type]
        if item.name not in texts:
            continue
        flag, kind = f"--{item.name.rstrip('_').replace('_', '-')}", hints[item.name]
        default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        if isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
            texts[item.name] += f" (default: {default})"
        if get_origin(kind) in (Union, UnionType):
            (kind,) = (member for member in get_args(kind) if member is not type(None))
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=texts[item.name])
            continue
        if get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), default=item.default, help=texts[item.name])
            continue
        metavar, _, text = texts[item.name].partition(": ")
        options: dict[str, Any] = {"metavar": metavar.strip("[]"), "help": text[:1].upper() + text[1:], "type": kind}
        if get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+" if item.default_factory is MISSING else "*"}
        elif get_origin(kind) is tuple:
            options["type"] = _numbers if get_args(kind)[0] is int else _words
        if get_origin(kind) is list or item.default is MISSING:
            parser.add_argument(item.name, **options)
            continue
        if metavar.startswith("["):
            options |= {"nargs": "?", "const": ""}
        parser.add_argument(flag, dest=item.name, default=item.default, **options)
    parser.show_help(arguments)
    return request(**vars(parser.parse_args(arguments)))


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors, in place of argparse's usage page and its exit."""

    def __init__(self, prog: str, description: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )

    def show_help(self, arguments: Sequence[str]) -> None:
        """Print the help text where it is asked for. Raises HelpShownError then."""
        if {"-h", "--help"} & set(arguments):
            print(self.format_help().rstrip())
            raise HelpShownError

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options. Raises UserError for an unknown option, a wrong number of arguments and a wrong value."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in itertools.takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"there is no option {name}{nearest_option(name, [*known, '--help'])}")
        options, extra = self.parse_known_intermixed_args(list(args), namespace)
        if extra and extra[0].startswith("-"):
            self.error(f"there is no option {extra[0]}")
        if extra:
            self.error(f"{extra[0]!r} is one argument too many")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the parser's message."""
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` shows the usage")


def _numbers(text: str) -> tuple[int, ...]:
    """Return the positive numbers of `8,64`, each once and in order."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text} is not a list of positive numbers; write 8,64")
    return tuple(sorted({int(word) for word in words}))


def _words(text: str) -> tuple[str, ...]:
    """Return the names of `a,b`, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} names nothing between two commas; write NAME,NAME")
    return names
