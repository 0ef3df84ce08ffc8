"""Models written in low bits."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from support.low_bit_checkpoints import Checkpoint


def write(folder: Path, made: Checkpoint) -> CheckpointFiles:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(made[0], folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": made[1]}))
    return CheckpointFiles(folder)
