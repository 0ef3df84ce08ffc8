"""Compute each token alike whatever runs beside it, so that sampling and training agree to the last bit. CPU only.

A library chooses a product's order of sums by its number of rows, so a token that is sampled alone and the same token
in a training row differ by rounding. Within `batch_invariant` every product runs in tiles of ROWS rows, of which the
last is filled up with zeros: always the same shape, in which each row is computed alike. Attention takes keys in blocks
of KEYS from a document's first on, with a running maximum (arXiv 2205.14135, algorithm 1): a block that a query does
not see changes nothing, exactly. It is several times slower. "Defeating Nondeterminism in LLM Inference" (Horace He
2025) has the idea and its limits; vLLM's batch_invariant.py replaces the same operations on a GPU.

Letters: M rows, K and N sizes of a product, B documents, T tokens, H query heads, G key and value heads, E head size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlora_kernels.dispatch import one_thread

ROWS = 16
"""Rows of each product, and queries that attend together."""
KEYS = 64
"""Keys that queries meet at once."""

VECTOR = 64
"""A multiple of the elements that torch's elementwise loops compute at once."""

_aten = torch.ops.aten
_BY_VECTORS = {
    getattr(_aten, name).default for name in ("exp", "silu", "gelu", "sigmoid", "tanh", "cos", "sin", "softplus")
}
"""Elementwise functions that are not rounded exactly, so that a vector's may differ from a single element's."""


class _FixedShapes(TorchDispatchMode):
    """Runs products of matrices in tiles of ROWS rows, and activations on whole vectors.

    Other elementwise operations and sums along rows need no change.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = kwargs.get("out")
        if func in (_aten.mm.default, _aten.mm.out):
            left, right = args
            return _written(_tiles(lambda rows: rows @ right, left), out)
        if func in (_aten.addmm.default, _aten.addmm.out):
            added, left, right = args
            factors = {name: kwargs[name] for name in ("alpha", "beta") if name in kwargs}
            added = added.expand(len(left), right.shape[1])
            return _written(_tiles(lambda more, rows: torch.addmm(more, rows, right, **factors), added, left), out)
        if func in (_aten.bmm.default, _aten.bmm.out):
            left, right = args
            products = [_tiles(lambda rows, of=of: rows @ of, part) for part, of in zip(left, right, strict=True)]
            return _written(torch.stack(products), out)
        if func in _BY_VECTORS:
            # torch computes the last elements of a tensor or of a thread's part, fewer than a vector, by another exp.
            values, *more = args
            flat = F.pad(values.reshape(-1), (0, -values.numel() % VECTOR))
            with one_thread():
                return func(flat, *more, **kwargs)[: values.numel()].view(values.shape)
        return func(*args, **kwargs)


def _tiles(product: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Return the product of operands (M, ...), ROWS rows at a time."""
    missing = -len(operands[0]) % ROWS
    padded = [F.pad(operand, (0, 0, 0, missing)) if missing else operand for operand in operands]
    parts = [product(*rows) for rows in zip(*(operand.split(ROWS) for operand in padded), strict=True)]
    whole = torch.cat(parts) if parts else product(*operands)
    return whole[: len(operands[0])]


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def batch_invariant(wanted: bool = True) -> AbstractContextManager[object]:
    """Compute products within this context, if it is `wanted`, as if each row were alone."""
    return _FixedShapes() if wanted else contextlib.nullcontext()


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float, left: int | None = None
) -> Tensor:
    """Attend causally: query (B, T, H, E), key and value (B, L, G, E) -> (B, T, H, E), in fp32 but for the result.

    `first` (B,): position of each document's first query; its keys begin at position 0. A query sees itself and `left`
    tokens before it, all for None.
    """
    num, length, heads, size = query.shape
    tiles = -(-length // ROWS)
    at = (first[:, None] + torch.arange(tiles * ROWS).clamp(max=length - 1)).view(num, 1, tiles, ROWS, 1)
    rows = F.pad(query.float(), (0, 0, 0, 0, 0, -length % ROWS)).view(num, tiles, ROWS, heads, size)
    rows = rows.permute(0, 3, 1, 2, 4).reshape(-1, ROWS, size)
    most = torch.full((num, heads, tiles, ROWS, 1), -torch.inf)
    total, mixed = torch.zeros_like(most), torch.zeros(num, heads, tiles, ROWS, value.shape[-1])
    for start in range(0, key.shape[1], KEYS):
        keys, values = (_block(each[:, start : start + KEYS].float(), heads, tiles) for each in (key, value))
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(num, heads, tiles, ROWS, KEYS) * scale
        distance = at - (start + torch.arange(KEYS))
        seen = distance >= 0 if left is None else (distance >= 0) & (distance <= left)
        scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(most, scores.amax(dim=-1, keepdim=True))
        finite = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, kept = (scores - finite).exp(), (most - finite).exp()
        total = total * kept + weights.sum(dim=-1, keepdim=True)
        product = torch.bmm(weights.view(-1, ROWS, KEYS), values).view(*mixed.shape)
        most, mixed = higher, mixed * kept + product
    output = (mixed / total).permute(0, 2, 3, 1, 4).reshape(num, tiles * ROWS, heads, -1)
    return output[:, :length].to(query.dtype)


def _block(part: Tensor, heads: int, tiles: int) -> Tensor:
    """Return keys or values (B, up to KEYS, G, E) as (B H tiles, KEYS, E), filled up with zeros."""
    count, groups, size = part.shape[1:]
    part = F.pad(part, (0, 0, 0, 0, 0, KEYS - count)).transpose(1, 2).repeat_interleave(heads // groups, dim=1)
    return part[:, :, None].expand(-1, -1, tiles, -1, -1).reshape(-1, KEYS, size)


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """Attend as a VarlenOp (attention.py): each packed document's queries (T, H, E) to its own keys (T, G, E)."""
    bounds = cu_seqlens.tolist()
    documents = [document for document in itertools.pairwise(bounds) if document[0] < document[1]]
    sizes = [end - start for start, end in documents]
    padded = [torch.nn.utils.rnn.pad_sequence(each.split(sizes), batch_first=True) for each in (query, key, value)]
    queries, keys, values = padded
    output = attend_rows(queries, keys, values, torch.zeros(len(sizes), dtype=torch.int64), scale, left)
    return torch.cat([rows[:size] for rows, size in zip(output, sizes, strict=True)])
