"""Causal attention by documents on the CPU in bf16, as matrix products: a VarlenOp.

torch's CPU flash attention loops at a quarter of their speed. Queries go in tiles, and each tile meets all keys that it
may see at once: keys of other documents, beyond the diagonal or before the window are in no product, except in the
tile's corner. Query heads that share a key head are rows of one matrix, so keys are never repeated. Backward keeps
query, key, value, the output and one number per query and head, and recomputes the weights.

The library rounds products to bf16, and a score of 20 rounded to bf16 makes a weight that is 4 % off. So scores are
rounded where they are small: a first product gives each query's largest score m, a second one q.k - m, and in backward
q.k - l with l the logarithm of the sum, which is near 0 wherever the weight is not. Two more columns make the
difference within the product, in fp32: -l and its bf16 rounding error, beside ones. dO.v - D likewise, with D = dO.O;
the rest of D is subtracted exactly (`_softmax_backward_data`), because the weights of a query that sees one token
cancel to the last bit only so. tests/test_attention_cpu.py measures it against fp64.

Letters: T tokens of all documents, L of one, N keys of a tile, n queries of a tile, H query heads, K key and value
heads, G = H / K, M = G n rows of a product, E head size, W = E + 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import EXTRA, scores_at_once, tile_length, tiles


class Tile(NamedTuple):
    """Queries of a document, from `first` to `last`, and the keys that they see."""

    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        """Return the number of queries."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Return the number of keys."""
        return self.keys.stop - self.keys.start


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """Attend as a VarlenOp: query (T, H, E), key and value (T, K, E), bf16 -> (T, H, E) bf16, contiguous."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16, f"{query.dtype}, {key.dtype}, {value.dtype}"
    assert scale > 0, f"scores times {scale}"
    output: Tensor = _Attend.apply(query, key, value, tuple(cu_seqlens.tolist()), scale * math.log2(math.e), left)
    return output


class _Attend(torch.autograd.Function):
    """Autograd function of `attend`. `scale` is in units of powers of 2."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float, left: int | None
    ) -> Tensor:
        work = _Work(query, key, bounds, left)
        output = query.new_empty(query.shape)
        sums = query.new_empty(work.keys, work.groups, len(query), dtype=torch.float32)
        """l of each query and head (K, G, T), in the unit of q.k."""
        for document in work.documents:
            keys, values = work.widened(key[document]), value[document].transpose(0, 1)
            queries, outputs = work.grouped(query[document]), work.grouped(output[document])
            for tile, heads in work.tiles(document):
                rows, seen = work.rows(queries[heads, :, tile.queries]), keys[heads, tile.keys].transpose(1, 2)
                scores = work.product(rows, seen, 0)
                work.hide(scores, tile)
                most = _largest(scores)
                torch.neg(most, out=rows[..., -EXTRA])
                torch.baddbmm(scores, rows, seen, beta=0, alpha=scale, out=scores)
                weights = work.cut(scores.exp2_(), tile)
                total = weights.sum(-1, dtype=torch.float32)
                attended = torch.bmm(weights, values[heads, tile.keys])
                torch.div(work.by_group(attended), work.by_group(total[..., None]), out=outputs[heads, :, tile.queries])
                of_tile = sums[:, :, document][heads, :, tile.queries]
                torch.add(work.by_group(most), work.by_group(total.log2_()), alpha=1 / scale, out=of_tile)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.bounds, ctx.scale, ctx.left = bounds, scale, left
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        work, scale = _Work(query, key, ctx.bounds, ctx.left), ctx.scale
        plain = scale / math.log2(math.e)
        d_query, d_key, d_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        for document in work.documents:
            keys, values = work.widened(key[document]), work.widened(value[document])
            queries, outputs, d_outputs, d_queries = (
                work.grouped(tensor[document]) for tensor in (query, output, d_output, d_query)
            )
            d_keys, d_values = query.new_zeros(2, *keys[..., :-EXTRA].shape, dtype=torch.float32)
            for tile, heads in work.tiles(document):
                place = (heads, slice(None), tile.queries)
                rows = work.rows(queries[place], minus=sums[:, :, document][place])
                d_rows = work.rows(d_outputs[place], minus=(d_outputs[place].float() * outputs[place]).sum(-1))
                seen = keys[heads, tile.keys]
                weights = work.product(rows, seen.transpose(1, 2), 0, scale=scale)
                work.cut(weights.exp2_(), tile)
                d_scores = work.product(d_rows, values[heads, tile.keys].transpose(1, 2), 1)
                torch._softmax_backward_data(d_scores, weights, -1, d_scores.dtype, grad_input=d_scores)
                d_values[heads, tile.keys] += torch.bmm(weights.transpose(1, 2), d_rows[..., :-EXTRA])
                d_keys[heads, tile.keys] += torch.bmm(d_scores.transpose(1, 2), rows[..., :-EXTRA])
                of_tile = work.by_group(torch.bmm(d_scores, seen[..., :-EXTRA]))
                torch.mul(of_tile, plain, out=d_queries[place])
            torch.mul(d_keys.transpose(0, 1), plain, out=d_key[document])
            d_value[document].copy_(d_values.transpose(0, 1))
        return d_query, d_key, d_value, None, None, None


class _Work:
    """Tiles of documents, and memory for the scores of one tile at a time."""

    def __init__(self, query: Tensor, key: Tensor, bounds: tuple[int, ...], left: int | None) -> None:
        self.keys, self.groups = key.shape[1], query.shape[1] // key.shape[1]
        self.documents = [slice(start, end) for start, end in itertools.pairwise(bounds) if end > start]
        self.left = left
        lengths = [document.stop - document.start for document in self.documents]
        self.size = scores_at_once(max(lengths, default=1), self.groups, self.keys)
        self._new = query.new_empty
        self._scores: dict[int, Tensor] = {}
        most = max((tile_length(length, self.groups) for length in set(lengths)), default=1)
        self._hidden = torch.full((most, most), -torch.inf, dtype=query.dtype)
        self._later = self._hidden.triu(1)

    def tiles(self, document: slice) -> Iterator[tuple[Tile, slice]]:
        """Yield tiles, each with as many key heads as fit."""
        length = document.stop - document.start
        for start, end, first_key in tiles(length, tile_length(length, self.groups), self.left):
            tile = Tile(slice(start, end), slice(first_key, end))
            at_once = max(1, self.size // (self.groups * tile.num_queries * tile.num_keys))
            for head in range(0, self.keys, at_once):
                yield tile, slice(head, min(self.keys, head + at_once))

    def grouped(self, tensor: Tensor) -> Tensor:
        """View (L, H, E) as (K, G, L, E)."""
        return tensor.unflatten(1, (self.keys, self.groups)).permute(1, 2, 0, 3)

    def by_group(self, tensor: Tensor) -> Tensor:
        """View (K, M, ...) as (K, G, n, ...)."""
        return tensor.unflatten(1, (self.groups, -1))

    def widened(self, tensor: Tensor) -> Tensor:
        """Append ones to (L, K, E): (K, L, W)."""
        length, keys, size = tensor.shape
        wide = self._new(keys, length, size + EXTRA)
        wide[..., :size].copy_(tensor.transpose(0, 1))
        wide[..., size:].fill_(1)
        return wide

    def rows(self, tensor: Tensor, *, minus: Tensor | None = None) -> Tensor:
        """Arrange (K, G, n, E) as (K, M, W). The product with widened columns then subtracts `minus` (K, G, n) fp32."""
        heads, groups, length, size = tensor.shape
        rows = self._new(heads, groups, length, size + EXTRA)
        rows[..., :size].copy_(tensor)
        if minus is None:
            rows[..., size:].zero_()
        else:
            rows[..., size].copy_(minus).neg_()
            torch.add(minus, rows[..., size], out=rows[..., size + 1])
            rows[..., size + 1].neg_()
        return rows.flatten(1, 2)

    def product(self, rows: Tensor, columns: Tensor, which: int, *, scale: float = 1.0) -> Tensor:
        """Multiply rows (K, M, W) by columns (K, W, N) into buffer number `which`: (K, M, N)."""
        if which not in self._scores:
            self._scores[which] = self._new(self.size)
        shape = (*rows.shape[:2], columns.shape[2])
        out = self._scores[which][: math.prod(shape)].view(shape)
        if scale == 1.0:
            return torch.bmm(rows, columns, out=out)
        return torch.baddbmm(out, rows, columns, beta=0, alpha=scale, out=out)

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Set scores (K, M, N) of invisible keys to -inf.

        A NaN score stays NaN, which takes half the time of overwriting. Its value is NaN too in a run, and so is 0
        times it.
        """
        n, by_group = tile.num_queries, self.by_group(scores)
        by_group[..., -n:].add_(self._later[:n, :n])
        if (before := self._before_window(tile)) is not None:
            width = min(n, tile.num_keys)
            by_group[..., :width].add_(self._hidden[:n, :width].tril(before))

    def cut(self, weights: Tensor, tile: Tile) -> Tensor:
        """Zero the weights (K, M, N) of invisible keys."""
        matrices = weights.view(-1, tile.num_queries, tile.num_keys)
        matrices.tril_(tile.num_keys - tile.num_queries)
        if (before := self._before_window(tile)) is not None:
            matrices.triu_(before + 1)
        return weights

    def _before_window(self, tile: Tile) -> int | None:
        """Return the last diagonal whose keys are before the window of its queries; None if there is none."""
        if self.left is None:
            return None
        diagonal = tile.queries.start - self.left - tile.keys.start - 1
        return diagonal if diagonal > -tile.num_queries else None


def _largest(scores: Tensor) -> Tensor:
    """Return the maximum of bf16 along the last dimension, like amax in a fifth of its time.

    Read as integers, positive numbers keep their order and negative ones reverse it.
    """
    bits = scores.view(torch.int16)
    highest = bits.amax(-1)
    return torch.where(highest >= 0, highest, bits.amin(-1)).view(scores.dtype)
