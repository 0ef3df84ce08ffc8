"""GGUF files of small random models of any architecture that transformers maps, with weights in many types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as reading
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations import GGUF_CONFIG_MAPPING

from distlora.architecture.gguf_folder import NOTE_NAME
from distlora.derive.gguf import _ATTRIBUTES, describe

TYPES = ("Q4_K", "Q8_0", "Q6_K", "Q4_1", "Q5_K", "F16", "Q4_0", "BF16", "Q5_0", "F32", "Q5_1", "IQ4_NL", "Q2_K")
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "IQ4_NL": (0,)}
"""Where the fp16 scales lie in a block of the types that the gguf package cannot write."""
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
    "qwen2moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {"pad_token_id": 299}),
    "starcoder2": ("starcoder2", {}),
}
"""(transformers' model type, settings) by name; the name begins with llama.cpp's architecture."""


def random_rows(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return the bytes of random weights of a type."""
    type = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        return gguf.quants.quantize(values, type)
    block, size = gguf.GGML_QUANT_SIZES[type]
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    for place in _SCALES[kind]:
        scales = generator.random(len(blocks), dtype=np.float32) * np.float32(1e-3)
        blocks[:, place : place + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_random(path: Path, name: str, types: tuple[str, ...] = TYPES, **metadata: Any) -> None:
    """Write a file of a small model of MODELS. `metadata` is added to the architecture's, by name."""
    model_type, more = MODELS[name]
    arch = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | more)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    processor = reading.TENSOR_PROCESSORS.get(arch, reading.TensorProcessor)(config={})
    names = reading.get_gguf_hf_weights_map(model, processor)
    writer = gguf.GGUFWriter(path, arch)
    keys = dict(GGUF_CONFIG_MAPPING[model_type.removesuffix("_text")])
    sizes = ("head_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
    keys |= {key: attribute for key, attribute in _ATTRIBUTES.items() if attribute in sizes}
    for key, attribute in keys.items():
        value = 1e4 if attribute == "rope_theta" else getattr(config, attribute or "", None)
        if isinstance(value, int | float):
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{arch}.{key}", value)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{key}", value)
    add_tokenizer(writer, config.vocab_size)
    generator, shapes = np.random.default_rng(0), {n: tuple(p.shape) for n, p in model.state_dict().items()}
    for number, (gguf_name, hf_name) in enumerate(sorted(names.items())):
        if hf_name in model.all_tied_weights_keys:
            continue
        shape = shapes[hf_name]
        if gguf_name.endswith("_exps.weight") and "down" not in gguf_name:
            shape, number = (shape[0], shape[1] // 2, shape[2]), 0
        if "ffn_gate_inp_shexp" in gguf_name:
            shape = shape[1:]
        kind = types[number % len(types)] if len(shape) > 1 and "_norm" not in gguf_name else "F32"
        writer.add_tensor(gguf_name, random_rows(shape, kind, generator), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a byte-level tokenizer."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, "th", "the", *(f"<|{number}|>" for number in range(len(letters) + 2, size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(letters) + 2) + [3] * (size - len(letters) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(size - 1)
    writer.add_pad_token_id(size - 1)
    writer.add_bos_token_id(size - 2)


def described_here(file: Path, folder: Path) -> Path:
    """Describe a file in this process, as `distlora.architecture.gguf_folder.described` does in another."""
    folder.mkdir()
    (folder / NOTE_NAME).write_text(describe(file, folder))
    return folder


def dense_by_transformers(file: Path, folder: Path) -> Any:
    """Return transformers' model of a file, dequantized to fp32, with the config.json of a folder.

    transformers' own table of sizes lacks those of experts.
    """
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=transformers.AutoConfig.from_pretrained(folder),
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
