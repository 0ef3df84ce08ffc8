"""The embedding and the LM head in the checkpoint's low-bit format: rows are looked up, products are made in parts.

If the two are tied, the head reads the embedding's matrix. Neither is ever dense as a whole: the embedding decodes the
rows of its tokens, and a product with the head decodes a part of its rows at a time (`rows_at_once`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import rows_at_once
from distlora.model.frozen_linear import FrozenTensor
from distlora_kernels.products import product as multiplied
from distlora_kernels.reference import GROUP

if TYPE_CHECKING:
    from distlora.model.lm_head import LossHead


class TokenMatrix(FrozenTensor):
    """A frozen matrix (vocabulary, H) in a flat format, whose rows are `dtype` once they are decoded."""

    is_parameter = False

    def __init__(self, shape: tuple[int, ...], *, format: str, dtype: torch.dtype) -> None:
        super().__init__(shape, format=format, dtype=dtype)
        self.dtype = dtype

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, their weights) of neighbouring rows, all in the same memory."""
        (vocabulary, hidden), stored, step = self.shape, self.stored, rows_at_once(*self.shape)
        assert stored.format is not None
        memory = stored.parts[0].new_empty(step * hidden, dtype=dtype)
        for first in range(0, vocabulary, step):
            shape = (min(step, vocabulary - first), hidden)
            start, size = first * hidden, math.prod(shape)
            parts = stored.format.groups_of(stored.parts, start // GROUP, -(-(start + size) // GROUP))
            decoded = stored.format.dequantize(parts, shape=shape, dtype=dtype, out=memory[:size])
            yield slice(first, first + shape[0]), decoded

    def multiply(self, inputs: Tensor, product: Tensor) -> None:
        """Write the product of inputs (N, H) with the transposed matrix, (N, vocabulary)."""
        for rows, weight in self.chunks(inputs.dtype):
            multiplied(inputs, weight.T, out=product[:, rows])

    def gradient(self, of_product: Tensor) -> Tensor:
        """Return the gradient of the inputs (N, H), summed in fp32, from that of their product (N, vocabulary)."""
        total = of_product.new_zeros(len(of_product), self.shape[1], dtype=torch.float32)
        for rows, weight in self.chunks(of_product.dtype):
            total += multiplied(of_product[:, rows], weight)
        return total


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
    """inputs (N, H) -> inputs W^T (N, vocabulary) with a `TokenMatrix` W, whose rows are decoded again in backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrix: TokenMatrix) -> Tensor:
        """Return the product."""
        ctx.matrix = matrix
        product = inputs.new_empty(len(inputs), matrix.shape[0])
        matrix.multiply(inputs, product)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the inputs."""
        return ctx.matrix.gradient(gradient).to(gradient.dtype), None


def keep_token_matrices(
    decoder: nn.Module,
    embedding: str,
    head: LossHead,
    formats: tuple[str | None, str | None],
    *,
    dtype: torch.dtype,
) -> None:
    """Hold the embedding at a path of the decoder, and the head's weight, in these formats, on meta; None: dense.

    A head that shares the embedding's weight reads the embedding's matrix.
    """
    weight = decoder.get_parameter(f"{embedding}.weight")
    tied, new = head.weight is weight, None
    if formats[0] is not None:
        new = TokenEmbedding(tuple(weight.shape), format=formats[0], dtype=dtype)
        decoder.set_submodule(embedding, new)
    if tied and new is not None:
        head.hold(new, shared=True)
    elif not tied and formats[1] is not None:
        head.hold(TokenMatrix(tuple(head.weight.shape), format=formats[1], dtype=dtype), shared=False)
