"""Tokens as text for a person: what is trained and what is special can be seen, and nothing moves the cursor."""

from __future__ import annotations

import io
import itertools
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters: a document must not move the cursor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Trained text in green, or between [[ and ]] where there are no colours; special tokens bold or cyan."""

    colour: bool

    def trained(self, text: str) -> str:
        return text if self.colour else f"[[{text}]]"

    def stretch(self, text: str, *, trained: bool, special: bool) -> str:
        code = {(True, True): "1;32", (True, False): "32", (False, True): "36"}.get((trained, special))
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def title(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text


def paint_for_stdout(*, no_color: bool) -> Paint:
    """Colours where stdout is a terminal and neither the flag nor NO_COLOR (no-color.org) is set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal may lack a document's characters.
    return Paint(colour=not no_color and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def painted(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, start: int, end: int, paint: Paint) -> str:
    """The tokens from `start` to `end` as text, painted by stretches."""
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
