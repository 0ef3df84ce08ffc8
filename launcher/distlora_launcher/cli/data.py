"""`distlora data preview|row|prepare`: show what a run would be trained on, show what it was, tokenize its data.

The settings of the preview are composed, and the model's folder and the data checked, as for `distlora train`; weights
are not needed. The functions behind the commands import transformers, so each is imported when it is called.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from distlora.config import UserError, nearest
from distlora.config.file import load_config
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check_data, check_model_folder
from distlora_launcher.compose.compose import compose_config, expand_home
from distlora_launcher.compose.hub import with_small_files
from distlora_launcher.terminal.arguments import Parser

COMMANDS = ("preview", "row", "prepare")
USAGE = """usage: distlora data preview model.path=FOLDER data.path=FILE [setting=value ...]
                             [--rows N] [--all] [--no-color] [--config-dir FOLDER]
       distlora data row RUN N [N ...] [--no-color]
       distlora data prepare RUN

preview: print documents as the model sees them, with the trained tokens in green (between [[ and ]] in a file or a
pipe, with NO_COLOR or --no-color), then figures: lengths, documents that are too long, documents left out and why, the
shares of a mixture, padding. The settings are those of `distlora train`.

  --rows N       documents of each source to print (2)
  --all          read everything; without it, the first 1,000 documents of each source
  --no-color     mark trained tokens with [[ ]] on a terminal too
  --config-dir   a folder with config groups of yours, as for `distlora train`

row: print packed training sequences of the run folder RUN by their numbers, as messages name them.

prepare: tokenize the data of the run folder RUN again, where its cache entry is gone or damaged."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names and return its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(
            f"distlora data: there is no command {command!r}{nearest(command, COMMANDS)}; write distlora data preview "
            "..., distlora data row RUN N or distlora data prepare RUN"
        )
    from distlora.architecture.tokens import tokenize_alone

    tokenize_alone()
    if command == "preview":
        return preview_documents(rest)
    return show_packed_rows(rest) if command == "row" else prepare_data(rest)


def preview_documents(arguments: Sequence[str]) -> int:
    """Check the settings and print the preview. Returns the exit code."""
    options, overrides = parse([expand_home(word) for word in arguments])
    config = compose_config(overrides, config_dir=options.config_dir)
    from distlora.data.preview import preview

    with with_small_files(config.model) as model:
        check_model_folder(dataclasses.replace(config, model=model))
        check_data(config.data, config.train.objective, config.run_dir)
        return preview(
            model,
            config.data,
            config.train,
            documents=options.rows,
            read_all=options.all,
            no_color=options.no_color,
        )


def show_packed_rows(arguments: Sequence[str]) -> int:
    """Print packed sequences of a run. Returns the exit code."""
    words = [word for word in arguments if word != "--no-color"]
    if len(words) < 2 or not all(word.isdecimal() for word in words[1:]):
        raise UserError(
            f"distlora data row takes a run folder and row numbers, not "
            f"{' '.join(words) or 'nothing'!r}; write distlora data row RUN 0"
        )
    load_config(words[0])
    from distlora.data.preview import show_rows

    return show_rows(words[0], [int(word) for word in words[1:]], no_color="--no-color" in arguments)


def prepare_data(arguments: Sequence[str]) -> int:
    """Tokenize the data of a run. Returns the exit code."""
    if len(arguments) != 1:
        raise UserError("distlora data prepare takes one run folder; write distlora data prepare RUN")
    load_config(arguments[0])
    from distlora.data.prepare import prepare_and_print

    return prepare_and_print(arguments[0])


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the overrides.

    Raises UserError for an unknown flag, with the nearest, and for values that are not numbers.
    """
    parser = Parser("distlora data preview", help="distlora data --help")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--no-color", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    if options.rows < 0:
        parser.error(f"--rows={options.rows} is not a number of documents; write 0 or more")
    return options, options.overrides
