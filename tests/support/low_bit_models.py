"""Small models whose decoder layers are in the low-bit formats that quant=keep holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from support import low_bit_checkpoints as shipped
from support.gguf_files import described_here, write_random
from support.low_bit_checkpoints import FP8, INT4, NAME, Checkpoint
from support.small_models import write_model_folder

EVEN = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
"""Rows are whole blocks of 32 and 64; weights are no whole groups of 16,384."""
ALIGNED = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
"""Parts of merged experts are whole groups and whole tiles."""
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}

MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Checkpoint] | None, str]] = {
    # Hidden 96, intermediate 200: ragged tiles.
    "fp8": ("llama", {}, shipped.block_fp8, "fp8_block"),
    "fp8-experts": ("qwen3_moe", ALIGNED, shipped.block_fp8, "fp8_block"),
    "fp8-compressed": (
        "llama-tied",
        {},
        lambda w: shipped.compressed(w, "float-quantized", **FP8, **BLOCK),
        "fp8_block",
    ),
    "mxfp4": ("gpt_oss", {"intermediate_size": 64}, shipped.gpt_oss, "mxfp4"),
    "nvfp4": ("qwen3", EVEN, lambda w: shipped.compressed(w, "nvfp4-pack-quantized", **NVFP4), "nvfp4"),
    "nvfp4-experts": ("qwen3_moe", ALIGNED, shipped.modelopt_nvfp4, "nvfp4"),
    "int4": ("llama", EVEN, lambda w: shipped.compressed(w, "pack-quantized", **INT4, group_size=32), "int4_g32"),
    "int4-experts": (
        "qwen3_moe",
        {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 16},
        lambda w: shipped.compressed(w, "pack-quantized", **INT4, group_size=32),
        "int4_g32",
    ),
    "awq": ("llama", EVEN, lambda w: shipped.awq(w, 64), "int4_g64_fp16_zeros"),
    "gptq": ("llama", EVEN, lambda w: shipped.gptq(w, 32), "int4_g32_fp16_zeros"),
    # Of rows in another order (queries and keys), each weight in a type of its own.
    "gguf": ("llama", {}, None, "q4_0, q4_1, q4_K, q6_K, q8_0"),
}
"""By name: the family, its settings, how a weight is written (None: in a GGUF file), and the formats that keep it."""


def write_kept_model(folder: Path, name: str, **settings: Any) -> Path:
    """Write one of MODELS: linears of the decoder layers, or gpt-oss' experts, in low bits; the rest in fp32."""
    family, sizes, write, kinds = MODELS[name]
    if write is None:
        write_random(folder.with_suffix(".gguf"), family, tuple(kind.upper() for kind in kinds.split(", ")))
        return described_here(folder.with_suffix(".gguf"), folder)
    write_model_folder(folder, family, **sizes | settings)
    tensors, config = safetensors.torch.load_file(folder / "model.safetensors"), None
    torch.manual_seed(1)
    for weight, dense in list(tensors.items()):
        experts = weight.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if experts or (weight.endswith("_proj.weight") and family != "gpt_oss"):
            written, config, _ = write(dense.mT if experts else dense)
            del tensors[weight]
            own = "model.layers.0.mlp.experts.gate_up_proj" if experts else NAME
            path = weight.removesuffix(".weight")
            tensors |= {part.replace(own, path): tensor.contiguous() for part, tensor in written.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return folder
