"""Fill a model's buffers: those in its state dict come from the checkpoint, transformers' own code makes the others.

transformers builds on the meta device too, so a model's initialization can make every buffer that no checkpoint holds
(rotary frequencies, Gemma's embedding scale). It runs on the CPU with fp32 as default dtype, as in from_pretrained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distlora.model.build import CausalLM


def keep_in_fp32(hf_model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give fp32 to what from_pretrained keeps in fp32 in a model of this dtype. For a model on the meta device."""
    from transformers.core_model_loading import build_glob_alternation

    if plan := hf_model._get_dtype_plan(dtype):
        pattern, *_ = build_glob_alternation(list(plan))
        for name, tensor in hf_model.state_dict(keep_vars=True).items():
            if pattern.search(name):
                tensor.data = tensor.data.float()


@torch.no_grad()
def made_buffers(hf_model: PreTrainedModel) -> dict[str, Tensor]:
    """Return on the CPU, by name, the buffers that no checkpoint holds. For transformers' model on the meta device.

    Raises UserError for a buffer that the model's own code does not fill: it would hold uninitialized memory.
    """
    stored, results = hf_model.state_dict(keep_vars=True), []
    for tensor in stored.values():
        tensor._is_hf_initialized = True  # The initialization skips them, which takes a fifth of the time.
    on_meta = {name: buffer for name, buffer in hf_model.named_buffers() if name not in stored}
    for content in (0, 1):  # From different contents, so that a buffer that is not filled differs.
        _set(hf_model, {name: torch.full_like(b, content, device="cpu") for name, b in on_meta.items()})
        for module in hf_model.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]
        hf_model.initialize_weights()
        results.append({name: hf_model.get_buffer(name) for name in on_meta})
    _set(hf_model, on_meta)
    for name, buffer in results[0].items():
        if not torch.equal(buffer, results[1][name]):
            raise UserError(
                f"{hf_model.config.model_type} has a buffer {name}, which transformers does not fill; "
                "set {model.path} to another model, and report this one"
            )
    return results[0]


def stored_buffers(model: CausalLM) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds, by Hugging Face name. They are the same on every rank."""
    # The weight of a head in low bits is an empty buffer.
    names = {model.hf_name(path): buffer for path, buffer in model.named_buffers() if path != "head.weight"}
    return {name: buffer for name, buffer in names.items() if name in model.layout.names}


def materialize_buffers(model: CausalLM, device: torch.device) -> None:
    """Put the buffers that no checkpoint holds on the device, after the model has been given memory."""
    made = {path: model.made_buffers.get(model.hf_name(path)) for path, _ in model.named_buffers()}
    _set(model, {path: buffer.to(device) for path, buffer in made.items() if buffer is not None})


def _set(model: torch.nn.Module, buffers: dict[str, Tensor]) -> None:
    for path, buffer in buffers.items():
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._buffers[name] = buffer
