"""The quantizable weights of a checkpoint on disk, and what each format costs them: tensor by tensor, never a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.analysis.naming import layer_of, linear_of
from distlora.analysis.quantization.roundtrip import CHUNK, Sums, measure
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import SOURCE_DTYPES
from distlora.config import ModelSpec, UserError
from distlora.loading.load_base import find_base
from distlora.model.build import CausalLM, build_model
from distlora.model.frozen_linear import FrozenTensor
from distlora.weights.conversion import Source
from distlora.weights.reader import Reader


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight that quant=nf4 quantizes, on disk."""

    name: str
    """As the Hugging Face model has it: model.layers.0.mlp.up_proj.weight."""
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape on disk."""
        return self.source.shape

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return sum(segment.numel for segment in self.source.segments)

    @property
    def layer(self) -> int:
        """Return the index of the decoder layer."""
        return layer_of(self.name)

    @property
    def linear(self) -> str:
        """Return the path in the decoder layer: mlp.up_proj; mlp.experts.up_proj stands for all experts."""
        return linear_of(self.name)

    def chunks(self, reader: Reader, device: torch.device) -> Iterator[Tensor]:
        """Yield the weight in flat order, in pieces of whole groups (but the last), in its dtype on disk."""
        for _, chunk in reader.chunks(self.source.segments, 0, self.numel, CHUNK):
            yield chunk.to(device)

    def measure(self, reader: Reader, device: torch.device) -> Sums:
        """Measure all formats on the weight. Raises UserError for NaN and Inf."""
        try:
            return measure(lambda: self.chunks(reader, device), self.numel)
        except ValueError as error:
            raise UserError(f"{self.name} holds {error}; the checkpoint is damaged, download it again") from error


def block_weights(model: CausalLM) -> Iterator[tuple[str, FrozenTensor]]:
    """(name, module) of every frozen weight of the decoder blocks, quantized in this model or not: linears, experts."""
    for path, module in model.named_modules():
        if isinstance(module, FrozenTensor):
            yield model.hf_name(f"{path}.weight"), module


def find_weights(spec: ModelSpec) -> tuple[list[Weight], int]:
    """Return (weights that quant=nf4 quantizes, parameters of the whole model) from headers alone.

    The weights are in the order of the forward. Raises UserError for a checkpoint that is not the model's, and for
    weights in another type than 32 or 16 bits.
    """
    files = CheckpointFiles(spec.path)
    model = build_model(spec, base=files)
    sources = find_base(model, files.headers)
    weights = []
    for name, module in block_weights(model):
        if not module.quantized:  # A router, which stays as it is.
            continue
        source = sources.get(name)
        if source is None or source.shape != module.shape:
            found = "no tensor" if source is None else f"shape {list(source.shape)}"
            raise UserError(
                f"the checkpoint has {found} for {name}, which config.json describes as {list(module.shape)}; they "
                "belong to different models: download the folder again"
            )
        if source.segments[0].dtype not in SOURCE_DTYPES:
            raise UserError(
                f"{name} is stored as {source.segments[0].dtype}, not as {', '.join(SOURCE_DTYPES)}; name such a copy"
            )
        weights.append(Weight(name, source))
    tied = {"lm_head.weight"} if model.tied else set()
    total = sum(segment.numel for name, s in sources.items() if name not in tied for segment in s.segments)
    return weights, total
