"""Write random checkpoints and make random sequences, so that a benchmark needs no downloads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from distlora.data.rows import STARTS, TRAINED, PackedRows

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
"""config.json of a Llama with 762 million parameters."""
LLAMA_1B5: dict[str, Any] = LLAMA_700M | {"intermediate_size": 6400, "num_hidden_layers": 28}
"""config.json of a Llama with 1.53 billion parameters, 1.39 of them in linears of its decoder layers."""


def write_random_checkpoint(folder: Path, settings: dict[str, Any], *, num_shards: int) -> int:
    """Write a bf16 Llama with random weights in `num_shards` safetensors files. Returns the number of parameters.

    One array of random numbers is repeated through all weights: generating fresh ones takes longer than loading them.
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
        shard_names = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        tensors = {}
        for name in shard_names:
            shape = shapes[name]
            repeated = noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape).clone()
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else repeated
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard_names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values())


def random_rows(count: int, length: int, vocabulary: int) -> PackedRows:
    """Return sequences of one document each, in which every token but the first is trained."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length), dtype=np.int32)
    flags = np.full((count, length), TRAINED, np.uint8)
    flags[:, 0] |= STARTS
    flags[:, -1] &= ~np.uint8(TRAINED)
    return packed(tokens, flags)


def packed(tokens: np.ndarray, flags: np.ndarray) -> PackedRows:
    """Return tokens and flags (sequences, length) as the trainer's packed sequences, without their documents."""
    targets = np.count_nonzero(flags & TRAINED, axis=1).astype(np.int32)
    return PackedRows(tokens, flags, targets, np.zeros(len(tokens), np.int32), 0, {})


def random_tokens(rows: int, length: int, vocabulary: int, rank: int) -> torch.Tensor:
    """Return (rows, length) int64 tokens, different on each rank."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(rank))
