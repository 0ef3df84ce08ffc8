"""Calculate the memory that attention implementations allocate beside their inputs and outputs, as their code does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from distlora.architecture.attention_tiles import EXTRA, scores_at_once, tile_length
from distlora.planner.decoder_sizes import Decoder
from distlora.planner.kernels import AttentionKind

_ROWS_A_DOCUMENT, _DOCUMENT = 128, 256
"""Of flash attention's accumulators beside the tokens; tokens of a document, where nothing says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Memory that an attention implementation keeps and allocates."""

    kind: AttentionKind = "documents"
    document: int | None = None
    """Tokens of the longest document, which `tiles` have memory for; None: a row."""
    accumulators: float = 0
    """fp32 copies of the queries' gradient that the backward of `documents` has (`flash_accumulators`)."""
    expands_keys: bool = False
    """Whether that backward makes gradients of keys and values for each head of the queries."""


BY_DOCUMENTS = Attention()
"""Attention by documents, without what a kernel makes for itself."""


def flash_accumulators(processors: int, heads: int, tokens: int, rows: int, *, deterministic: bool) -> float:
    """Return the number of fp32 copies of dQ in flash attention 2's backward (flash_api.cpp, mha_varlen_bwd).

    There is one copy with atomics, or one for each program that walks over the same queries, with up to 128 rows more
    per document. Returns the larger count of sequences with one document and with documents of 256 tokens.
    """
    fewest = 2 * rows - 1  # Between rows stands an empty document (distlora.model.attention.cu_seqlens).

    def copies(documents: int) -> float:
        programs = -(-processors // (documents * heads)) if deterministic else 1
        return programs * (1 + _ROWS_A_DOCUMENT * documents / tokens)

    return max(copies(documents) for documents in (fewest, max(fewest, tokens // _DOCUMENT)))


class Made(NamedTuple):
    """Bytes."""

    forward: int
    backward: int


def tiles_make(sizes: Decoder, longest: int) -> Made:
    """Return the memory of attention by tiles on the CPU (attention_cpu.py).

    A tile has its scores, in backward twice, and queries and outputs in fp32. A document has keys and values with extra
    columns, and in backward their gradients in fp32.
    """
    groups, size = sizes.heads // sizes.key_heads, sizes.head_size
    scores = 2 * scores_at_once(longest, groups, sizes.key_heads)
    wide = 2 * (size + EXTRA) * sizes.key_heads * longest
    queries = sizes.heads * tile_length(longest, groups)
    rows, of_keys = 2 * (size + EXTRA) * queries, 2 * sizes.keys * longest
    forward = scores + wide + rows + (2 * size + 4) * queries
    backward = 2 * scores + 2 * wide + 4 * of_keys + 2 * rows + of_keys + 2 * size * queries
    return Made(forward, backward)
