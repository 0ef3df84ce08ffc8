"""What an attention implementation makes beside what it keeps and hands on, read off the code that allocates."""

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
    """What an attention implementation keeps and makes."""

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
    """fp32 copies of dQ in the backward of flash attention 2 (flash_api.cpp, mha_varlen_bwd, in flash-attn and in
    torch), over so many tokens of so many rows: one that is added to by atomics, or one for each program that walks
    over the same queries; with 128 rows more a document. The most of one document a row and of such of 256 tokens: what
    data has is not known, and shorter ones take more."""
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
    """attention_cpu.py's: of a tile its scores, in backward twice, and queries and outputs, there in fp32 for D; of a
    document keys and values with columns more, of which forward has the keys, and in backward their gradients in fp32.
    """
    groups, size = sizes.heads // sizes.key_heads, sizes.head_size
    scores = 2 * scores_at_once(longest, groups, sizes.key_heads)
    wide = 2 * (size + EXTRA) * sizes.key_heads * longest
    queries = sizes.heads * tile_length(longest, groups)
    rows, of_keys = 2 * (size + EXTRA) * queries, 2 * sizes.keys * longest
    forward = scores + wide + rows + (2 * size + 4) * queries
    backward = 2 * scores + 2 * wide + 4 * of_keys + 2 * rows + of_keys + 2 * size * queries
    return Made(forward, backward)
