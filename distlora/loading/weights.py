"""The base's weights from a checkpoint folder into the shards of a parallelized model: each rank reads its own bytes
alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from distlora.adapters import adapter_parameters
from distlora.config import UserError
from distlora.loading.quantize import copy_into, quantize_into
from distlora.loading.reader import Reader
from distlora.loading.segments import SOURCE_DTYPES, Segment, read_headers
from distlora.model import CausalLM, hf_name
from distlora.parallel import Backend
from distlora.quant import FrozenLinear

_PACKED = ("codes", "scales", "group_scale")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading did on this rank."""

    seconds: float
    bytes_read: int
    quantized_weights: int
    """Weights of the whole model that are kept in NF4."""
    quantized_bytes: int
    """Bytes that they take, over all ranks, without FSDP2's padding."""

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized weights; None where there are none."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None


def load_base(model: CausalLM, folder: str | Path, backend: Backend) -> Loaded:
    """Fill every parameter of the base from `folder`. UserError for a missing, misshapen or non-finite tensor."""
    began = time.monotonic()
    headers = read_headers(Path(folder))
    adapters = set(adapter_parameters(model))
    quantized_weights = quantized_bytes = 0
    with Reader() as reader:
        for path, module in model.named_modules():
            if isinstance(module, FrozenLinear) and module.quantized:
                name = hf_name(f"{path}.weight")
                shape = (module.out_features, module.in_features)
                quantize_into(module, [_find(headers, name, shape)], reader, backend, name)
                quantized_weights += shape[0] * shape[1]
                quantized_bytes += sum(getattr(module, part).nbytes for part in _PACKED) + 4
            for own, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{own}" if path else own
                is_packed = isinstance(module, FrozenLinear) and own in _PACKED
                if is_packed or full in adapters or (full == "head.weight" and model.tied):
                    continue
                copy_into(
                    parameter, [_find(headers, hf_name(full), tuple(parameter.shape))], reader, backend, hf_name(full)
                )
        bytes_read = reader.bytes_read
    if quantized_weights:
        _check_packed(model)
    return Loaded(time.monotonic() - began, bytes_read, quantized_weights, quantized_bytes)


def _find(headers: dict[str, Segment], name: str, shape: tuple[int, ...]) -> Segment:
    """A tensor by its Hugging Face name; UserError when it is absent or not what config.json promises."""
    segment = headers.get(name)
    if segment is None:
        raise UserError(
            f"the checkpoint has no tensor {name}, which config.json asks for; is it another model's folder?"
        )
    if segment.shape != shape:
        raise UserError(
            f"{name} has shape {list(segment.shape)} on disk and {list(shape)} by config.json; "
            "they belong to different models"
        )
    if segment.dtype not in SOURCE_DTYPES:
        raise UserError(f"{name} is stored as {segment.dtype}; weights are read from {', '.join(SOURCE_DTYPES)}")
    return segment


def _check_packed(model: CausalLM) -> None:
    """Nothing in a block that has two or more dimensions stayed 16-bit unnoticed."""
    for block in model.blocks:
        for path, parameter in block.named_parameters():
            packed = path.rpartition(".")[2] in _PACKED or ".adapters." in path
            assert packed or parameter.dim() < 2, f"{path} stayed {parameter.dtype} under quant=nf4"
