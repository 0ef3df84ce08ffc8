"""Read the weights of a base one at a time: as stored, or as a run trains on them.

A run trains on the dequantized NF4 values, less PiSSA's initial adapter: bit-identical to `FrozenTensor.frozen_weight`
dequantized in fp32. Weights are read in whole rows, so memory holds a few rows and one tensor's absmax per 64 weights.
A weight of E experts is read as (E x rows, columns), as it is stored (gpt-oss: transposed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import Segment
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import ModelSpec, UserError
from distlora.loading.decomposed_adapters import load_initial_factors
from distlora.loading.load_base import find_base
from distlora.loading.quantize import DoubleQuantizedAbsmax
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM, build_model
from distlora.model.frozen_linear import FrozenTensor
from distlora.weights.conversion import Source
from distlora.weights.decompose import LowRankFactors, Residual
from distlora.weights.prequantized import PrequantizedWeight, prequantized_parameters, read_prequantized_weights
from distlora.weights.reader import Reader, all_finite
from distlora_kernels import nf4, reference

HEAD_NAME = f"{HEAD}.weight"
CHUNK = 64 * nf4.GROUP
"""Weights per read: whole groups, 4 MiB in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseWeight:
    """One parameter of the base in its checkpoint."""

    name: str
    """Hugging Face name: model.layers.0.mlp.up_proj.weight."""
    shape: tuple[int, ...]
    source: Source
    """The tensors it is made of, in flat order; for a prequantized weight, its codes."""
    quantized: bool
    """True if training stores it in NF4."""
    packed: PrequantizedWeight | None = None
    """Its parts if the checkpoint stores it in NF4."""
    residual: Residual | None = None
    """The initial adapter that PiSSA subtracted before quantization."""
    held: torch.dtype = torch.float32
    """The dtype that training rounds an unquantized weight to (train.dtype)."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def chunks(self, reader: Reader, *, original: bool = False) -> Iterator[Tensor]:
        """Yield the weight in flat order in fp32 pieces of CHUNK weights (the last is smaller).

        With `original` as it is stored, else as a run trains on it. Raises UserError for NaN and Inf.
        """
        if self.packed is not None:
            yield from self._unpacked(reader)
        elif original:
            for _, chunk in reader.chunks(self.source.segments, 0, self.numel, CHUNK):
                yield self._finite(chunk.float())
        elif not self.quantized:
            for chunk in self._before_quantization(reader):
                yield chunk.to(self.held).float()
        else:
            yield from self._through_nf4(reader)

    def rows(self, reader: Reader, *, original: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (n, columns) fp32), the weight in whole rows in order. A vector is one row."""
        columns = self.shape[-1]
        kept, first = torch.empty(0), 0
        for chunk in self.chunks(reader, original=original):
            kept = torch.cat([kept, chunk]) if len(kept) else chunk
            whole = len(kept) // columns
            if whole:
                yield first, kept[: whole * columns].view(whole, columns)
                kept, first = kept[whole * columns :], first + whole

    def whole(self, reader: Reader, *, original: bool = False) -> Tensor:
        """Return the whole weight in its shape in fp32."""
        weight, first = torch.empty(self.numel), 0
        for chunk in self.chunks(reader, original=original):
            weight[first : first + len(chunk)] = chunk
            first += len(chunk)
        return weight.view(self.shape)

    def _before_quantization(self, reader: Reader) -> Iterator[Tensor]:
        for first, chunk in reader.chunks(self.source.segments, 0, self.numel, CHUNK):
            chunk = chunk if self.residual is None else self.residual.of(chunk, first)
            yield self._finite(chunk)

    def second_level(self, reader: Reader) -> DoubleQuantizedAbsmax:
        """Return the double-quantized absmax of a weight that training quantizes."""
        return DoubleQuantizedAbsmax.of(self._before_quantization(reader), self.numel)

    def codes(self, reader: Reader) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of weights, codes (groups, GROUP_BYTES) uint8), in the pieces of `chunks`."""
        for chunk in self._before_quantization(reader):
            yield len(chunk), nf4.quantize_blocks(chunk)[0]

    def _through_nf4(self, reader: Reader) -> Iterator[Tensor]:
        second, group = self.second_level(reader), 0
        for size, codes in self.codes(reader):
            parts = second.groups(group, len(codes))
            yield nf4.nf4_dequantize(codes, *parts, shape=(size,), dtype=torch.float32)
            group += len(codes)

    def _unpacked(self, reader: Reader) -> Iterator[Tensor]:
        packed = self.packed
        assert packed is not None
        blocks = -(-self.numel // nf4.BLOCK)
        nested = packed.nested_absmax
        group_scale = None if nested is None else reader.read([nested], 0, nested.numel)
        for first in range(0, self.numel, CHUNK):
            size = min(CHUNK, self.numel - first)
            groups, group = nf4.num_groups(size), first // nf4.GROUP
            codes = torch.full((groups * nf4.GROUP_BYTES,), reference.ZERO_CODE * 17, dtype=torch.uint8)
            codes[: -(-size // 2)] = reader.read([packed.codes], first // 2, first // 2 + -(-size // 2))
            codes = codes.view(groups, nf4.GROUP_BYTES)
            start = first // nf4.BLOCK
            stored = reader.read([packed.absmax], start, min(start + groups * nf4.BLOCKS_PER_GROUP, blocks))
            absmax = torch.full((groups * nf4.BLOCKS_PER_GROUP,), reference.ZERO_SCALE if packed.nested else 0)
            absmax = absmax.to(stored.dtype)
            absmax[: len(stored)] = stored
            absmax = absmax.view(groups, nf4.BLOCKS_PER_GROUP)
            if not packed.nested:
                yield self._finite(nf4.dequantize_blocks(codes, absmax, shape=(size,), dtype=torch.float32))
                continue
            assert group_scale is not None
            parts = (absmax, group_scale[group : group + groups], torch.tensor(packed.offset, dtype=torch.float32))
            yield self._finite(nf4.nf4_dequantize(codes, *parts, shape=(size,), dtype=torch.float32))

    def _finite(self, chunk: Tensor) -> Tensor:
        if not all_finite(chunk):
            raise UserError(f"{self.name} holds NaN or Inf weights; the checkpoint is damaged, download it again")
        return chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """All parameters of a base and the rest of its checkpoint."""

    model: CausalLM
    """The model on the meta device: family, names, config."""
    weights: Mapping[str, BaseWeight]
    """Weights by Hugging Face name, in the model's order. A tied head is the embedding alone."""
    files: CheckpointFiles
    """The folder, config.json and headers of the checkpoint."""

    @property
    def headers(self) -> Mapping[str, Segment]:
        """Return every tensor of the checkpoint by name, those outside the model included."""
        return self.files.headers

    @property
    def embedding_name(self) -> str:
        """Return the embedding's name in the checkpoint."""
        return f"{self.model.family.decoder}.{EMBEDDING}.weight"


def open_base(spec: ModelSpec, initial_adapter_dir: str | Path = "") -> Base:
    """Open the base of a model from its headers.

    Raises UserError if the checkpoint belongs to another model, or if PiSSA's initial adapter is gone.
    """
    files = CheckpointFiles(spec.path)
    model = build_model(spec, base=files, training=False)
    sources = find_base(model, files.headers)
    stored = read_prequantized_weights(files)
    packed = prequantized_parameters(stored, {name: source.names for name, source in sources.items()})
    frozen = {model.hf_name(f"{path}.weight"): m for path, m in model.named_modules() if isinstance(m, FrozenTensor)}
    residuals = _residuals(model, initial_adapter_dir) if spec.adapter.pissa else {}
    held = {model.hf_name(name): parameter.dtype for name, parameter in model.named_parameters()}
    weights = {}
    for name, source in sources.items():
        if name == HEAD_NAME and model.tied_in_base:
            continue
        module = frozen.get(name)
        weights[name] = BaseWeight(
            name=name,
            shape=packed[name].shape if name in packed else source.shape,
            source=source,
            quantized=module is not None and module.quantized,
            packed=packed.get(name),
            residual=residuals.get(name),
            held=held.get(name, torch.float32),
        )
    return Base(model=model, weights=weights, files=files)


def _residuals(model: CausalLM, initial_adapter_dir: str | Path) -> dict[str, Residual]:
    """Return PiSSA's initial adapter by the name of the weight it was subtracted from."""
    start = load_initial_factors(initial_adapter_dir)
    found = {}
    for path, linear in model.adapted_linears():
        assert isinstance(linear, AdaptedLinear)
        a, b = (start[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        found[f"{path}.weight"] = Residual(LowRankFactors(a, b), linear.pairs[0].scaling)
    return found


def tensors_of(weight: BaseWeight) -> Sequence[tuple[str, Segment]]:
    """Return the stored tensors that a weight is made of, in flat order."""
    return list(zip(weight.source.names, weight.source.segments, strict=True))
