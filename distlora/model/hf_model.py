"""Build transformers' own model of a config.json on the meta device, find the parts that distlora uses, fill buffers.

Buffers in a model's state dict come from the checkpoint. transformers' own initialization makes those that no
checkpoint holds (rotary frequencies, Gemma's embedding scale), on the CPU with fp32 as default dtype, as in
from_pretrained.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distlora.architecture.checkpoint_files import refused_by_transformers
from distlora.config import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from distlora.model.build import CausalLM


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
    """Return the path of the text decoder: the innermost model that holds the input embedding.

    Raises UserError if there is none.
    """
    from transformers import PreTrainedModel

    try:
        embedding = hf_model.get_input_embeddings()
    except NotImplementedError:
        embedding = None  # No module holds it.
    paths = [
        path
        for path, module in hf_model.named_modules()
        if path and isinstance(module, PreTrainedModel) and embedding in set(module.modules())
    ]
    if not paths:
        raise UserError(
            f"{hf_model.config.model_type} has no text decoder with an input embedding of its own; set {{model.path}} "
            "to another model"
        )
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


def with_globals(function: types.FunctionType, values: Mapping[str, Any]) -> types.FunctionType:
    """Return a copy of a function, decorated or not, for which names of its Python module mean `values`."""
    inner, closure = getattr(function, "__wrapped__", None), function.__closure__
    known, changed = {**function.__globals__, **values}, None
    if inner is not None:  # A decorator has the function that it wraps in its closure.
        known, changed = function.__globals__, with_globals(inner, values)
        closure = tuple(types.CellType(changed) if c.cell_contents is inner else c for c in closure or ())
    new = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    if changed is not None:
        new.__wrapped__ = changed  # type: ignore[attr-defined]
    return new


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
