"""A tiny random model of every supported family and variant, and ours loaded from its folder.

Vocabulary 1001, hidden 96, three blocks, windows of 16 tokens in rows of more; norms, biases and caps are such that a
missing one is seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.spec import Architecture, architecture_of
from distlora.config import Config, check_settings
from distlora.config.file import build
from distlora.derive.prove import move_adapters_off_start
from distlora.derive.shrink import shrink
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import auto_class_of
from distlora.parallel import Backend, Ranks
from distlora.training.setup import start_run_model
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from support.model_types import config_of
from support.small_models import SHAPES, VOCABULARY

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
WINDOW = 16

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TOWERS = {
    "gemma4": _VISION
    | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
}
"""Vision towers of types whose class has none by default, as all checkpoints have."""
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(9)],
    "long_factor": [2.0 + i for i in range(9)],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA3 = _GEMMA | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": _GEMMA3_ROPES,
}
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 72}
# An expert's gate_up_proj (78 x 96 = 117 blocks) ends within a group, its down_proj (39 x 96) within a block.
_QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 39, "norm_topk_prob": True}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "truncate": False,
}

FolderOf = Callable[[str], Path]
"""From a variant's name to its folder: the fixture family_folder."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _UNTIED | {"num_key_value_heads": 4}),
    "llama3-tied": ("Llama", _TIED | {"rope_parameters": _LLAMA3}),
    "llama-biases": ("Llama", _UNTIED | {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("Llama", _UNTIED | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic": (
        "Llama",
        _UNTIED | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral-window": ("Mistral", _UNTIED | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", _UNTIED),
    "qwen2-tied-window": (
        "Qwen2",
        _TIED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _UNTIED),
    "gemma2": ("Gemma2", _TIED | _GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma2-untied": ("Gemma2", _UNTIED | _GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3-text": ("Gemma3", _TIED | _GEMMA3 | {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", _TIED | _GEMMA3),
    "gemma3-untied": ("Gemma3", _UNTIED | _GEMMA3),
    "phi3": ("Phi3", _UNTIED | {"sliding_window": WINDOW}),
    "phi3-longrope-tied": ("Phi3", _TIED | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128}),
    "mixtral": ("Mixtral", _UNTIED | _EXPERTS | {"sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3Moe", _TIED | _QWEN_EXPERTS),
    "gpt-oss": ("GptOss", _UNTIED | _EXPERTS | {"sliding_window": WINDOW, "rope_parameters": _YARN}),
}
"""name -> (transformers' class name without its ending, settings); Gemma 3 with "text" is the text model alone."""


def hf_config(name: str) -> Any:
    """Return the transformers config of a variant, or of a small model of any type in model_types.py."""
    import transformers

    if name not in VARIANTS:
        values = shrink(config_of(name.removesuffix(" with its tower")))
        if name.endswith(" with its tower"):
            values["vision_config"] = _TOWERS[name.split()[0]]
        text = values.get("text_config", values)
        text |= {key: VOCABULARY for key in text if re.fullmatch("vocab_size(_per_layer_input)?", key)}
        return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    stem, settings = VARIANTS[name]
    values = SHAPES | settings
    if stem == "Gemma3" and "text" not in name:
        tie = {"tie_word_embeddings": values["tie_word_embeddings"]}
        return transformers.Gemma3Config(text_config=values, vision_config=_VISION, mm_tokens_per_image=4, **tie)
    # Not every class takes head_dim as a field, but all read it.
    return getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")(**values)


def architecture(name: str) -> Architecture:
    """Return the architecture of a variant."""
    return architecture_of(hf_config(name).to_dict(), name)


def hf_model(name: str, **settings: Any) -> Any:
    """Build a random transformers model of a variant, in fp32, every 1-D parameter moved off its start.

    `settings` change the config of its text model.
    """
    import transformers

    config = hf_config(name)
    if settings:
        values = config.to_dict()
        values.get("text_config", values).update(settings)
        config = type(config).from_dict(values)
    torch.manual_seed(0)
    model: Any = getattr(transformers, auto_class_of(config, name)).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(parameter * (1 + 0.2 * torch.randn_like(parameter)) + 0.1 * torch.randn_like(parameter))
    return model.eval()


def write_family_folder(folder: Path, name: str, **settings: Any) -> None:
    """Write a variant as save_pretrained does."""
    hf_model(name, **settings).save_pretrained(folder)


def config_for(folder: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": 64},
        "adapter": {"target_modules": "all-linear", "r": 4},
        "quant": {"cache": False},
        "train": {"dtype": "fp32"},
        "run_dir": "none",
    }
    config = build(Config, base | sections)
    check_settings(config)
    return config


def load_ours(folder: Path, ranks: Ranks = SINGLE, **sections: dict[str, Any]) -> tuple[CausalLM, Backend]:
    """Our model from a folder, with adapters whose B is not zero."""
    model, backend, _ = start_run_model(config_for(folder, **sections), ranks)
    move_adapters_off_start(model)
    return model, backend


@torch.no_grad()
def dequantized(folder: Path, ours: CausalLM, dtype: torch.dtype = torch.float32) -> Any:
    """Build the Hugging Face model of the folder with our weights, dequantized, in its decoder's linears."""
    import transformers

    theirs = getattr(transformers, ours.architecture.auto_class).from_pretrained(
        folder, dtype=dtype, attn_implementation=ours.architecture.attention, experts_implementation="eager"
    )
    for name, module in ours.named_modules():
        if isinstance(module, FrozenTensor):
            weight = module.frozen_weight.dense(dtype)
            theirs.get_parameter(ours.hf_name(f"{name}.weight")).copy_(weight)
    return theirs


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions_of(input_ids: Tensor) -> Tensor:
    """Return positions of rows that are one document each."""
    return torch.arange(input_ids.shape[1]).expand_as(input_ids)


def our_logits(model: CausalLM, input_ids: Tensor) -> Tensor:
    hidden = model.hidden_states(input_ids, positions_of(input_ids)).flatten(0, 1)
    return model.head.logits(hidden).view(*input_ids.shape, -1).detach()


def edit_config(folder: Path, **values: Any) -> None:
    """Set entries of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def shifted(input_ids: Tensor) -> Tensor:
    """Labels of plain text: the next token, nothing at the end."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)


def save_adapter(folder: Path, model: CausalLM, base: Path) -> None:
    """RUN/adapter of a finished run, without the run."""
    folder.mkdir()
    config = config_for(base, adapter={"target_modules": "all-linear", "r": 4})
    (folder / CONFIG_NAME).write_text(json.dumps(adapter_config(config.spec, model)))
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_tensors(model).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)


def three_steps(
    ranks: Ranks, *, folder: Path, router_aux_loss: float | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Three AdamW steps on six rows, cut over the ranks; checkpointed, blocks gathered once for all micro-batches."""
    train = {"dtype": "fp32", "checkpointing": "block", "router_aux_loss": router_aux_loss}
    model, backend = load_ours(folder, ranks, train=train)
    parameters = adapter_parameters(model)
    backend.reduce_gradients_of(list(parameters.values()), 4.0)
    # eps as in the parity tests: 1e-8 would turn the rounding of a gradient near zero into a step of full size.
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, eps=1e-5, weight_decay=0.0)
    rows = tokens(6, 48)
    positions = torch.cat([torch.arange(31), torch.arange(17)]).expand_as(rows)
    own = slice(ranks.rank * (6 // ranks.world), (ranks.rank + 1) * (6 // ranks.world))
    model.set_num_micro(6 // ranks.world)
    losses = []
    for _ in range(3):
        loss = model(rows[own], positions[own], shifted(rows)[own]).sum() / (6 * 47)
        backend.backward(loss, last=True)
        backend.finish_gradients()
        losses.append(float(backend.sum_over_ranks(loss.detach().clone())))
        optimizer.step()
        backend.zero_gradients()
    return losses, {name: parameter.detach().clone() for name, parameter in parameters.items()}
