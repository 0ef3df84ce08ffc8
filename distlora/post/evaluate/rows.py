"""The text of an evaluation as rows of tokens, the same for every model of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, UserError
from distlora.data.prepare import check_vocabulary, open_split, prepare
from distlora.data.rows import STARTS, PackedRows
from distlora.parallel import Ranks, from_rank_0
from distlora.post.divergence import evenly
from distlora.post.evaluate.request import Text

COMPARED_ROWS = 64
"""Rows of which two tokenizers must make the same tokens."""


def open_rows(text: Text, config: Config, ranks: Ranks) -> tuple[PackedRows, int]:
    """(the rows to read, how many there are), in tokens of the model of `config`. Every rank must call it alike.

    Raises UserError for text that cannot be read and for rows that are gone.
    """
    if text.run is not None:
        rows = open_split(text.run, "eval")
        assert rows is not None, "refused when the request was made"
    else:
        config = replace(config, data=text.data())
        if ranks.rank == 0:
            prepare(config)
        from_rank_0(0, ranks)  # The others then find what it made.
        rows = PackedRows.open(prepare(config), "train")
    return evenly(rows, text.most_rows), len(rows)


def check_same_tokens(rows: PackedRows, first: Config, other: Config, label: str) -> None:
    """Refuse a model whose tokenizer makes other tokens of this text, since losses a token cannot be compared then."""
    folder = Path(other.model.path)
    check_vocabulary(other, folder, int(np.max(rows.tokens, initial=0)))
    if (folder, other.model.new_tokens) == (Path(first.model.path), first.model.new_tokens):
        return
    ours, theirs = (load_tokenizer(Path(c.model.path), c.model.new_tokens) for c in (first, other))
    for row in range(min(COMPARED_ROWS, len(rows))):
        for piece in pieces(rows, row):
            # Once through text, whose tokens are the tokenizer's own choice.
            text = ours.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if _tokens(ours, text) != _tokens(theirs, text):
                raise UserError(
                    f"{label} has another tokenizer than {first.model.path}: it makes other tokens of {text[:40]!r}, "
                    "and a loss a token of one cannot be compared with that of the other; evaluate them one at a time"
                )


def pieces(rows: PackedRows, row: int) -> list[list[int]]:
    """The documents of a row, the padding among them."""
    tokens, flags = rows.read(np.array([row]))
    starts = np.flatnonzero(flags[0] & STARTS)
    return [part.tolist() for part in np.split(tokens[0], starts) if len(part)]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
