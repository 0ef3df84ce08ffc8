"""Adapters written as PEFT writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def write_adapter(folder: Path, base: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Save a LoRA or DoRA with PEFT, with random B and magnitudes, for the Hugging Face model of a folder."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tuned.to(dtype).save_pretrained(folder)
    return folder
