"""A whole model as GGUF: its weights a few rows at a time, its sizes, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, LlamaFileType

from distlora.post.export.gguf.file import write_file
from distlora.post.export.gguf.hyperparameters import add_hyperparameters, rope_factors
from distlora.post.export.gguf.tensors import (
    Names,
    Planned,
    Weight,
    plan,
)
from distlora.post.export.gguf.vocabulary import add_vocabulary

_FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "fp16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def write_model(
    path: Path,
    config: Any,
    weights: Mapping[str, Weight],
    tokenizer: Any,
    *,
    dtype: str,
    name: str,
    say: Callable[[str], None],
) -> None:
    """`config` and `tokenizer` are transformers' own; `name` is the model's, for people.

    Raises UserError for what llama.cpp would compute otherwise.
    """
    names = Names.of(config)
    tensors = plan(names, weights, dtype)
    if (factors := rope_factors(config)) is not None:
        tensors.insert(0, Planned.of_array("rope_freqs.weight", factors))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        add_hyperparameters(writer, config, say)
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, config.vocab_size, say)

    write_file(path, names.arch, describe, tensors)
