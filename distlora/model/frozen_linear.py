"""Frozen weights (in a low-bit format or dense): linears, groups of linears that share an input, embedding and head.

Weights are Parameters with requires_grad=False, so FSDP2 and ZeRO-3 shard and gather them like any other, as quantized
bytes. Everything starts on the meta device and is filled by `distlora.loading`.

An embedding and an LM head in a low-bit format are never dense as a whole: the embedding decodes the rows of its
tokens, and a product with the head decodes a part of its rows at a time (`rows_at_once`). If the two are tied, the head
reads the embedding's matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import rows_at_once
from distlora_kernels.formats import FORMATS
from distlora_kernels.formats.base import dtype_of
from distlora_kernels.lora_linear import FrozenWeight, Linear, lora_linears
from distlora_kernels.products import product as multiplied
from distlora_kernels.reference import GROUP

if TYPE_CHECKING:
    from distlora.model.lm_head import LossHead


SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling linears that a decoder layer calls with the same tensor."""


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class FrozenTensor(nn.Module):
    """Frozen weight of any shape: in a format (`distlora_kernels.formats`), or dense.

    `format`: name of the format. Its parts become Parameters (G, ...), its replicated parts buffers. None: `weight`
    (shape) in `dtype`.
    """

    is_parameter = True
    """True if transformers has a Parameter in its place, False for a module with a weight."""

    def __init__(self, shape: tuple[int, ...], *, format: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.format = shape, None if format is None else FORMATS[format]
        self.dense_copy: Tensor | None = None
        """The dequantized weight in the run's dtype, for the whole run (quant.dense_layers)."""
        if self.format is None:
            self.weight = _frozen(shape, dtype)
            return
        for part in self.format.parts:
            self.register_parameter(part.name, _frozen((self.num_groups, *part.shape), dtype_of(part)))
        for part in self.format.replicated:
            self.register_buffer(part.name, torch.empty(part.shape, dtype=dtype_of(part), device="meta"))

    @property
    def quantized(self) -> bool:
        """True if the weight is in a format."""
        return self.format is not None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the Parameters that share the groups; empty for a dense weight."""
        return () if self.format is None else tuple(part.name for part in self.format.parts)

    @property
    def num_groups(self) -> int:
        """Number of groups of a quantized weight, over all ranks."""
        assert self.format is not None, "a dense weight has no groups"
        return self.format.num_groups(self.shape)

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of a quantized weight over all ranks, with replicated parts, without FSDP2's padding."""
        assert self.format is not None, "a dense weight has no groups"
        return self.format.num_bytes(self.shape)

    @property
    def frozen_weight(self) -> FrozenWeight:
        """The weight in the kernels' form: `stored`, or the dense copy."""
        copy = self.dense_copy
        return self.stored if copy is None else FrozenWeight((copy,), tuple(copy.shape))

    @property
    def stored(self) -> FrozenWeight:
        """The Parameters themselves with their present storage."""
        if self.format is None:
            return FrozenWeight((self.weight,), self.shape)
        parts = tuple(getattr(self, part.name) for part in (*self.format.parts, *self.format.replicated))
        return FrozenWeight(parts, self.shape, self.format)


class FrozenLinear(FrozenTensor):
    """y = x W^T + bias with frozen W (out_features, in_features). `bias` (out_features,) in `dtype`, or None."""

    is_parameter = False

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, format: str | None, dtype: torch.dtype
    ) -> None:
        super().__init__((out_features, in_features), format=format, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.shared_input: SharedInput | None = None
        self.unread: Callable[[], bool] | None = None
        """Returns True while only the graph of its output is needed (`LayerKind.unread`); None: never."""
        self.bias = _frozen((out_features,), dtype) if bias else None

    def operand(self) -> Linear:
        """Return this linear as an operand of `lora_linears`."""
        return Linear(self.frozen_weight, bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T with the adapter of each row added, (..., O)."""
        if self.shared_input is not None:
            return self.shared_input.output(self, x)
        return lora_linears(x, (self.operand(),), unread=self.unread is not None and self.unread())[0]


def fused_paths(model: nn.Module) -> set[str]:
    """Return the paths of frozen weights that are Parameters in transformers, not modules with a weight."""
    frozen = {path: module for path, module in model.named_modules() if isinstance(module, FrozenTensor)}
    return {path for path, module in frozen.items() if module.is_parameter}


class SharedInput:
    """Linears that are called with the same tensor: the first call computes the outputs of all.

    So the input is read, and its gradient written, once for all of them. Members recognize the input by identity, so no
    family's code is patched; for another tensor a member computes all of them again. The members of one call leave
    nothing behind.
    """

    def __init__(self, members: tuple[FrozenLinear, ...]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._version = -1
        self._outputs: dict[FrozenLinear, Tensor] = {}

    def output(self, member: FrozenLinear, x: Tensor) -> Tensor:
        """Return `member`'s output for x."""
        if x is not self._input or x._version != self._version or member not in self._outputs:
            outputs = lora_linears(x, [other.operand() for other in self.members])
            self._input, self._version = x, x._version
            self._outputs = dict(zip(self.members, outputs, strict=True))
        output = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return output


def link_shared_inputs(linears: Mapping[str, FrozenLinear]) -> None:
    """Group the siblings that share an input. `linears` are one layer's, by their paths in it."""
    parents = {path.rpartition(".")[0] for path in linears}
    for parent, names in itertools.product(sorted(parents), SHARED_INPUTS):
        paths = [f"{parent}.{name}" if parent else name for name in names]
        members = tuple(linears[path] for path in paths if path in linears)
        if len(members) > 1 and len({member.in_features for member in members}) == 1:
            shared = SharedInput(members)
            for member in members:
                member.shared_input = shared


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
