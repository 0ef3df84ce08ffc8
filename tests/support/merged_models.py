"""Models with adapters, and their logits in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distlora.architecture.spec import Architecture
from distlora.model.build import CausalLM
from distlora.post.trained import Name, Trained
from distlora.training.publish import publish_result
from support.family_models import config_for, load_ours, write_family_folder


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
