"""Random checkpoints of any size, made on the spot: what a benchmark loads when there is no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

LLAMA_700M: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
"""A Llama of 762 million parameters."""
LLAMA_1B5: dict[str, Any] = LLAMA_700M | {"intermediate_size": 6400, "num_hidden_layers": 28}
"""A Llama of 1.53 billion parameters, 1.39 of them in linears of its blocks."""


def write_random_checkpoint(folder: Path, settings: dict[str, Any], *, num_shards: int) -> int:
    """A bf16 Llama folder with random weights in `num_shards` safetensors files. Returns the number of parameters.

    One block of random numbers is repeated through all weights: generating fresh ones would take longer than loading.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**settings, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        tensors = {name: _fill(shapes[name], noise) for name in own}
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values())


def _fill(shape: torch.Size, noise: torch.Tensor) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    repeats = -(-shape.numel() // noise.numel())
    return noise.repeat(repeats)[: shape.numel()].view(shape).clone()
