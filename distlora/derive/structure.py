"""Read the structure of a model from transformers' module: paths, kinds of layers, and the shapes of their weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from distlora.architecture.spec import Architecture, ExpertLayout, LayerKind, Weight
from distlora.config import UserError
from distlora.derive.shrink import layer_kinds
from distlora.model.experts import find_experts, find_large_parameters
from distlora.model.hf_model import decoder_path, layers_path, path_in
from distlora.weights.conversion import disk_names_of, layout_of


def structure(hf_model: Any, *, auto_class: str, kinds: Mapping[str, LayerKind]) -> Architecture:
    """Return the architecture of a transformers model, on meta or with weights, but for what only running it tells.

    `kinds`: what is known of each kind of layer by its key; shapes, windows, heads and numbers of experts are read from
    this model. Of an unknown kind weights are linears, experts or dense, by their modules.
    """
    decoder_at = decoder_path(hf_model)
    decoder = hf_model.get_submodule(decoder_at)
    layers_at = layers_path(decoder)
    layers = decoder.get_submodule(layers_at)
    same = (path for path, module in decoder.named_modules() if type(module) is type(layers[0]))
    if other := next((path for path in same if not path.startswith(f"{layers_at}.")), ""):
        raise UserError(
            f"{hf_model.config.model_type} has decoder layers in several lists ({layers_at}, {other}), and distlora "
            "shards and runs one list; set {model.path} to another model"
        )
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if (owner := owners.setdefault(id(parameter), index)) != index:
                raise UserError(
                    f"{hf_model.config.model_type} has layers that share parameters (layers {owner} and {index}: "
                    f"{name}), and distlora shards and adapts each layer's own; set {{model.path}} to another model"
                )
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    config, layout = hf_model.config, layout_of(hf_model)
    # Layers of one kind may still differ in sizes (Gemma 3n's MLPs).
    sizes = [tuple((path, tuple(parameter.shape)) for path, parameter in layer.named_parameters()) for layer in layers]
    keys = list(zip(map(_key, layer_kinds(hf_model)), sizes, strict=True))
    order = list(dict.fromkeys(keys))
    derived = []
    for kind in order:
        index, key = keys.index(kind), kind[0]
        derived.append(_kind_of(layers[index], decoder.config, index, kinds.get(key, LayerKind(weights=(), key=key))))
    named = {id(parameter) for module in (layers, embedding) for parameter in module.parameters()}
    return Architecture(
        model_type=config.model_type,
        model_class=type(hf_model).__name__,
        auto_class=auto_class,
        text_config=next((k for k in config.sub_configs if getattr(config, k, None) is decoder.config), None),
        decoder=decoder_at,
        layers=layers_at,
        embedding=path_in(decoder, embedding),
        norm=None,
        head=path_in(hf_model, head),
        vocabulary=embedding.weight.shape[0],
        hidden=embedding.weight.shape[1],
        tied=head.weight is embedding.weight,
        kinds=tuple(derived),
        kind_of_layer=tuple(order.index(key) for key in keys),
        outside=tuple(
            Weight(f"{decoder_at}.{path}", tuple(parameter.shape))
            for path, parameter in decoder.named_parameters()
            if id(parameter) not in named
        ),
        buffers=tuple(_buffers(decoder)),
        looks_up=layout.zeroed_row is None,
        scored_by=scored_by(config, decoder_at),
        disk=disk_names_of(layout),
    )


def scored_by(config: Any, decoder: str) -> tuple[str, ...]:
    """Return `Architecture.scored_by` of a config whose decoder is at this path. Classes of their own do not count."""
    from transformers import modeling_layers
    from transformers.models.auto import modeling_auto

    generic: dict[str, Any] = {
        "SEQ_CLS": (
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            modeling_layers.GenericForSequenceClassification,
        ),
        "TOKEN_CLS": (
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
            modeling_layers.GenericForTokenClassification,
        ),
    }
    tasks = []
    for task, (mapping, base) in generic.items():
        made: Any = mapping.get(type(config), None)
        if made is not None and issubclass(made, base) and made.forward is base.forward:
            has_bias = task == "SEQ_CLS" or getattr(config, "token_classification_bias", True)
            tasks += [task] if made.base_model_prefix == decoder and has_bias else []
    return tuple(tasks)


def _key(kind: frozenset[tuple[str, str, object]]) -> str:
    return hashlib.sha256("\n".join(sorted(map(repr, kind))).encode()).hexdigest()[:16]


def _kind_of(layer: nn.Module, config: Any, index: int, known: LayerKind) -> LayerKind:
    shapes = {path: tuple(parameter.shape) for path, parameter in layer.named_parameters()}
    experts = expert_layout(layer, config)
    if not known.weights:
        modules = {f"{path}.weight" for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        fused = () if experts is None else experts.paths
        known = dataclasses.replace(
            known,
            experts=experts,
            weights=tuple(
                Weight(path, shape, "linear" if path in modules else "experts" if path in fused else "dense")
                for path, shape in shapes.items()
            ),
        )
    if other := next(iter({weight.path for weight in known.weights} ^ shapes.keys()), ""):
        raise UserError(
            f"{config.model_type} has the weight {other} in a layer and not in the small model that is checked for it "
            "(experts in a list?), so that the check says nothing about it; set {model.path} to another model"
        )
    if known.experts is not None and experts is not None:
        experts = dataclasses.replace(experts, router=known.experts.router)
    linears = [weight.path.removesuffix(".weight") for weight in known.weights if weight.kind == "linear"]
    large = set(find_large_parameters(layer, linears))
    return dataclasses.replace(
        known,
        weights=tuple(
            dataclasses.replace(
                weight,
                shape=_matrix_of(layer, weight, shapes[weight.path]),
                kind="fused" if weight.path in large else weight.kind,
            )
            for weight in known.weights
        ),
        experts=experts,
        window=_window(layer, config, index),
        heads=_heads(layer, config, known.weights),
    )


def _matrix_of(layer: nn.Module, weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight, that of experts as (experts, out, in)."""
    if weight.kind != "experts":
        return shape
    module: Any = layer.get_submodule(weight.path.rpartition(".")[0])
    return (shape[0], shape[2], shape[1]) if module.is_transposed else shape


def _buffers(decoder: nn.Module) -> Iterator[tuple[Literal["fp32", "dtype"], int]]:
    """Yield (dtype, number of elements) of the buffers of a decoder that was built in bf16."""
    sizes: Counter[Literal["fp32", "dtype"]] = Counter()
    for _, buffer in decoder.named_buffers():
        sizes["fp32" if buffer.dtype == torch.float32 else "dtype"] += buffer.numel()
    yield from sizes.items()


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
"""Names that the configs of transformers have for the number of experts that a token chooses."""


def expert_layout(layer: nn.Module, config: Any) -> ExpertLayout | None:
    """Return the names of the experts that transformers calls by its interface; None if the layer has none.

    Raises UserError for a layer with several such modules.
    """
    experts = find_experts(layer)
    if len(experts) > 1:
        raise UserError(
            f"{config.model_type} has layers with several mixtures of experts ({', '.join(experts)}), and distlora "
            "runs one; set {model.path} to another model"
        )
    for path, names in experts.items():
        chosen = next((n for name in _CHOSEN if isinstance(n := getattr(config, name, None), int)), 0)
        count = layer.get_parameter(f"{path}.{names[0]}").shape[0]
        return ExpertLayout(module=path, weights=names, num_experts=count, chosen=chosen)
    return None


def _window(layer: nn.Module, config: Any, index: int) -> int | None:
    """Return the tokens that softmax attention sees in a layer; None: all before it.

    Attention modules keep their window as `sliding_window`; others read it from the config, by the type of the layer.
    """
    for module in layer.modules():
        if "sliding_window" in vars(module):
            return module.sliding_window  # type: ignore[return-value]
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


_QUERIES = ("q_proj", "qkv_proj", "q_b_proj", "query_key_value", "Wqkv", "c_attn", "attn", "W_pack", "query")
"""Names that transformers' softmax attention has for the linear of its queries."""
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size")


def _heads(layer: nn.Module, config: Any, weights: Sequence[Weight]) -> tuple[int, int, int] | None:
    """Return query heads, key heads and columns of a head of a layer's softmax attention; None for unusual ones.

    With latent attention, whose keys and values differ in size, the columns are their mean. A linear reads the columns
    of all heads: attention's output. `weights`: those of the layer, whose roles tell other mixers from attention.
    """
    for path, module in layer.named_modules():
        mixes = any(weight.role == "mixer" and weight.path.startswith(f"{path}.") for weight in weights)
        if mixes or not any(hasattr(module, name) for name in _QUERIES):
            continue
        own = getattr(module, "config", config)  # Of a config whose layers differ, that of the layer.
        heads, size = _number(_NUM_HEADS, module, own), _number(_HEAD_SIZE, module)
        if heads is None:
            continue
        values = _number(("v_head_dim",), module)
        keys = _number(("qk_head_dim",), module) if values else size
        size = values or size
        read = {child.weight.shape[1] for child in module.children() if isinstance(child, nn.Linear)}
        if size is None or keys is None or heads * size not in read:
            continue
        groups = _number(("num_key_value_groups",), module)
        few = heads // groups if groups else _number(_NUM_KEY_HEADS, module, own)
        return heads, few or heads, (keys + size) // 2
    return None


def _number(names: Sequence[str], *owners: Any) -> int | None:
    """Return the first of some attributes that is a number."""
    # Not by getattr: where layers differ, a config raises (Gemma 4's head_dim). The modules have their own.
    values = (vars(owner).get(name) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int) and value), None)
