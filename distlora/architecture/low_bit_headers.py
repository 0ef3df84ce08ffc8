"""Describe the quantized weights of a checkpoint, and take their parts from its headers. Needs no torch.

A quantized weight is several tensors on disk: codes, scales, sometimes zero points or an order of the columns. They are
paired here by the rules of `quantization_config.quant_method`, and appear under the weight's ordinary name as one
`LowBitSegment`; scales of activations and of the KV cache are dropped. Which weights are quantized is determined by
the tensors themselves, not by lists of modules in config.json. Values: distlora/weights/low_bit. The last part has
bitsandbytes' rules, by which NF4 is also written; those of other methods are in low_bit_methods.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError, require
from distlora.config.errors import short
from distlora.config.json_files import parse_object
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, is_nf4

LOW_BIT = "LOWBIT"
"""Dtype of a `LowBitSegment`, in which a weight counts as one byte."""

READER_VERSION = 1
"""Part of the identity of weights in low bits. Increase it after any change of the values that they are read as."""
DOWNLOAD_AGAIN = "the checkpoint is damaged, download it again"
USE_16_BIT = "set {model.path} to the 16-bit checkpoint (quant=nf4 quantizes it while it is read)"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBitTensor:
    """One weight in low bits: where its parts lie and how they are decoded."""

    name: str
    """The weight's name without its format: model.layers.0.mlp.down_proj.weight."""
    shape: tuple[int, ...]
    """(O, I) or (E, O, I) in the model's layout; with `transposed` (E, I, O)."""
    codec: str
    """Name of its decoder in distlora.weights.low_bit.CODECS."""
    parts: Mapping[str, Segment]
    """Tensors by role: codes, scales, zeros, global_scale, order."""
    block: tuple[int, int]
    """Rows and columns of the stored matrix that share a scale."""
    bits: int
    """Bits of a code."""
    transposed: bool = False
    """True if each matrix is stored as the transpose of what `shape` says."""
    format: str | None = None
    """Name of the kernels' format that holds it as it is; None if quant=keep cannot."""
    reason: str = ""
    """Why `format` is None."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape with each matrix as it is stored: (O, I) or (E, O, I)."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def meaning(self) -> str:
        """Return all but the stored bytes that decides the values: the shape, the codec and its settings."""
        left_out = ("parts", "format", "reason")
        settings = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name not in left_out]
        return ", ".join([*settings, f"parts={sorted(self.parts)}"])

    @property
    def segment(self) -> LowBitSegment:
        """Return the whole weight as a segment."""
        numel = math.prod(self.shape)
        file = next(iter(self.parts.values())).file
        return LowBitSegment(file=file, offset=0, num_bytes=numel, dtype=LOW_BIT, shape=self.shape, tensor=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Tensor(LowBitTensor):
    """A weight that bitsandbytes stored in NF4; `parts` are named as those of its format, with quant_map beside."""

    offset: float | None
    """Mean of all absmax; None without double quantization."""


@dataclass(frozen=True, slots=True)
class LowBitSegment(Segment):
    """A weight in low bits, or a range of it: `offset` and `num_bytes` count weights, `file` holds the codes."""

    tensor: LowBitTensor


def in_nf4(segment: Segment) -> bool:
    """Return True for a weight that is stored in NF4."""
    return isinstance(segment, LowBitSegment) and is_nf4(segment.tensor.format)


def meaning_of(headers: Mapping[str, Segment]) -> bytes:
    """Return the SHA-256 of how the weights in low bits among `headers` are decoded; empty if there are none.

    The same bytes have other values by other settings, so whatever names the values must have this too. NF4
    weights are left out: their bytes hold all that decodes them.
    """
    low_bit = [each for _, each in sorted(headers.items()) if isinstance(each, LowBitSegment) and not in_nf4(each)]
    if not (meanings := [each.tensor.meaning for each in low_bit]):
        return b""
    return hashlib.sha256("\n".join([f"reader {READER_VERSION}", *meanings]).encode()).digest()


ACTIVATIONS = (
    *(".activation_scale", ".input_scale", ".input_global_scale", ".input_zero_point", ".input_scale_ub"),
    *(".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"),
)
PARTS = (
    *("_scale_inv", "_scale_2", "_proj_scale", ".weight_scale", ".weight_global_scale", ".weight_zero_point"),
    *("_packed", ".weight_shape", ".weight_g_idx", "_proj_blocks", "_proj_scales", ".pre_quant_scale"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_format"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
)
"""Endings of tensors that only a quantized weight has."""


@dataclass(slots=True)
class Parts:
    """The tensors of a checkpoint while parts of quantized weights are taken out."""

    left: dict[str, Segment]
    weights: dict[str, Segment] = field(default_factory=dict)

    def ending(self, suffix: str, *dtypes: str) -> Iterator[tuple[str, Segment]]:
        """Yield (name without `suffix`, segment) of each tensor that ends so, of one of the dtypes if given.

        An empty suffix stands for all tensors but parts.
        """
        for name, segment in list(self.left.items()):
            fits = name.endswith(suffix) if suffix else not name.endswith(PARTS)
            if fits and (not dtypes or segment.dtype in dtypes):
                yield name[: len(name) - len(suffix)], segment

    def take(self, name: str, of: str, dtypes: Sequence[str], shape: Sequence[int] | None = None) -> Segment:
        """Remove and return a part of the weight `of`. Sizes of one at the end of its `shape` may be left out.

        Raises UserError if it is missing or has another dtype or shape.
        """
        segment = self.left.pop(name, None)
        if segment is None:
            raise UserError(f"no tensor {name} in the checkpoint, which {of} needs; download it again")
        if segment.dtype not in dtypes:
            raise UserError(
                f"{segment.file}: {name} is stored as {segment.dtype}, not {' or '.join(dtypes)}; {DOWNLOAD_AGAIN}"
            )
        if shape is not None and trimmed(segment.shape) != trimmed(shape):
            raise UserError(
                f"{segment.file}: {name} has shape {short(list(segment.shape))}; {of} needs {short(list(shape))}; "
                f"{DOWNLOAD_AGAIN}"
            )
        return segment


def trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without the ones at its end: scales (O, 1) of rows may be stored as (O,), one scale as ()."""
    length = max((place + 1 for place, size in enumerate(shape) if size != 1), default=0)
    return tuple(shape[:length])


def weight_shape(name: str, segment: Segment, widths: int = 1) -> tuple[int, ...]:
    """Return the shape of a weight whose codes lie `widths` to an element. Raises UserError if it is not a matrix."""
    if len(segment.shape) not in (2, 3) or not segment.numel:
        raise UserError(
            f"{segment.file}: {name} has shape {short(list(segment.shape))}, which is not that of a quantized weight; "
            f"{DOWNLOAD_AGAIN}"
        )
    return (*segment.shape[:-1], segment.shape[-1] * widths)


def scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight, one per block."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def as_tiles(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[str | None, str]:
    """Return (format, reason) of FP8 codes with a scale per block, held as tiles of 128 x 128."""
    tile = FORMAT_LAYOUTS["fp8_block"].tile
    assert tile is not None
    sizes = zip(block, shape[-2:], tile, strict=True)
    fits = all(each % of_tile == 0 or each >= size for each, size, of_tile in sizes)
    if fits and (len(shape) == 2 or shape[-2] % tile[0] == 0):
        return "fp8_block", ""
    return None, f"FP8 with a scale per {block[0]} x {block[1]} weights of {list(shape)} is not in tiles of 128 x 128"


def check_fields(values: Mapping[str, Any], where: str, known: str) -> None:
    """Raise UserError for a setting that is not `known`: it may change what the weights mean."""
    unknown = sorted(values.keys() - set(known.split()) - {"quant_method"})
    if unknown:
        value = short(values[unknown[0]])
        raise UserError(f"{where}.{unknown[0]}={value} is unknown and may change what the weights mean; {USE_16_BIT}")


def check_value(values: Mapping[str, Any], where: str, name: str, *supported: Any) -> None:
    """Raise UserError for a value that is not `supported`; None there stands for an absent one too."""
    value = values.get(name)
    if not any(type(value) is type(each) and value == each for each in supported):
        listed = " or ".join(short(each) for each in supported if each is not None)
        raise UserError(f"{where}.{name}={short(value)} is not supported, only {listed}; {USE_16_BIT}")


def is_block(value: Any) -> bool:
    """Return True for a list of two sizes."""
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


BNB_NF4 = "nf4"
"""Method of checkpoints that bitsandbytes quantized to 4 bits."""
QUANT_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
"""Name of the settings of a weight in 4 bits: the weight's name, nf4 or fp4."""
_NF4 = FORMAT_LAYOUTS["nf4"]
_STATE = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 256
"""Bytes of quant_state, padded with spaces: its text depends on the offset, which is unknown when files are laid
out."""


def nf4_config(dtype: str, skip: Sequence[str]) -> dict[str, Any]:
    """Return quantization_config of config.json as transformers writes it; the modules in `skip` stay dense.

    `dtype` is torch's name of the dtype in which bitsandbytes computes.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def nf4_tensors(name: str, shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype (safetensors' name) and shape of the tensors of a double-quantized weight, of 2 or 3 dimensions.

    bitsandbytes has matrices alone; fused experts are the same tensors with another shape in their quant_state.
    """
    numel = math.prod(shape)
    return {
        name: ("U8", (-(-numel // 2), 1)),
        f"{name}.absmax": ("U8", (-(-numel // _NF4.block),)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.nested_absmax": ("F32", (_NF4.num_groups(tuple(shape)),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
        f"{name}.{_STATE}": ("U8", (_STATE_BYTES,)),
    }


def nf4_state(name: str, shape: Sequence[int], offset: float, dtype: str) -> tuple[str, bytes]:
    """Return the name and the content of a weight's quant_state; its offset is kept bit for bit."""
    state = {
        "quant_type": "nf4",
        "blocksize": _NF4.block,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": _NF4.blocks_per_group,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    assert len(text) == _STATE_BYTES
    return f"{name}.{_STATE}", text


def check_bnb(settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError for settings that are not supported."""
    if settings.get("load_in_8bit"):
        check_value(settings, where, "load_in_4bit", False, None)
        check_value(settings, where, "llm_int8_has_fp16_weight", False, None)
    else:
        check_value(settings, where, "load_in_4bit", True)
        check_value(settings, where, "bnb_4bit_quant_type", "nf4", None)


def find_bnb(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield bitsandbytes' weights: in 4 bits those with a quant_state, in 8 bits those with the absmax of rows."""
    if settings.get("load_in_8bit"):
        yield from _find_int8(parts)
        return
    for match in list(filter(None, map(QUANT_STATE.fullmatch, parts.left))):
        yield _nf4(parts, match[1], match[0], match[2])


def _nf4(parts: Parts, name: str, state_name: str, kind: str) -> Nf4Tensor:
    """Take a weight in NF4: X, the codes as (n, 1) of any storage dtype; X.quant_map, the levels; X.absmax per block.

    X.quant_state.bitsandbytes__nf4 is JSON: quant_type, blocksize, dtype, shape. With double quantization X.absmax has
    indices in uint8 of X.nested_quant_map, there is X.nested_absmax per group, and the JSON has nested_blocksize,
    nested_dtype and nested_offset.
    """
    at, where = parts.take(state_name, name, ("U8",)), f"{name}.quant_state"
    require(kind == "nf4", f"{name} is stored as {kind}; only nf4 can be kept as it is: {USE_16_BIT}")
    state = parse_object(at.content(), f"{at.file}: {state_name}", "download it again")
    nested = "nested_blocksize" in state or "nested_offset" in state
    check_value(state, where, "quant_type", "nf4")
    check_value(state, where, "blocksize", _NF4.block)
    if nested:
        check_value(state, where, "nested_blocksize", _NF4.blocks_per_group)
        check_value(state, where, "nested_dtype", "float32")
    shape: Any = state.get("shape")
    offset = state.get("nested_offset") if nested else None
    is_shape = isinstance(shape, list) and len(shape) in (2, 3) and all(type(n) is int and n > 0 for n in shape)
    require(is_shape, f"{where}.shape={short(shape)} is not that of a linear; {USE_16_BIT}")
    is_finite = isinstance(offset, float) and math.isfinite(offset)
    require(is_finite or not nested, f"{where}.nested_offset={short(offset)} is not a finite number; {DOWNLOAD_AGAIN}")
    blocks, num_bytes = -(-math.prod(shape) // _NF4.block), -(-math.prod(shape) // 2)
    codes = parts.take(name, name, ("U8", "BF16", "F16", "F32"))
    require(
        codes.num_bytes == num_bytes,
        f"{codes.file}: {name} has {codes.num_bytes:,} bytes of codes; a weight of shape {shape} has {num_bytes:,}; "
        f"{DOWNLOAD_AGAIN}",
    )
    taken = {"codes": replace(codes, dtype="U8", shape=(num_bytes,))}
    taken["scales" if nested else "absmax"] = parts.take(
        f"{name}.absmax", name, ("U8" if nested else "F32",), (blocks,)
    )
    taken["quant_map"] = parts.take(f"{name}.quant_map", name, ("F32",), (16,))
    if nested:
        taken["group_scale"] = parts.take(f"{name}.nested_absmax", name, ("F32",), (_NF4.num_groups(shape),))
        taken["nested_quant_map"] = parts.take(f"{name}.nested_quant_map", name, ("F32",), (256,))
    return Nf4Tensor(
        name=name,
        shape=tuple(shape),
        codec="bnb_nf4",
        parts=taken,
        block=(1, _NF4.block),
        bits=4,
        format="nf4" if nested else "nf4_absmax",
        offset=offset,
    )


def _find_int8(parts: Parts) -> Iterator[LowBitTensor]:
    """Yield bitsandbytes' 8-bit weights: X.weight in int8 and the absmax of its rows in X.SCB."""
    for name, _ in parts.ending(".SCB"):
        weight = f"{name}.weight"
        codes = parts.take(weight, weight, ("I8",))
        shape = weight_shape(weight, codes)
        taken = {"codes": codes, "scales": parts.take(f"{name}.SCB", weight, ("F32",), shape[:1])}
        if f"{name}.weight_format" in parts.left:
            taken["layout"] = parts.take(f"{name}.weight_format", weight, ("U8",), ())
        yield LowBitTensor(
            name=weight,
            shape=shape,
            codec="bnb_int8",
            parts=taken,
            block=(1, shape[-1]),
            bits=8,
            reason="no format stores 8-bit integers per row",
        )
