"""Decode one token of each row through decoder layers of Llama's form, on CPUs with AVX2 or newer, by decode.cpp.

Weights and adapters are kept as panels (`Kept`): bf16, in the order in which products read them. Every operation is
that of a compiled run in bf16, so products, norms and rotary embeddings have the bits of its forward.

Letters: M rows, N out features, K in features, R columns of the adapters of one input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels import native, processor
from distlora_kernels.elementwise import call
from distlora_kernels.lora_native import COLUMNS
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.products import Factor, Term, weighted_sum

HEAD_COLUMNS = 16
"""Head sizes must be a multiple of this."""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def _structure(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Linear = _structure("_Linear", panels=_POINTER, up=_POINTER, bias=_POINTER, N=_SIZE, first=_SIZE, rank=_SIZE)
_Input = _structure(
    "_Input",
    **dict.fromkeys(("down", "scales", "slots"), _POINTER),
    **dict.fromkeys(("K", "R", "count"), _SIZE),
    linears=_Linear * 3,
)
_Norm = _structure("_Norm", weight=_POINTER, eps=ctypes.c_float)
_Layer = _structure(
    "_Layer",
    **dict.fromkeys(("before_attention", "before_mlp", "query", "key"), _Norm),
    **dict.fromkeys(("attention", "attended", "mlp", "product"), _Input),
    keys=_POINTER,
    values=_POINTER,
    scale=ctypes.c_float,
    window=ctypes.c_int64,
)
_Shape = _structure(
    "_Shape",
    **dict.fromkeys(("M", "D", "H", "K", "E", "inner", "turned", "blocks", "block"), _SIZE),
    gelu=ctypes.c_int,
)
_Places = _structure(
    "_Places", **dict.fromkeys(("cosines", "sines", "written", "tables", "lengths", "slots"), _POINTER)
)


def available() -> bool:
    """Return whether this processor has the path. Compiles the library if nothing has."""
    return processor.path() != "amx" and bool(native.library().decodes())


class AdapterPair(NamedTuple):
    """An adapter of a linear: a (r, K), b (N, r), both of any float dtype, and its scale."""

    slot: int
    a: Tensor
    b: Tensor
    scale: float


class DecodedLinear(NamedTuple):
    """A linear of one input, with the adapters that rows choose from."""

    weight: FrozenWeight
    bias: Tensor | None
    adapters: Sequence[AdapterPair]

    @property
    def is_covered(self) -> bool:
        """True if `decode` computes it."""
        sizes_fit = all(size % COLUMNS == 0 for size in self.weight.shape)
        in_form = self.weight.is_nf4 or self.weight.parts[0].dtype == torch.bfloat16
        return sizes_fit and in_form and all(pair.a.shape[0] % 2 == 0 for pair in self.adapters)


class Norm(NamedTuple):
    """An RMSNorm of Llama's form."""

    weight: Tensor
    eps: float


def pack(weight: FrozenWeight) -> Tensor:
    """Return the panels of a weight (N, K) that is covered."""
    rows, features = weight.shape
    panels = torch.empty(rows * -(-features // 2), dtype=torch.int32)
    left = torch.empty(1, features, dtype=torch.bfloat16)  # Its contents are not read.
    call("pack", left.dtype, ctypes.byref(Factor(left, weight).term()), rows, panels)
    return panels


def product(x: Tensor, panels: Tensor) -> Tensor:
    """Return x W^T (M, N) bf16 for x (M, K) bf16 and the panels of W."""
    x = x.contiguous()
    rows, features = x.shape
    term = Term(x.data_ptr(), features, features)
    term.panels = panels.data_ptr()
    return weighted_sum([term], x.new_empty(rows, panels.numel() // -(-features // 2)))


class DecodedLayer(NamedTuple):
    """A decoder layer."""

    norms: tuple[Norm, Norm, Norm | None, Norm | None]
    """Before attention and MLP; of the heads of queries and keys."""
    inputs: tuple[Sequence[DecodedLinear], ...]
    """Linears of each input: query, key and value; output; gate and up; down."""
    cache: tuple[Tensor, Tensor]
    """Keys and values (places, heads, head size), contiguous."""
    scale: float
    window: int | None


class Sizes(NamedTuple):
    """Sizes of all layers."""

    heads: int
    key_heads: int
    head_size: int
    block: int
    """Tokens per block of the cache."""
    gelu: bool


class Kept:
    """Layers whose weights are kept as panels, in about 2 bytes per weight, as long as this object lives."""

    def __init__(self, layers: Sequence[DecodedLayer], sizes: Sizes, *, by_rows: bool) -> None:
        """Pack the weights. `by_rows`: rows choose their adapters; otherwise each linear has one at most."""
        self._sizes, self._by_rows = sizes, by_rows
        self._alive: list[Any] = []
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._inner = layers[0].inputs[3][0].weight.shape[1]

    def _layer(self, layer: DecodedLayer) -> Any:
        norms = [
            _Norm(None, 0.0) if norm is None else _Norm(self._pointer(norm.weight), norm.eps) for norm in layer.norms
        ]
        self._alive.append(layer.cache)
        pointers = [tensor.data_ptr() for tensor in layer.cache]
        return _Layer(*norms, *map(self._input, layer.inputs), *pointers, layer.scale, layer.window or 0)

    def _input(self, linears: Sequence[DecodedLinear]) -> Any:
        pairs = [pair for linear in linears for pair in linear.adapters]
        ranks = [pair.a.shape[0] for pair in pairs]
        columns = -(-sum(ranks) // COLUMNS) * COLUMNS
        down = scales = slots = None
        if pairs:
            room = columns - sum(ranks)
            down = self._panels(F.pad(torch.cat([pair.a.detach().bfloat16() for pair in pairs]), (0, 0, 0, room)))
            spread = [(pair.scale, pair.slot) for pair, rank in zip(pairs, ranks, strict=True) for _ in range(rank)]
            entries = [*spread, *[(0.0, -1)] * room]
            scales = self._pointer(torch.tensor([scale for scale, _ in entries], dtype=torch.float32))
            slots = self._pointer(torch.tensor([slot for _, slot in entries])) if self._by_rows else None
        described, first = (_Linear * 3)(), 0
        for number, (weight, bias, adapters) in enumerate(linears):
            rank = sum(pair.a.shape[0] for pair in adapters)
            up = self._panels(torch.cat([pair.b.detach().bfloat16() for pair in adapters], dim=1)) if adapters else None
            values = (self._panels(weight), up, None if bias is None else self._pointer(bias))
            described[number] = _Linear(*values, weight.shape[0], first, rank)
            first += rank
        return _Input(down, scales, slots, linears[0].weight.shape[1], columns, len(linears), described)

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def _panels(self, weight: FrozenWeight | Tensor) -> int:
        if isinstance(weight, Tensor):
            weight = FrozenWeight((weight.contiguous(),), tuple(weight.shape))
        panels = pack(weight)
        self._alive.append(panels)
        return panels.data_ptr()

    def decode(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        written: Tensor,
        tables: Tensor,
        lengths: Tensor,
        slots: Tensor | None,
    ) -> Tensor:
        """Return the hidden states (M, D) bf16 after all layers; the new keys and values go to the cache.

        Args:
            hidden: (M, D) bf16, embedded tokens.
            rotary: Cosines and sines, (M, rotated columns) bf16.
            written: (M,) int64, places of the new tokens.
            tables: (M, blocks) int64, blocks of each row.
            lengths: (M,) int64, tokens that each row sees, the new one included.
            slots: (M,) int64, slot of each row's adapter; None if rows do not choose.

        Raises:
            MemoryError: There is no memory for the products.
        """
        assert hidden.dtype == torch.bfloat16, f"hidden states in {hidden.dtype}"
        assert (slots is not None) == self._by_rows, "rows choose adapters, or none does"
        sizes, hidden = self._sizes, hidden.clone(memory_format=torch.contiguous_format)
        tensors = [tensor.contiguous() for tensor in (*rotary, written, tables, lengths)]
        numbers = (*hidden.shape, *sizes[:3], self._inner, rotary[0].shape[1], tables.shape[1], sizes.block, sizes.gelu)
        places = _Places(*(tensor.data_ptr() for tensor in tensors), None if slots is None else slots.data_ptr())
        shape = _Shape(*numbers)
        if not call(
            "decode", hidden.dtype, self._layers, len(self._layers), ctypes.byref(shape), ctypes.byref(places), hidden
        ):
            raise MemoryError(f"no memory for products of {len(hidden):,} rows")
        return hidden
