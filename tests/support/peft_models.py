"""Our trained model in PEFT."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config.file import load_config
from distlora.loading.load_base import load_base
from distlora.loading.peft_format import adapter_tensors
from distlora.model.buffers import materialize_buffers
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from support.run_models import build_run_model, parallelize_run

SINGLE = Ranks(0, 1, torch.device("cpu"), None)


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
