"""Plan and write the tensors of a GGUF file: names, types, and rows in llama.cpp's order.

For the architecture `llama` (Mistral too), llama.cpp rotates the pairs (2 i, 2 i + 1) of a head of size D, transformers
(i, i + D / 2): row h D + j D/2 + i of q_proj and k_proj in transformers is row h D + 2 i + j here. Qwen's rows keep
their order.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from torch import Tensor

from distlora.config import UserError
from distlora.post.export.formats import ARCHITECTURES
from distlora.post.merge.output_folder import check_space
from distlora.system import atomic_io
from distlora.system.progress import Progress


def add_hyperparameters(writer: GGUFWriter, config: Any, say: Callable[[str], None]) -> None:
    """Add the metadata of a transformers config, which has defaults for what config.json leaves out."""
    head_dim = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config, say))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        _, scaling = _frequencies(config)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        context = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(context)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        writer.add_rope_scaling_attn_factors(scaling / (1 + 0.1 * math.log(rope["factor"])))


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> list[Planned]:
    """Return the tensor rope_freqs.weight, the divisors of the frequencies, which Llama 3 alone has."""
    if config.rope_parameters["rope_type"] != "llama3":
        return []
    frequencies, _ = _frequencies(config)
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, head_size(config), 2) / head_size(config))
    factors = torch.from_numpy((plain / frequencies).astype(np.float32))
    rows = functools.partial(iter, [factors[None]])
    return [Planned(name="rope_freqs.weight", shape=tuple(factors.shape), type=TYPES["fp32"], rows=rows)]


def _frequencies(config: Any) -> tuple[np.ndarray[Any, Any], float]:
    """Return transformers' frequencies and its factor of cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    return frequencies.double().numpy(), scaling


def _context(config: Any, say: Callable[[str], None]) -> int:
    """Return the context length: at most a sliding window, as llama.cpp has no window for these families."""
    limit: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or window >= limit or (types is not None and "sliding_attention" not in types):
        return limit
    say(
        f"the model attends to a window of {window:,} tokens, and llama.cpp's {config.model_type} to all: they are the "
        f"same up to {window:,} tokens, which the file names as its context (of {limit:,})"
    )
    return int(window)


Rows = Iterator[Tensor]
"""(n, columns) fp32 pieces in row order; a vector is one row."""

TYPES = {
    "fp32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "fp16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
"""GGUF type of matrices by --dtype."""

_FP16_MAX = float(np.finfo(np.float16).max)
_ROUNDING = {GGMLQuantizationType.BF16: 2**-8, GGMLQuantizationType.F16: 2**-11}
_LARGEST = {GGMLQuantizationType.F16: _FP16_MAX, GGMLQuantizationType.Q8_0: 127 * _FP16_MAX}
"""Largest value of a type; a q8_0 block has an fp16 scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A parameter of the model under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[], Rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rows: Callable[[], Rows]

    @property
    def num_bytes(self) -> int:
        """Return the encoded size."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size

    def encoded(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield its bytes a few rows at a time. Raises UserError for a value beyond its type, NaN and Inf."""
        largest = _LARGEST.get(self.type, math.inf)
        for rows in self.rows():
            most = float(rows.abs().max())
            if not math.isfinite(most):
                raise UserError(
                    f"{self.name} holds NaN or Inf weights, which no type of GGUF is to have; train it again"
                )
            if most > largest:
                raise UserError(
                    f"{self.name} has a weight of {most:.4g}, and {self.type.name} ends at {largest:.4g}; "
                    "write --dtype bf16"
                )
            yield gguf.quants.quantize(rows.contiguous().numpy(), self.type)


@dataclass(frozen=True, slots=True)
class Names:
    """The gguf package's names for Hugging Face's, and the rows it reorders."""

    arch: str
    table: gguf.TensorNameMap
    config: Any

    @classmethod
    def of(cls, config: Any) -> Names:
        """Return the names of a model's architecture."""
        arch = ARCHITECTURES[config.model_type]
        key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        return cls(arch, gguf.get_tensor_name_map(key, config.num_hidden_layers), config)

    def gguf_name(self, name: str) -> str:
        """Return GGUF's name. Raises UserError for a tensor that the architecture lacks."""
        found = self.table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{name} is not a tensor of llama.cpp's {self.arch}; use --format hf")
        return found

    def in_order(self, name: str, rows: Callable[[], Rows]) -> Callable[[], Rows]:
        """Return the rows of a weight, bias or adapter's B in the architecture's order."""
        projection = re.search(r"\.([qk])_proj\.", name)
        if self.arch != "llama" or projection is None:
            return rows
        size = head_size(self.config)
        if name.endswith(".bias"):  # A bias: its elements are the rows.
            return lambda: (part.view(1, -1) for part in _rotated((part.view(-1, 1) for part in rows()), size))
        return lambda: _rotated(rows(), size)


def plan(names: Names, weights: Mapping[str, Weight], dtype: str) -> list[Planned]:
    """Return the file's tensors in the model's order. Raises UserError for one that the architecture lacks."""
    return [
        Planned(
            name=(name := names.gguf_name(weight.name)),
            shape=weight.shape,
            type=_type_of(name, weight.shape, TYPES[dtype]),
            rows=names.in_order(weight.name, weight.rows),
        )
        for weight in weights.values()
    ]


def _type_of(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return a tensor's type as llama.cpp's converter chooses it.

    Vectors and norms are fp32, rows without whole blocks fp16.
    """
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _rotated(rows: Rows, size: int) -> Rows:
    """Yield whole heads with rows in llama.cpp's order."""
    order = torch.arange(size).view(2, size // 2).T.reshape(-1)
    kept = torch.empty(0)
    for part in rows:
        kept = torch.cat([kept, part]) if len(kept) else part
        if whole := len(kept) // size:
            yield kept[: whole * size].view(whole, size, -1)[:, order].reshape(whole * size, -1)
            kept = kept[whole * size :]


def half_steps(exact: Tensor, read: Tensor, type: GGMLQuantizationType) -> float:
    """Return the largest distance of `read` from `exact` (n, columns), in units of the type's rounding."""
    if torch.equal(exact, read):
        return 0.0
    size = exact.abs()
    if type == GGMLQuantizationType.Q8_0:  # Half of a 127th of the block's maximum, with a scale rounded to fp16.
        largest = size.view(len(size), -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).reshape(size.shape)
        step = largest / 127 * (0.5 + 127 * 2**-11) + 2**-18
    else:
        step = size * _ROUNDING.get(type, 0.0) + (2**-25 if type == GGMLQuantizationType.F16 else 0.0)
    return float(((read - exact).abs() / step).nan_to_num(0.0, posinf=float("inf")).max())


def write_file(path: Path, arch: str, describe: Callable[[GGUFWriter], None], tensors: Sequence[Planned]) -> None:
    """Write a GGUF file a few rows at a time; `describe` adds the metadata.

    Raises UserError for a value beyond its type and if the disk is too small.
    """
    total = sum(tensor.num_bytes for tensor in tensors)
    check_space(path, total)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = GGUFWriter(path, arch)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    stream = writer.fout[0]
    progress, done = Progress(), 0
    writer.write_padding(stream, stream.tell())
    for tensor in tensors:
        written = 0
        for part in tensor.encoded():
            stream.write(part.data)
            written += part.nbytes
            progress(f"{(done + written) / 1e6:,.0f} of {total / 1e6:,.0f} MB, {tensor.name}")
        assert written == tensor.num_bytes, f"{tensor.name}: {written} of {tensor.num_bytes} bytes"
        writer.write_padding(stream, written)
        done += written
    writer.close()
    atomic_io.sync(path)
