"""Write a base of any size with random weights, and an adapter for it, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distlora.architecture.safetensors_headers import INDEX_NAME, header_bytes, lay_out

QWEN25_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""Qwen2.5-1.5B's config.json: 1.54 B parameters, the largest of them the embedding, 233 M."""


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return each tensor's name and shape of a qwen2 with a tied LM head, in the model's order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def write_large_model(folder: Path, config: dict[str, Any], *, shards: int = 2) -> None:
    """Write random bf16 weights of std 0.02."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = dict(shapes_of(config))
    names = list(tensors)
    parts = [names[part * len(names) // shards : (part + 1) * len(names) // shards] for part in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write(folder / file, {name: ("BF16", tensors[name]) for name in part}, std=0.02)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_large_adapter(folder: Path, config: dict[str, Any], *, rank: int = 16) -> None:
    """Write a LoRA on all linears, in fp32."""
    folder.mkdir(parents=True)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes_of(config):
        if name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = ("F32", (rank, shape[1]))
            tensors[f"{path}.lora_B.weight"] = ("F32", (shape[0], rank))
    _write(folder / "adapter_model.safetensors", tensors, std=0.01)
    targets = sorted({name.split(".")[-3] for name in tensors})
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def _write(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], *, std: float) -> None:
    table = lay_out(tensors)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**22, generator=generator) * std  # Drawn once: drawing 1.5 B takes a minute.
    with file.open("wb") as stream:
        stream.write(header_bytes(table, {"format": "pt"}))
        for number, (_, (dtype, shape)) in enumerate(table_rows(table, tensors)):
            left = torch.Size(shape).numel()
            own = block.roll(1009 * number).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
            while left:
                part = own[: min(left, len(own))]
                stream.write(part.view(torch.uint8).numpy().data)
                left -= len(part)


def table_rows(
    table: dict[str, dict[str, Any]], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Return the tensors in the order of the file."""
    for name in table:
        yield name, tensors[name]
