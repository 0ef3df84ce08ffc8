"""Decide which weights quant=keep keeps in the low bits that a checkpoint ships them in. Needs no torch.

Large weights of the decoder layers are kept, linears and experts, and the embedding and the LM head where rows of their
format can be decoded alone. What is dense on disk stays dense, and others in low bits are dequantized while they are
read. Weights in NF4 are kept by quant=nf4 too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import BNB_NF4, USE_16_BIT, LowBitSegment
from distlora.architecture.low_bit_methods import expected_parts, is_converted, quantization_method, with_low_bit
from distlora.architecture.safetensors_headers import DTYPE_BYTES, Segment
from distlora.architecture.spec import Architecture
from distlora.config import ModelSpec, UserError
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, GROUP, is_nf4, labels

_NUMBER = re.compile(r"\.\d+\.")
"""Part of the name of a weight in a list of layers."""


class KeptWeight(NamedTuple):
    """A weight in the format in which it is kept."""

    format: str
    """Name of its format in FORMAT_LAYOUTS."""
    transposed: bool
    """True if each of its matrices is stored, and kept, as the transpose of the model's."""


def kept_by(spec: ModelSpec, base: CheckpointFiles, architecture: Architecture) -> dict[str, KeptWeight]:
    """Return the weights that a run keeps as its checkpoint has them. Raises UserError if it cannot keep them."""
    in_nf4 = quantization_method(base.config, base.folder / "config.json") == BNB_NF4
    if in_nf4:
        check_nf4_base(spec)
    if spec.quant.method != "keep" and not in_nf4:
        return {}
    kept = kept_weights(architecture, base.headers)
    if spec.quant.method == "keep" and not kept:
        raise nothing_to_keep(base.folder)
    return kept


def check_nf4_base(spec: ModelSpec) -> None:
    """Raise UserError for settings that a base that is stored in NF4 does not support."""
    reason = f"{{model.path}}={spec.model.path} is quantized already"
    if spec.adapter.method == "full":
        raise UserError(f"adapter=full trains every weight, but {reason}; set {{model.path}} to the 16-bit checkpoint")
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


def nf4_outside_layers(name: str) -> UserError:
    """Return the error for a weight in NF4 that distlora keeps dense, such as the LM head."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return UserError(
        f"{name} is stored in NF4, which only linears of the decoder blocks may be; save the checkpoint again with "
        f"{module} in llm_int8_skip_modules, or {USE_16_BIT}"
    )


def nothing_to_keep(place: object) -> UserError:
    """Return the error for quant=keep with a checkpoint in the folder `place` that has nothing to keep."""
    return UserError(
        "quant=keep keeps the quantized weights of a checkpoint, and the linears in the decoder layers of "
        f"{{model.path}}={place} are not quantized; set quant=nf4"
    )


def kept_weights(architecture: Architecture, headers: Mapping[str, Segment]) -> dict[str, KeptWeight]:
    """Return the weights that can be kept by the model's names; `headers`: CheckpointFiles.headers.

    Raises UserError with the name and the reason for a weight in low bits that cannot be kept.
    """
    weights = {}
    stored_as = architecture.on_disk(headers)
    for index in range(architecture.num_layers):
        for weight in architecture.layer(index).weights:
            name = f"{architecture.layer_prefix}{index}.{weight.path}"
            segments = [headers[stored] for stored in stored_as.get(name, ())]
            if weight.packs and (kept := kept_weight(name, segments)) is not None:
                cut = sum(segment.numel for segment in segments) > weight.numel
                if cut and weight.numel % _unit(kept.format, weight.shape[-1]):
                    raise _cannot_keep(name, f"a part of a tensor is not whole blocks of {labels([kept.format])[0]}")
                if kept.transposed and weight.kind != "experts":
                    raise _cannot_keep(name, "its matrices are stored transposed, and the model's own code reads them")
                weights[name] = kept
    return weights


class KeptTokens(NamedTuple):
    """Formats of the embedding and the LM head with quant=keep."""

    formats: tuple[str | None, str | None]
    """The format of each, which are equal if the two are tied; None: dense."""
    notes: tuple[str, ...]
    """A line for each that is shipped in low bits and dequantized, with the reason."""


def kept_tokens(
    architecture: Architecture, headers: Mapping[str, Segment], trained_by: Sequence[str] = ()
) -> KeptTokens:
    """Return how the embedding and the LM head are held. `trained_by`: settings that train them or rows of them."""
    low = (name for name, segment in headers.items() if isinstance(segment, LowBitSegment))
    if all(_NUMBER.search(name) for name in low):  # Of experts there can be 100,000.
        return KeptTokens((None, None), ())
    stored_as, formats, notes = architecture.on_disk(headers), list[str | None](), list[str]()
    names = (f"{architecture.embedding_path}.weight", f"{architecture.head}.weight")
    for name in names[:1] if architecture.tied else names:
        stored = stored_as.get(name) or (stored_as.get(names[1], ()) if architecture.tied else ())
        first = headers[stored[0]] if stored else None
        if not isinstance(first, LowBitSegment):
            formats.append(None)
            continue
        tensor, reason = first.tensor, ""
        if trained_by:
            reason = f"{trained_by[0]} trains it, or rows of it"
        elif name == names[0] and not architecture.looks_up:
            reason = f"the embedding of {architecture.model_type} does more than look rows up"
        elif len(stored) > 1 or tensor.transposed:
            reason = "it is stored in several tensors, or transposed"
        elif tensor.format is None:
            reason = tensor.reason
        elif FORMAT_LAYOUTS[tensor.format].tile is not None or is_nf4(tensor.format):
            reason = f"no rows of {labels([tensor.format])[0]} are decoded alone"
        formats.append(None if reason else tensor.format)
        if reason:
            notes.append(f"quant=keep dequantizes {name}: {reason}")
    return KeptTokens((formats[0], formats[-1]), tuple(notes))


def expected_headers(architecture: Architecture, config: Mapping[str, Any], place: Path | str) -> Mapping[str, Segment]:
    """Return the headers that `kept_weights` needs of a checkpoint whose config.json alone is known.

    They have the linears of the decoder layers, and of experts that are stored one by one the first of each layer.
    Raises UserError if quantization_config does not tell how a weight is stored.
    """
    whole, single = dict[str, tuple[int, ...]](), dict[str, dict[str, tuple[int, ...]]]()
    for index in range(architecture.num_layers):
        for weight in architecture.layer(index).weights:
            name = f"{architecture.layer_prefix}{index}.{weight.path}"
            if weight.packs:
                whole[name] = weight.shape
            if weight.kind == "experts":
                module, _, tail = name.rpartition(".")
                tails = ("gate_proj", "up_proj") if tail == "gate_up_proj" else (tail,)
                rows = weight.shape[1] // len(tails)
                single[name] = {f"{module}.0.{path}.weight": (rows, weight.shape[2]) for path in tails}
    stored_as = architecture.on_disk([path for names in single.values() for path in names])
    is_quantized, stored = is_converted(config, place), dict[str, Segment]()
    for name, shape in whole.items():
        tensors = single[name] if stored_as.get(name) else {name: shape}
        for tensor, size in tensors.items():
            parts = {tensor: ("BF16", size)}
            if is_quantized(tensor.removesuffix(".weight")):
                parts = expected_parts(config, tensor, size, place)
            for part_name, (dtype, sizes) in parts.items():
                stored[part_name] = Segment(Path(place), 0, math.prod(sizes) * DTYPE_BYTES[dtype], dtype, sizes)
    return with_low_bit(stored, Path(place), config)


def kept_weight(name: str, segments: Sequence[Segment]) -> KeptWeight | None:
    """Return how a weight is kept that consists of these segments; None if they are dense. Raises UserError."""
    tensors = [segment.tensor for segment in segments if isinstance(segment, LowBitSegment)]
    if not tensors:
        return None
    for tensor in tensors:
        if tensor.format is None:
            raise _cannot_keep(name, tensor.reason)
    formats = sorted({tensor.format for tensor in tensors if tensor.format is not None})
    if any(map(is_nf4, formats)) and list(segments) != [tensors[0].segment]:
        raise UserError(
            f"{name} is made from {len(segments)} tensors, of which {tensors[0].name} is quantized; NF4 weights cannot "
            f"be merged or cut as they are: {USE_16_BIT}"
        )
    if len(formats) > 1 or len(tensors) < len(segments):
        dtypes = {segment.dtype for segment in segments if not isinstance(segment, LowBitSegment)}
        listed = ", ".join([*labels(formats), *sorted(dtypes)])
        raise _cannot_keep(name, f"it merges tensors of different formats ({listed})")
    if len({tensor.transposed for tensor in tensors}) > 1 or (tensors[0].transposed and len(segments) > 1):
        raise _cannot_keep(name, "it merges transposed matrices")
    unit, start = _unit(formats[0], tensors[0].stored_shape[-1]), 0
    for segment, tensor in zip(segments, tensors, strict=True):
        end = segment.offset + segment.num_bytes
        if start % unit or segment.offset % unit or (end % unit and end < tensor.segment.num_bytes):
            raise _cannot_keep(name, f"it merges parts that are not whole blocks of {labels(formats)[0]}")
        start += segment.num_bytes
    return KeptWeight(formats[0], tensors[0].transposed)


def _unit(format: str, width: int) -> int:
    """Return the weights after which another tensor can go on: rows of tiles, or what shares every number."""
    sizes = FORMAT_LAYOUTS[format]
    if sizes.tile is not None:
        return sizes.tile[0] * width
    return GROUP if any(not part.shape for part in sizes.parts) else sizes.block


def is_kept(format: str, segments: Sequence[Segment]) -> bool:
    """Return True if a weight in this format has the bytes of the checkpoint: it is shipped in it."""
    first = segments[0]
    return isinstance(first, LowBitSegment) and first.tensor.format == format


def is_transposed(segments: Sequence[Segment]) -> bool:
    """Return True if a weight's matrices are stored as the transposes of the model's."""
    return isinstance(segments[0], LowBitSegment) and segments[0].tensor.transposed


def _cannot_keep(name: str, reason: str) -> UserError:
    return UserError(
        f"quant=keep cannot keep {name}: {reason}; set quant=nf4, which quantizes it again, or quant=none, which "
        "dequantizes it"
    )
