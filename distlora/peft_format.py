"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors, without importing PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from distlora.adapters import DEFAULT_ADAPTER, LoRAPair
from distlora.config import Config
from distlora.model import CausalLM, hf_name
from distlora.quant import FrozenLinear
from distlora.targets import select_targets

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def adapter_tensors(model: CausalLM, adapter: str = DEFAULT_ADAPTER) -> dict[str, nn.Parameter]:
    """One adapter's parameters by PEFT's names: base_model.model.<path>.lora_A.weight (r, in), lora_B (out, r)."""
    tensors: dict[str, nn.Parameter] = {}
    for path, linear in model.adapted_linears():
        pair = linear.adapters[adapter]
        assert isinstance(pair, LoRAPair)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = pair.A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = pair.B
    return tensors


def adapter_config(config: Config, model: CausalLM) -> dict[str, Any]:
    """adapter_config.json as PEFT's LoraConfig reads it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": config.adapter.r,
        "lora_alpha": config.adapter.lora_alpha,
        "use_rslora": config.adapter.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.adapter.init == "gaussian" else True,
        "target_modules": _target_modules(model),
    }


def _target_modules(model: CausalLM) -> list[str]:
    """Last names, as PEFT's users write them, if they mean exactly the adapted linears; else whole paths."""
    adapted = sorted(path for path, _ in model.adapted_linears())
    linears = [hf_name(name) for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    short = sorted({path.rpartition(".")[2] for path in adapted})
    return short if sorted(select_targets(tuple(short), linears)) == adapted else adapted
