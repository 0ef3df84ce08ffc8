"""Load the base's weights from a checkpoint into the shards of a parallelized model; each rank reads only its bytes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.kept_weights import is_kept, nf4_outside_layers
from distlora.architecture.low_bit_headers import LowBitSegment, in_nf4
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment, check_stored_shape
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import UserError
from distlora.loading.fill_weight import copy_into, fill_kept, fill_row_norms, load_matrix, quantize_into
from distlora.loading.quantized_cache import QuantizedCache, QuantizedCacheSettings
from distlora.model.adapters import AdaptedLinear, adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import stored_buffers
from distlora.parallel import Backend, watch, whole_shape
from distlora.weights.conversion import ParameterSource, find_sources, names_without_a_place
from distlora.weights.decompose import LowRankFactors, Residual
from distlora.weights.reader import DTYPE_NAMES, Reader


@dataclass(frozen=True, slots=True)
class Loaded:
    """Results of loading on this rank."""

    seconds: float
    bytes_read: int
    quantized_weights: int
    """Weights of the whole model that are kept in low bits."""
    quantized_bytes: int
    """Their bytes over all ranks, without FSDP2's padding."""
    prequantized: bool
    """True if the checkpoint has them in low bits, which are kept as they are."""
    from_cache: bool = False
    """True if they came from the quantized-weights cache."""
    cache_bytes_written: int = 0
    """Bytes that this rank wrote into the cache."""

    @property
    def how(self) -> str:
        """Return the origin of the quantized weights for a log line."""
        if self.prequantized:
            return "as stored"
        if self.from_cache:
            return "from the quantized-weights cache"
        return "and quantized and cached" if self.cache_bytes_written else "and quantized"

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per quantized weight; None if there are none."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None


def load_base(
    model: CausalLM,
    base: CheckpointFiles,
    backend: Backend,
    *,
    subtract_initial_adapter: bool = False,
    cache: QuantizedCacheSettings | None = None,
    boundary: watch.Marker = watch.at,
) -> Loaded:
    """Fill every parameter of the base, and every buffer that a checkpoint holds, from the checkpoint.

    `subtract_initial_adapter`: load adapted weights minus what their adapter computes now (PiSSA). `cache`: the
    quantized-weights cache; None disables it. `boundary` marks each weight, on every rank alike. Raises UserError for a
    missing, misshapen or non-finite tensor.
    """
    began = time.monotonic()
    sources = find_base(model, base.headers)
    adapters = set(adapter_parameters(model))
    token_matrices = {f"decoder.{model.architecture.embedding}.weight": EMBEDDING, "head.weight": HEAD}
    quantized_weights = quantized_bytes = kept = 0
    with Reader() as reader, QuantizedCache(model, base.stored, sources, backend) as cached:
        if cache is not None and not any(in_nf4(source.segments[0]) for source in sources.values()):
            cached.open(cache, boundary)
        for path, module in model.named_modules():
            boundary(None, f"loading {path}", long=True)
            residual = None
            if subtract_initial_adapter and isinstance(module, AdaptedLinear):
                (pair,) = module.pairs
                residual = Residual(LowRankFactors(pair.A, pair.B), pair.scaling)
            if isinstance(module, FrozenTensor) and module.format is not None:
                name = model.hf_name(f"{path}.weight")
                if is_kept(module.format.name, source_of(sources, name).segments):
                    fill_kept(module, sources[name].segments, reader, backend, name)
                    kept += module.numel
                elif not cached.has(name):
                    segments = segments_of(sources, name, module.shape)
                    quantize_into(module, segments, reader, backend, name, residual=residual)
                    cached.quantized(name)
                quantized_weights += module.numel
                quantized_bytes += module.packed_bytes
            for local_name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{local_name}" if path else local_name
                is_packed = isinstance(module, FrozenTensor) and local_name in module.part_names
                if is_packed or full in adapters or (full == "head.weight" and model.tied):
                    continue
                name = model.hf_name(full)
                matrix = token_matrices.get(full)
                if matrix is None:
                    segments = segments_of(sources, name, tuple(whole_shape(parameter)))
                    taken = residual if local_name == "weight" else None
                    copy_into(parameter, segments, reader, backend, name, residual=taken)
                    continue
                segments = segments_of(sources, name, (model.vocabulary.stored, whole_shape(parameter)[1]))
                rows, tokens = model.rows_of(matrix), model.vocabulary
                zeroed = model.layout.zeroed_row if matrix == EMBEDDING or model.tied_in_base else None
                load_matrix(
                    parameter, segments, reader, backend, name, vocabulary=tokens, token_rows=rows, zeroed=zeroed
                )
            if isinstance(module, AdaptedLinear) and module.row_norms_squared is not None:
                fill_row_norms(module, backend)
        _load_buffers(model, sources, reader, backend)
        bytes_read = reader.bytes_read + cached.bytes_read
        boundary(None, "writing the quantized-weights cache", long=True)
    return Loaded(
        seconds=time.monotonic() - began,
        bytes_read=bytes_read,
        quantized_weights=quantized_weights,
        quantized_bytes=quantized_bytes,
        prequantized=kept > 0,
        from_cache=cached.filled,
        cache_bytes_written=cached.bytes_written,
    )


def _load_buffers(model: CausalLM, sources: Mapping[str, ParameterSource], reader: Reader, backend: Backend) -> None:
    for name, buffer in stored_buffers(model).items():
        dtypes = SOURCE_DTYPES if buffer.is_floating_point() else (DTYPE_NAMES[buffer.dtype],)
        copy_into(buffer, segments_of(sources, name, tuple(buffer.shape), dtypes), reader, backend, name)


def find_base(model: CausalLM, headers: Mapping[str, Segment]) -> dict[str, ParameterSource]:
    """Return the tensors on disk of each parameter of the base, by its Hugging Face name.

    Tensors outside of the decoder and its LM head (a vision tower's) are left alone. Raises UserError if the checkpoint
    and config.json describe different models: weights without a place, or tied weights that differ.
    """
    layout, scope = model.layout, model.architecture.decoder
    strays = names_without_a_place(layout, headers, scope)
    if strays:
        raise UserError(
            f"the checkpoint holds {strays[0]} ({len(strays)} such tensors), which config.json does not "
            "describe, so the model would run without it; download the folder again"
        )
    wanted = {name for name in layout.names if name.startswith((f"{scope}.", f"{layout.head}."))}
    wanted |= {model.hf_name(f"head.{name}") for name, _ in model.head.named_parameters()}
    sources = find_sources(layout, headers, wanted)
    for name, other in layout.tied.items():
        # transformers leaves them untied then, despite config.json.
        if {name, other} <= sources.keys() and _sample(sources[name]) != _sample(sources[other]):
            cure = "set tie_word_embeddings to false in config.json"
            raise UserError(
                f"transformers ties {name} to {other}, but {sources[name].names[0]} and {sources[other].names[0]} "
                f"differ on disk; {cure if other == layout.embedding else 'download the folder again'}"
            )
    return sources


def _sample(source: ParameterSource) -> bytes:
    """Read 64 KiB from the middle of a matrix: matrices that were trained apart differ everywhere."""
    segment = source.segments[len(source.segments) // 2]
    if isinstance(segment, LowBitSegment):
        segment = next(iter(segment.tensor.parts.values()))
    with segment.file.open("rb") as stream:
        stream.seek(segment.offset + max(segment.num_bytes // 2 - 2**15, 0))
        return stream.read(min(2**16, segment.num_bytes))


def segments_of(
    sources: Mapping[str, ParameterSource], name: str, shape: tuple[int, ...], dtypes: Collection[str] = SOURCE_DTYPES
) -> Sequence[Segment]:
    """Return a parameter's segments by its Hugging Face name.

    Raises UserError if it is absent or contradicts config.json.
    """
    source = source_of(sources, name)
    check_stored_shape(name, source.shape, shape)
    if in_nf4(source.segments[0]):
        raise nf4_outside_layers(name)
    dtype = source.segments[0].dtype
    if dtype not in dtypes and not (dtypes is SOURCE_DTYPES and isinstance(source.segments[0], LowBitSegment)):
        raise UserError(
            f"{name} is stored as {dtype}; it is read from {', '.join(dtypes)}: set {{model.path}} to such a copy"
        )
    return source.segments


def source_of(sources: Mapping[str, ParameterSource], name: str) -> ParameterSource:
    """Return a parameter's tensors on disk by its Hugging Face name. Raises UserError if it is absent."""
    if name not in sources:
        raise UserError(f"the checkpoint has no tensor {name}, which config.json describes; download the folder again")
    return sources[name]
