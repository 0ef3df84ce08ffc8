"""Weights that bitsandbytes has already quantized, and where their parts lie. Needs no torch.

bitsandbytes stores a quantized weight W (out, in) as several tensors (one safetensors file may hold them all):

    W                   codes, two per byte, as (n, 1) of quant_storage: uint8, bf16, fp16 and fp32 are the same bytes
    W.absmax            one per block of 64: uint8 with double quantization, else fp32
    W.quant_map         (16,) fp32, the levels
    W.nested_absmax     one per group of 256 blocks, fp32      } with double
    W.nested_quant_map  (256,) fp32, the 8-bit map             } quantization
    W.quant_state.bitsandbytes__nf4   JSON: quant_type, blocksize, dtype, shape; nested_blocksize, _dtype, _offset

These are distlora's own parts (kernels/README.md) except for the padding of the last group, so nothing is quantized
again. A weight without a quant_state was left dense (llm_int8_skip_modules) and stays dense. Unsupported formats are
refused by the name of the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import INSTEAD
from distlora.architecture.low_bit_methods import NF4, none_quantized, quantization_method
from distlora.architecture.safetensors_headers import DTYPE_BYTES, Segment
from distlora.config import ModelSpec, UserError
from distlora.config.json_files import parse_object
from distlora.weights.conversion import Source

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_STORAGES = ("U8", "BF16", "F16", "F32")
_BLOCK, _NESTED_BLOCK = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PrequantizedWeight:
    """One NF4 weight as bitsandbytes stored it: flat byte ranges of its parts."""

    name: str
    """The weight's name on disk."""
    shape: tuple[int, ...]
    """(out_features, in_features)."""
    codes: Segment
    """ceil(numel / 2) bytes, whatever dtype they were stored as."""
    absmax: Segment
    """One per block: uint8 indices with double quantization, else fp32."""
    quant_map: Segment
    nested_absmax: Segment | None
    """One fp32 per group; None without double quantization, like the next two."""
    nested_quant_map: Segment | None
    offset: float | None

    @property
    def nested(self) -> bool:
        """True if the absmax are quantized too."""
        return self.offset is not None

    @property
    def format(self) -> str:
        """Name of the format that keeps its parts."""
        return "nf4" if self.nested else "nf4_absmax"


def read_prequantized_weights(base: CheckpointFiles) -> dict[str, PrequantizedWeight]:
    """Return the weights that are NF4 on disk, by their names there; empty for a dense checkpoint.

    Reads a few hundred bytes per weight. Raises UserError with the field's name for other settings of bitsandbytes, and
    for parts that contradict each other.
    """
    folder, headers = base.folder, base.stored
    method = quantization_method(base.config, folder / "config.json")
    states = {match[1]: match for match in map(_STATE.fullmatch, headers) if match}
    if method is None:
        if states:
            raise UserError(
                f"{folder}: {min(states)} is quantized by bitsandbytes, but config.json has no quantization_config; "
                f"the folder is put together from two checkpoints: download it again, or {INSTEAD}"
            )
        return {}
    if method != NF4:
        return {}
    if not states:
        raise none_quantized(folder)
    return {name: _packed_weight(name, match[0], match[2], headers) for name, match in sorted(states.items())}


def refuse_dense_settings(spec: ModelSpec) -> None:
    """Raise UserError for settings that a base that is stored in NF4 does not support."""
    reason = f"{{model.path}}={spec.model.path} is quantized already"
    if spec.adapter.method == "full":
        raise UserError(f"adapter=full trains every weight, but {reason}; set {{model.path}} to the 16-bit checkpoint")
    if spec.quant.method == "keep":
        raise UserError(f"{{model.path}}={spec.model.path} is stored in NF4; set quant=nf4, which keeps it unchanged")
    if spec.quant.method in ("none", "mixed"):
        does = "keeps weights in 16 bits" if spec.quant.method == "none" else "quantizes 16-bit weights"
        raise UserError(
            f"quant={spec.quant.method} {does}, but {reason}; set quant=nf4, or {{model.path}} to the 16-bit checkpoint"
        )
    if spec.adapter.decomposes:
        raise UserError(
            f"adapter.init={spec.adapter.init} decomposes 16-bit weights, but {reason}; set adapter.init=kaiming, or "
            "{model.path} to the 16-bit checkpoint"
        )


def packed_outside_blocks(name: str) -> UserError:
    """Return the error for a quantized weight that distlora keeps dense, such as the LM head."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return UserError(
        f"{name} is stored in NF4, which only linears of the decoder blocks may be; save the checkpoint again with "
        f"{module} in llm_int8_skip_modules, or {INSTEAD}"
    )


def prequantized_parameters(
    packed: Mapping[str, PrequantizedWeight], sources: Mapping[str, Source]
) -> dict[str, PrequantizedWeight]:
    """Return the quantized weights by the model's names, given the tensors on disk of each parameter.

    Raises UserError for a parameter that is merged from several tensors of which one is quantized.
    """
    by_parameter = {}
    for parameter, source in sources.items():
        stored = [name for name in source.names if name in packed]
        if stored and (len(source.names) > 1 or not source.whole):
            raise UserError(
                f"{parameter} is made from {len(source.names)} tensors, of which {stored[0]} is quantized; NF4 "
                f"weights cannot be merged or cut as they are: {INSTEAD}"
            )
        if stored:
            by_parameter[parameter] = packed[stored[0]]
    return by_parameter


def _packed_weight(name: str, state_name: str, kind: str, headers: Mapping[str, Segment]) -> PrequantizedWeight:
    """Return one weight's parts, checked against each other."""
    if kind != "nf4":
        raise UserError(f"{name} is stored as {kind}; only nf4 can be kept as it is: {INSTEAD}")
    at = headers[state_name]
    with at.file.open("rb") as stream:
        stream.seek(at.offset)
        state = parse_object(stream.read(at.num_bytes), f"{at.file}: {state_name}", "download the checkpoint again")
    shape, offset = _checked_state(name, state)
    numel, nested = math.prod(shape), offset is not None
    num_blocks = -(-numel // _BLOCK)
    wanted = {  # (dtypes on disk, entries)
        "": (_STORAGES, -(-numel // 2)),
        ".absmax": (("U8",) if nested else ("F32",), num_blocks),
        ".quant_map": (("F32",), 16),
    }
    if nested:
        wanted |= {".nested_absmax": (("F32",), -(-num_blocks // _NESTED_BLOCK)), ".nested_quant_map": (("F32",), 256)}
    parts = {}
    for suffix, (dtypes, size) in wanted.items():
        part = f"{name}{suffix}"
        segment = headers.get(part)
        if segment is None:
            raise UserError(f"no tensor {part} in the checkpoint, which its quant_state needs; download it again")
        if segment.dtype not in dtypes:
            raise UserError(
                f"{segment.file}: {part} is stored as {segment.dtype}, not {' or '.join(dtypes)}; {INSTEAD}"
            )
        if not suffix:  # Codes are the same bytes in any storage.
            segment = replace(segment, dtype="U8", shape=(segment.num_bytes,))
        if segment.num_bytes != size * DTYPE_BYTES[segment.dtype]:
            raise UserError(
                f"{segment.file}: {part} has {segment.numel:,} entries; a weight of shape {list(shape)} in blocks of "
                f"{_BLOCK} has {size:,}; the checkpoint is damaged, download it again"
            )
        parts[suffix] = segment
    return PrequantizedWeight(
        name=name,
        shape=shape,
        codes=parts[""],
        absmax=parts[".absmax"],
        quant_map=parts[".quant_map"],
        nested_absmax=parts.get(".nested_absmax"),
        nested_quant_map=parts.get(".nested_quant_map"),
        offset=offset,
    )


def _checked_state(name: str, state: dict[str, Any]) -> tuple[tuple[int, ...], float | None]:
    """Return (shape, offset or None) of a quant_state. Raises UserError for an unsupported field."""
    wanted: dict[str, object] = {"quant_type": "nf4", "blocksize": _BLOCK}
    nested = "nested_blocksize" in state or "nested_offset" in state
    if nested:
        wanted |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
    for field, value in wanted.items():
        if state.get(field) != value:
            raise UserError(
                f"{name}: {field}={state.get(field)!r} in its quant_state cannot be kept as it is, only {value!r}; "
                f"{INSTEAD}"
            )
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)):
        raise UserError(f"{name}: shape={shape!r} in its quant_state is not that of a linear; {INSTEAD}")
    offset = state.get("nested_offset")
    if nested and not (isinstance(offset, (int, float)) and math.isfinite(offset)):
        raise UserError(
            f"{name}: nested_offset={offset!r} in its quant_state is not a finite number; the checkpoint is damaged, "
            "download it again"
        )
    return tuple(shape), float(offset) if nested else None  # type: ignore[arg-type]
