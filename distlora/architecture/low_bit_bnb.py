"""The rules by which bitsandbytes names, shapes and encodes weights in 4 and 8 bits. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distlora.architecture.low_bit_headers import (
    DOWNLOAD_AGAIN,
    USE_16_BIT,
    LowBitTensor,
    Nf4Tensor,
    Parts,
    check_value,
    weight_shape,
)
from distlora.config import require
from distlora.config.errors import short
from distlora.config.json_files import parse_object
from distlora_kernels.format_layouts import FORMAT_LAYOUTS

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
