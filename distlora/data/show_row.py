"""`python -m distlora.data.show_row RUN N ...`: packed training rows as text, document by document.

A run that stops at a non-finite loss names rows; this shows what is in them. Exit code 0, or 2 with a message.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distlora.architecture.tokens import load_tokenizer, tokenize_alone
from distlora.config import UserError
from distlora.config.file import load_config
from distlora.data.painting import Paint, paint_for_stdout, painted
from distlora.data.prepare import open_split
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows
from distlora.system.exit_codes import DONE, run_to_exit_code


def main(arguments: list[str] | None = None) -> int:
    """Print the rows that are named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora.data.show_row", description="Show packed rows.")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("rows", type=int, nargs="+", help="numbers of training rows, from 0")
    parser.add_argument("--no-color", action="store_true", help="mark trained tokens with [[ ]]")
    options = parser.parse_args(arguments)
    paint = paint_for_stdout(no_color=options.no_color)
    return run_to_exit_code(lambda: show(options.run, options.rows, paint))


def show(run_dir: str, numbers: Sequence[int], paint: Paint) -> int:
    """Print the rows. Raises UserError for one that the run does not have, and for a run without prepared data."""
    config = load_config(run_dir)
    rows = open_split(run_dir, "train")
    assert rows is not None, "a preparation without training rows is refused"
    wrong = [number for number in numbers if not 0 <= number < len(rows)]
    if wrong:
        raise UserError(f"there is no row {wrong[0]:,}: {run_dir} has {len(rows):,}, numbered from 0")
    tokenizer = load_tokenizer(Path(config.model.path), config.model.new_tokens)
    for number in numbers:
        for line in row_lines(rows, number, tokenizer, paint):
            print(line)
    return DONE


def row_lines(rows: PackedRows, number: int, tokenizer: Any, paint: Paint) -> Iterator[str]:
    """The documents of one row, with what of them is trained."""
    (tokens,), (flags,) = rows.read(np.array([number]))
    trained = np.zeros(len(tokens), np.uint8)
    trained[1:] = flags[:-1] & TRAINED  # A flag is about the token that follows.
    starts = [*np.flatnonzero(flags & STARTS).tolist(), len(tokens)]
    yield paint.title(f"row {number:,}: {len(tokens):,} tokens, {np.count_nonzero(trained):,} trained")
    is_rejected = [*(flags & REJECTED > 0), False]
    for start, end in itertools.pairwise(starts):
        if trained[start:end].any():
            side = ", rejected" if is_rejected[start] else ", chosen" if is_rejected[end] else ""
            yield paint.title(f"--- tokens {start:,} to {end - 1:,}{side}")
            yield painted(tokenizer, tokens, trained, start, end, paint)
        else:
            yield paint.title(f"--- tokens {start:,} to {end - 1:,}: padding")


if __name__ == "__main__":
    tokenize_alone()
    sys.exit(main())
