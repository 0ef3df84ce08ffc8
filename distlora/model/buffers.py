"""Buffers that no checkpoint fills: computed from the config once a model has memory."""

from __future__ import annotations

import torch
from torch import Tensor

from distlora.config import UserError
from distlora.model.build import CausalLM


def materialize_buffers(model: CausalLM, device: torch.device) -> None:
    """Compute what the meta skeleton could not hold: the rotary embedding's frequencies and Gemma's embedding scale,
    from the config.

    Raises UserError for any other buffer that no checkpoint fills: it would hold whatever the memory held.
    """
    for name, _ in model.named_buffers():
        if not (name.endswith((".offset", ".embed_scale", ".row_norms_squared")) or ".rotary_emb." in name):
            raise UserError(
                f"{model.hf_config.model_type} has a buffer {name}, which distlora does not know how to fill; "
                "set {model.path} to another model, and report this one"
            )
    config = model.decoder.config
    for name, module in list(model.decoder.named_modules()):
        if name.rpartition(".")[2] == "rotary_emb":
            model.decoder.set_submodule(name, type(module)(config=config).to(device))
        if isinstance(scale := getattr(module, "embed_scale", None), Tensor):
            # In the buffer's dtype: transformers rounds the scale to bf16 in a bf16 model too.
            scale.fill_(module.scalar_embed_scale)
