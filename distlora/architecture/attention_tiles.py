"""Divide a document into the matrix products of attention_cpu.py, for it and for the planner. Imports no torch.

A tile is so many queries of a document, of all query heads that share a head of keys, and the keys that they see
between them; its length is the document's matter alone, so that no document's bits depend on those beside it. Letters:
L tokens of a document, G query heads a head of keys, n queries of a tile, N its keys.
"""

from __future__ import annotations

from collections.abc import Iterator

EXTRA = 2
"""Columns beside a head's, for what is subtracted within a product: its bf16, and the rest."""
_LONGEST, _FEWEST_ROWS = 128, 64
"""Queries of a tile at the most; G n at the least, where there are as many."""
_SCORES = 2**20
"""Of one head's tile at the most, and so many of several heads are made at once: 2 MiB, as large as a cache."""


def tile_length(length: int, groups: int) -> int:
    """Return n, the number of queries of a tile."""
    fits = max(_SCORES // (groups * length), -(-_FEWEST_ROWS // groups))
    return min(_LONGEST, fits, length)


def scores_at_once(longest: int, groups: int, key_heads: int) -> int:
    """Return the number of scores that memory is reserved for: of as many key heads as fit, at least one.

    Beyond _LONGEST tokens a shorter document can have as many as fit, and the longest has a few less.
    """
    of_head = groups * tile_length(longest, groups) * longest
    most = min(_SCORES, groups * min(_LONGEST, longest) * longest)
    return max(of_head, most, min(_SCORES, of_head * key_heads))


def tiles(length: int, tile: int, left: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end of queries and keys, first key) of each tile of a document.

    A token sees `left` tokens before it; None means all.
    """
    for start in range(0, length, tile):
        yield start, min(length, start + tile), 0 if left is None else max(0, start - left)


def computed_pairs(length: int, groups: int, window: int | None) -> int:
    """Return the query-key pairs in the tiles of a document, masked ones included: the sum of n N."""
    left = None if window is None or window >= length else window - 1
    return sum((end - start) * (end - key) for start, end, key in tiles(length, tile_length(length, groups), left))
