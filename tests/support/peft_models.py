"""Adapters as PEFT writes them, and models with adapters: ours, and transformers' with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.spec import Architecture
from distlora.config.file import load_config
from distlora.loading.load_base import load_base
from distlora.loading.peft_format import adapter_tensors
from distlora.model.build import CausalLM
from distlora.model.hf_model import materialize_buffers
from distlora.post.trained import Name, Trained
from distlora.training.publish import publish_result
from support.family_models import config_for, load_ours, write_family_folder
from support.runs import SINGLE, build_run_model, parallelize_run


def our_trained_model(run_dir: Path) -> CausalLM:
    """Return the run's model with the adapter that it published."""
    config = load_config(run_dir)
    model = build_run_model(config)
    load_base(model, CheckpointFiles(config.model.path), parallelize_run(model, SINGLE, config))
    materialize_buffers(model, SINGLE.device)
    saved = safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(saved[name])
    return model


def adapted(tmp_path: Path, variant: str, **sections: dict[str, Any]) -> tuple[CausalLM, Trained]:
    """Return a model with an adapter that is not zero, and the adapter as a PEFT folder on its base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_family_folder(base, variant)
    model, backend = load_ours(base, **sections)
    config = config_for(base, **sections)
    publish_result(adapter, model, config.spec, None, backend)
    return model, Name(place=str(adapter), base=str(base), quant=config.quant.method).read()


def their_logits(folder: Path, input_ids: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    import transformers

    auto = getattr(transformers, architecture.auto_class)
    model = auto.from_pretrained(
        folder, dtype="auto", attn_implementation=architecture.attention, experts_implementation="eager"
    )
    with torch.no_grad():
        return model(input_ids).logits.float()


def write_adapter(
    folder: Path, base: Path, *, dtype: torch.dtype = torch.float32, seed: int = 1, std: float = 0.05, **fields: Any
) -> Path:
    """Save a LoRA or DoRA with PEFT for the Hugging Face model of a folder, with random B (of `std`) and magnitudes."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tuned.to(dtype).save_pretrained(folder)
    return folder
