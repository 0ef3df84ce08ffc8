"""Show packed sequences of a run as text, document by document: `distlora data row RUN N ...`.

A run that stops at a non-finite loss names the sequences. Trained and special tokens are marked, and control characters
are escaped.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distlora.architecture.tokens import load_tokenizer
from distlora.config import UserError
from distlora.config.file import load_config
from distlora.data.prepare import open_split
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows
from distlora.system.exit_codes import DONE

_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters: a document must not move the cursor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Trained text in green, or between [[ and ]] where there are no colours; special tokens bold or cyan."""

    colour: bool

    def trained(self, text: str) -> str:
        """Mark trained text."""
        return text if self.colour else f"[[{text}]]"

    def stretch(self, text: str, *, trained: bool, special: bool) -> str:
        """Color a stretch of tokens."""
        code = {(True, True): "1;32", (True, False): "32", (False, True): "36"}.get((trained, special))
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def title(self, text: str) -> str:
        """Set a title in bold."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text


def paint_for_stdout(*, no_color: bool) -> Paint:
    """Colours where stdout is a terminal and neither the flag nor NO_COLOR (no-color.org) is set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal may lack a document's characters.
    return Paint(colour=not no_color and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def painted(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, start: int, end: int, paint: Paint) -> str:
    """Return the tokens from `start` to `end` as text, painted by stretches."""
    special = np.isin(tokens[start:end], sorted(tokenizer.added_tokens_decoder))
    kinds = trained[start:end] * 2 + special
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), end - start]
    # Some tokenizers drop the space in front of what they decode, so a stretch is what it adds to those before it.
    texts = [tokenizer.decode(tokens[start : start + edge].tolist()) for edge in edges]
    parts = []
    for is_trained, group in itertools.groupby(range(len(edges) - 1), key=lambda i: bool(kinds[edges[i]] >= 2)):
        part = "".join(
            paint.stretch(
                texts[i + 1][len(texts[i]) :].translate(_UNPRINTABLE),
                trained=is_trained,
                special=bool(kinds[edges[i]] % 2),
            )
            for i in group
        )
        parts.append(paint.trained(part) if is_trained else part)
    return "".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsRequest:
    """The packed sequences to show."""

    run_dir: str
    numbers: tuple[int, ...]
    """Numbers of training sequences, from 0."""
    no_color: bool = False


def show_rows(request: RowsRequest) -> int:
    """Print the sequences and return the exit code.

    Raises UserError for one that the run does not have, and for a run without prepared data.
    """
    paint = paint_for_stdout(no_color=request.no_color)
    model = load_config(request.run_dir).model
    rows = open_split(request.run_dir, "train")
    assert rows is not None, "a preparation without training rows is refused"
    wrong = [number for number in request.numbers if not 0 <= number < len(rows)]
    if wrong:
        raise UserError(f"there is no row {wrong[0]:,}: {request.run_dir} has {len(rows):,}, numbered from 0")
    tokenizer = load_tokenizer(Path(model.path), model.new_tokens)
    for number in request.numbers:
        for line in row_lines(rows, number, tokenizer, paint):
            print(line)
    return DONE


def row_lines(rows: PackedRows, number: int, tokenizer: Any, paint: Paint) -> Iterator[str]:
    """Yield the documents of one sequence, with their trained tokens marked."""
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
