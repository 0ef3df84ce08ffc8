"""Weights that a checkpoint ships in low bits: found by name and shape in its headers. Needs no torch, reads no values.

A quantized weight is several tensors on disk: codes, scales, sometimes zero points or an order of the columns. They are
paired here by the rules of `quantization_config.quant_method`, and appear under the weight's ordinary name as one
`LowBitSegment`; scales of activations and of the KV cache are dropped. Which weights are quantized is told by the
tensors themselves, not by lists of modules in config.json. Values: distlora/weights/low_bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError
from distlora.config.errors import short

LOW_BIT = "LOWBIT"
"""Dtype of a `LowBitSegment`, in which a weight counts as one byte."""
NF4 = "nf4"
"""Method of checkpoints that bitsandbytes quantized to 4 bits (distlora/weights/prequantized.py)."""

_FLOATS = ("F32", "BF16", "F16")
_AGAIN = "the checkpoint is damaged, download it again"
_INSTEAD = "set {model.path} to the 16-bit checkpoint (quant=nf4 quantizes it while it is read)"
_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBitTensor:
    """One weight in low bits: where its parts lie and how they are decoded."""

    name: str
    """The weight's name without its format: model.layers.0.mlp.down_proj.weight."""
    shape: tuple[int, ...]
    """(O, I) or (E, O, I) in the model's layout; with `transposed` (E, I, O)."""
    codec: str
    """Name of its decoder in distlora.weights.low_bit.codecs."""
    parts: Mapping[str, Segment]
    """Tensors by role: codes, scales, zeros, global_scale, order."""
    block: tuple[int, int]
    """Rows and columns of the stored matrix that share a scale."""
    bits: int
    """Bits of a code."""
    transposed: bool = False
    """True if each matrix is stored as the transpose of what `shape` says."""
    format: str = ""
    """Name of the kernels' format that holds it as it is; empty if quant=keep cannot."""
    reason: str = ""
    """Why `format` is empty."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape with each matrix as it is stored: (O, I) or (E, O, I)."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def segment(self) -> LowBitSegment:
        """Return the whole weight as a segment."""
        numel = math.prod(self.shape)
        file = next(iter(self.parts.values())).file
        return LowBitSegment(file=file, offset=0, num_bytes=numel, dtype=LOW_BIT, shape=self.shape, tensor=self)


@dataclass(frozen=True, slots=True)
class LowBitSegment(Segment):
    """A weight in low bits, or a range of it: `offset` and `num_bytes` count weights, `file` holds the codes."""

    tensor: LowBitTensor


def quantization_of(config: Mapping[str, Any]) -> Any:
    """Return a config.json's quantization_config, which some composite models have in text_config; or None."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config", inner)


def quantization_method(config: Mapping[str, Any], place: Path | str) -> str | None:
    """Return how a checkpoint is quantized by its config.json: None, NF4, or a method that is read here.

    Raises UserError with the field's name for an unsupported method, and for unknown settings of one, which may change
    what the weights mean.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    where = f"{place}: quantization_config"
    if not isinstance(quantization, Mapping):
        raise UserError(f"{where} is not a JSON object; download the file again")
    four, eight = quantization.get("load_in_4bit"), quantization.get("load_in_8bit")
    # Early bitsandbytes checkpoints have no quant_method; transformers knows them by these flags.
    method = quantization.get("quant_method", "bitsandbytes" if four or eight else None)
    if method == "bitsandbytes" and not eight:
        kind = quantization.get("bnb_4bit_quant_type", "nf4")
        for is_wrong, what in (
            (not four, f"load_in_4bit={four!r}: only 4-bit and 8-bit weights are supported"),
            (kind != "nf4", f"bnb_4bit_quant_type={kind!r} is not supported, only 'nf4'"),
        ):
            if is_wrong:
                raise UserError(f"{where}.{what}; {_INSTEAD}")
        return NF4
    if method not in _METHODS:
        raise UserError(
            f"{where}.quant_method={short(method)} is not supported, only {', '.join(_METHODS)}; {_INSTEAD}"
        )
    _METHODS[method].check(quantization, where)
    return str(method)


def with_low_bit(stored: Mapping[str, Segment], folder: Path, config: Mapping[str, Any]) -> Mapping[str, Segment]:
    """Return a checkpoint's tensors with each quantized weight as one `LowBitSegment` under its ordinary name.

    Dense and NF4 checkpoints are returned as they are. Raises UserError with the tensor's name for parts that are
    missing, of another dtype or shape than the weight needs, and for parts that belong to no weight.
    """
    method = quantization_method(config, folder / "config.json")
    if method is None or method == NF4:
        return stored
    parts = _Parts(dict(stored))
    for tensor in _METHODS[method].find(parts, quantization_of(config)):
        parts.weights[tensor.name] = tensor.segment
    if not parts.weights:
        raise UserError(
            f"{folder / 'config.json'} has a quantization_config, but no weight in {folder} is quantized; "
            "remove quantization_config from config.json if the weights are dense (quant=nf4 then quantizes them)"
        )
    for name, segment in list(parts.left.items()):
        if name.endswith(_ACTIVATIONS):
            del parts.left[name]
        elif name.endswith(_PARTS) or name in parts.weights:
            raise UserError(f"{segment.file}: {name} belongs to no quantized weight; {_AGAIN}")
    return parts.left | parts.weights


_ACTIVATIONS = (
    *(".activation_scale", ".input_scale", ".input_global_scale", ".input_zero_point", ".input_scale_ub"),
    *(".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"),
)
_PARTS = (
    *("_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_packed", "_g_idx", "_blocks", "_scales"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_format", ".weight_shape"),
)


@dataclass(slots=True)
class _Parts:
    """The tensors of a checkpoint while parts of quantized weights are taken out."""

    left: dict[str, Segment]
    weights: dict[str, Segment] = field(default_factory=dict)

    def ending(self, suffix: str, *dtypes: str) -> Iterator[tuple[str, Segment]]:
        """Yield (name without `suffix`, segment) of each tensor that ends so, of one of the dtypes if given."""
        for name, segment in list(self.left.items()):
            if name.endswith(suffix) and (not dtypes or segment.dtype in dtypes):
                yield name[: len(name) - len(suffix)], segment

    def take(self, name: str, of: str, dtypes: Sequence[str], shape: Sequence[int] | None = None) -> Segment:
        """Remove and return a part of the weight `of`. Sizes of one do not count in its `shape`.

        Raises UserError if it is missing or has another dtype or shape.
        """
        segment = self.left.pop(name, None)
        if segment is None:
            raise UserError(f"no tensor {name} in the checkpoint, which {of} needs; download it again")
        if segment.dtype not in dtypes:
            raise UserError(f"{segment.file}: {name} is stored as {segment.dtype}, not {' or '.join(dtypes)}; {_AGAIN}")
        if shape is not None and _without_ones(segment.shape) != _without_ones(shape):
            raise UserError(
                f"{segment.file}: {name} has shape {short(list(segment.shape))}; {of} needs {short(list(shape))}; "
                f"{_AGAIN}"
            )
        return segment


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _matrix(name: str, segment: Segment, widths: int = 1) -> tuple[int, ...]:
    """Return the shape of a weight whose codes lie `widths` to an element. Raises UserError if it is not a matrix."""
    if len(segment.shape) not in (2, 3) or not segment.numel:
        raise UserError(
            f"{segment.file}: {name} has shape {short(list(segment.shape))}, which is not that of a quantized weight; "
            f"{_AGAIN}"
        )
    return (*segment.shape[:-1], segment.shape[-1] * widths)


def _grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight, one per block."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _as_tiles(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[str, str]:
    """Return (format, reason) of FP8 codes with a scale per block, held as tiles of 128 x 128."""
    fits = all(each % _TILE == 0 or each >= size for each, size in zip(block, shape[-2:], strict=True))
    if fits and (len(shape) == 2 or shape[-2] % _TILE == 0):
        return "fp8_block", ""
    return "", f"FP8 with a scale per {block[0]} x {block[1]} weights of {list(shape)} is not in tiles of 128 x 128"


def _check_fields(values: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    """Raise UserError for a setting that is not `known`: it may change what the weights mean."""
    unknown = sorted(values.keys() - set(known))
    if unknown:
        value = short(values[unknown[0]])
        raise UserError(f"{where}.{unknown[0]}={value} is unknown and may change what the weights mean; {_INSTEAD}")


def _check_fp8(settings: Mapping[str, Any], where: str) -> None:
    _check_fields(
        settings,
        where,
        [
            *("quant_method", "activation_scheme", "weight_block_size", "dequantize", "modules_to_not_convert"),
            *("modules_to_convert", "fmt", "scale_fmt", "expert_dtype", "ignored_layers"),
        ],
    )
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(f"{where}.weight_block_size={block!r} is not a pair of sizes; download the file again")
    if settings.get("fmt", "e4m3") != "e4m3":
        raise UserError(f"{where}.fmt={settings['fmt']!r} is not supported, only 'e4m3'; {_INSTEAD}")


def _find_fp8(parts: _Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield weights of transformers' FP8: X, and its scales in X_scale_inv, which multiply."""
    for name, codes in parts.ending("", "F8_E4M3"):
        shape = _matrix(name, codes)
        size = settings.get("weight_block_size")
        block = (shape[-2], shape[-1]) if size is None else (size[0], size[1])
        dtypes = (*_FLOATS, "F8_E8M0", "U8")
        scales = parts.take(f"{name}_scale_inv", name, dtypes, _grid(shape, block))
        format, reason = _as_tiles(shape, block)
        found = {"codes": parts.left.pop(name), "scales": scales}
        yield LowBitTensor(
            name=name, shape=shape, codec="scaled", parts=found, block=block, bits=8, format=format, reason=reason
        )


@dataclass(frozen=True, slots=True)
class _Method:
    """The rules of one quant_method."""

    check: Callable[[Mapping[str, Any], str], None]
    """Raises UserError for settings that are not supported; gets them and their place."""
    find: Callable[[_Parts, Mapping[str, Any]], Iterator[LowBitTensor]]
    """Takes the parts of quantized weights and yields these."""


_METHODS = {"fp8": _Method(_check_fp8, _find_fp8)}
