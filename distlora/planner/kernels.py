"""Decide which kernels the decoder layers use, by settings and device. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from distlora.architecture.attention_tiles import computed_pairs
from distlora.architecture.families import Family
from distlora.planner.decoder_sizes import Decoder
from distlora.planner.speed.operations import pairs
from distlora.planner.workload import Workload

AttentionKind = Literal["documents", "tiles", "sdpa", "eager"]
"""`documents`: flash attention over each document's length. `tiles`: products of matrices over each (attention_cpu.py;
attention.cpp is counted as that). `sdpa`: torch's with a dense mask, all pairs of a row. `eager`: the same, and the
scores of a row are tensors."""


def attention_kind(work: Workload, family: Family, decoder: Decoder, *, is_gpu: bool) -> AttentionKind:
    """Return the attention implementation that distlora.model.attention chooses, on a GPU that has the kernels."""
    if family.attention == "eager":
        return "eager"
    if work.attention == "sdpa" or work.dtype != "bf16":
        return "sdpa"
    if not is_gpu:
        return "tiles"
    return "documents" if decoder.head_size % 8 == 0 and decoder.head_size <= 256 else "sdpa"


def pairs_computed(kind: AttentionKind, documents: Sequence[int], window: int | None, groups: int) -> int:
    """Return the query-key pairs that one layer computes for a sequence of documents, masked ones included.

    `groups` is the number of query heads per key head.
    """
    if kind == "documents":
        return sum(pairs(length, window) for length in documents)
    if kind == "tiles":
        return sum(computed_pairs(length, groups, window) for length in documents)
    return sum(documents) ** 2


def scores_again(kind: AttentionKind) -> tuple[int, int]:
    """Return how often forward and backward recompute the scores.

    Flash attention and tiles recompute them in backward; the forward of tiles computes them twice.
    """
    return {"documents": (0, 1), "tiles": (1, 1), "sdpa": (0, 1), "eager": (0, 0)}[kind]


def fuses(work: Workload, family: Family, *, is_gpu: bool, has_liger: bool) -> bool:
    """Return True if norms are fused, by liger-kernel on a GPU or by torch.compile on a CPU.

    MLPs and rotary embeddings are fused too if there is no DoRA.
    """
    if work.adapter.method == "full" or family.experts is not None:
        return False
    return work.liger and has_liger if is_gpu else work.compile
