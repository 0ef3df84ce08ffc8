"""Weights and checkpoints that bitsandbytes quantized, and its values of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import transformers
from torch import Tensor

from support.small_models import tokenizer

SHAPES = [(3, 100), (7, 33), (1, 63), (256, 128), (1002, 96), (129, 640)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def with_zero_block(weight: Tensor) -> Tensor:
    """Zero the first block, if there is another: for one partial zero block bitsandbytes stores absmax 1e-38."""
    flat = weight.clone().view(-1)
    if flat.numel() > 64:
        flat[:64] = 0
    return flat.view(weight.shape)


def bitsandbytes_dequantize(packed: Tensor, state: bnb.QuantState, shape: tuple[int, ...]) -> Tensor:
    """Bitsandbytes' result, asked for as rows of one block where the tensor has whole blocks.

    Its CPU kernel (0.50.2, AVX-512) takes wrong absmax values where a row is 32, 96, 160... weights long. What it does
    for odd rows instead it compiles, seconds a shape; here it is run as it is written.
    """
    numel = math.prod(shape)
    if numel % 64 == 0:
        state.shape = torch.Size((numel // 64, 64))
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(packed, state).view(shape)


# 12,600 weights in q_proj and 26,400 in up_proj: multiples of neither 64 nor 16,384.
ODD = {
    "hidden_size": 100,
    "intermediate_size": 264,
    "head_dim": 126,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def quantize(source: Path, target: Path, **settings: Any) -> None:
    """Save a checkpoint with transformers and bitsandbytes."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(target, max_shard_size="150KB")
    tokenizer().save_pretrained(target)
