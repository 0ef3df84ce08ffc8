"""The embedding and the LM head in the checkpoint's low-bit format: rows are looked up, products are made in parts.

If the two are tied, the head reads the embedding's matrix. Neither is ever dense as a whole: the embedding decodes the
rows of its tokens, and a product with the head decodes about CHUNK weights at a time, again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.model.frozen_linear import FrozenTensor
from distlora_kernels.reference import GROUP

if TYPE_CHECKING:
    from distlora.model.lm_head import LossHead

CHUNK = 2**24
"""Weights that a product decodes at once, about: 32 MiB in bf16."""


class TokenMatrix(FrozenTensor):
    """A frozen matrix (vocabulary, H) in a flat format, whose rows are `dtype` once they are decoded."""

    is_parameter = False

    def __init__(self, shape: tuple[int, ...], *, format: str, dtype: torch.dtype) -> None:
        super().__init__(shape, format=format, dtype=dtype)
        self.dtype = dtype

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, their weights) of neighbouring rows, which are whole groups but for the last ones."""
        (vocabulary, hidden), stored = self.shape, self.stored
        assert stored.format is not None
        rows = math.lcm(hidden, GROUP) // hidden  # Rows of whole groups.
        step = max(CHUNK // (rows * hidden), 1) * rows
        for first in range(0, vocabulary, step):
            stop = min(first + step, vocabulary)
            parts = stored.format.groups_of(stored.parts, first * hidden // GROUP, -(-stop * hidden // GROUP))
            yield slice(first, stop), stored.format.dequantize(parts, shape=(stop - first, hidden), dtype=dtype)


class TokenEmbedding(TokenMatrix):
    """Look up the rows of token ids, as nn.Embedding does."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return an empty tensor: transformers reads its dtype and device."""
        return self.get_parameter(self.part_names[0]).new_empty(0, self.shape[1], dtype=self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., H) for (...) int64."""
        stored = self.stored
        assert stored.format is not None
        rows = stored.format.dequantize_rows(stored.parts, stored.shape, ids.flatten(), self.dtype)
        return rows.view(*ids.shape, -1)


class TokenProduct(torch.autograd.Function):
    """inputs (N, H) -> inputs W^T (N, vocabulary) with a `TokenMatrix` W. The inputs' gradient is summed in fp32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrix: TokenMatrix) -> Tensor:
        """Return the product."""
        ctx.matrix = matrix
        product = inputs.new_empty(len(inputs), matrix.shape[0])
        for rows, weight in matrix.chunks(inputs.dtype):
            torch.mm(inputs, weight.T, out=product[:, rows])
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the inputs."""
        total = gradient.new_zeros(len(gradient), ctx.matrix.shape[1], dtype=torch.float32)
        for rows, weight in ctx.matrix.chunks(gradient.dtype):
            total += gradient[:, rows] @ weight
        return total.to(gradient.dtype), None


def keep_token_matrices(decoder: Any, head: LossHead, formats: tuple[str, str], *, dtype: torch.dtype) -> None:
    """Hold the decoder's embedding and the weight of its `LossHead` in these formats, on meta; "" leaves one dense.

    A head that shares the embedding's weight reads the embedding's matrix. An embedding that does more than look up,
    such as Gemma's, stays dense, and so does a head that shares its weight.
    """
    embedding = decoder.get_input_embeddings()
    tied = head.weight is embedding.weight
    shape, looks_up = tuple(embedding.weight.shape), type(embedding) is nn.Embedding and embedding.max_norm is None
    new = TokenEmbedding(shape, format=formats[0], dtype=dtype) if looks_up and formats[0] else None
    if new is not None:
        decoder.set_input_embeddings(new)
    if tied and new is not None:
        head.hold(new, shared=True)
    elif not tied and formats[1]:
        head.hold(TokenMatrix(tuple(head.weight.shape), format=formats[1], dtype=dtype), shared=False)
