"""Build transformers' own model of a config.json on the meta device, and find the parts of it that distlora uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from distlora.architecture.checkpoint_files import refused_by_transformers
from distlora.config import UserError
from distlora.model.buffers import keep_in_fp32

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def auto_class_of(hf_config: PretrainedConfig, place: Path | str) -> str:
    """Return the name of the Auto class that makes the whole model of a config, its vision tower included.

    Raises UserError if transformers has no class that generates text for it.
    """
    from transformers.models.auto import modeling_auto

    kind = type(hf_config)
    causal: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    # AutoModelForCausalLM may make the text model of a composite config alone, whose adapters would have other names.
    if kind in causal and causal[kind].config_class is kind:
        return "AutoModelForCausalLM"
    if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "AutoModelForImageTextToText"
    if kind in causal:
        return "AutoModelForCausalLM"
    raise UserError(
        f"{place}: transformers has no class that generates text for model_type={hf_config.model_type!r}; set "
        "{model.path} to a causal language model"
    )


def transformers_model(
    hf_config: PretrainedConfig,
    place: Path | str,
    *,
    auto_class: str,
    attention: str,
    dtype: torch.dtype,
    device: str = "meta",
) -> Any:
    """Return transformers' own model with random weights, in eval mode. `place` is the config.json, for messages.

    Raises UserError if transformers refuses the config.
    """
    import transformers

    auto: Any = getattr(transformers, auto_class)
    with torch.device(device), refused_by_transformers(place):
        # A copy, because from_config writes the dtype into the config that it is given.
        hf_model: Any = auto.from_config(
            copy.deepcopy(hf_config),
            dtype=dtype,
            attn_implementation="eager" if hf_config.sub_configs else attention,
            experts_implementation="eager",  # Replaced by `Experts`.
            trust_remote_code=False,
        )
    if hf_config.sub_configs:  # The decoder's alone: a tower beside it may have no other.
        hf_model.get_submodule(decoder_path(hf_model)).set_attn_implementation(attention)
    keep_in_fp32(hf_model, dtype)
    # No module may draw from torch's generators (attention_dropout): recomputation and a resume would draw differently.
    hf_model.eval()
    return hf_model


def decoder_path(hf_model: Any) -> str:
    """Return the path of the text decoder: the innermost model that holds the input embedding."""
    from transformers import PreTrainedModel

    embedding = hf_model.get_input_embeddings()
    paths = [
        path
        for path, module in hf_model.named_modules()
        if path and isinstance(module, PreTrainedModel) and embedding in set(module.modules())
    ]
    return max(paths, key=lambda path: path.count("."))


def path_in(parent: nn.Module, module: nn.Module) -> str:
    """Return the path of a module in another that contains it."""
    return next(path for path, each in parent.named_modules() if each is module)


def layers_path(decoder: Any) -> str:
    """Return the path in a decoder of the list of its layers: its outermost list with most parameters.

    Raises UserError if there is none.
    """
    lists = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)]
    if not outermost:
        raise UserError(
            f"{decoder.config.model_type} has no list of decoder layers, so they cannot be sharded one by one; set "
            "{model.path} to another model"
        )
    return max(outermost, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))


class Call(NamedTuple):
    """One call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def calls_of(modules: Iterable[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Return the calls of modules within `run()`, in the order in which they end."""
    calls: list[Call] = []
    hooks = [
        module.register_forward_hook(lambda *call: calls.append(Call(*call)), with_kwargs=True) for module in modules
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
