"""Models quantized by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from support.small_models import tokenizer

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
