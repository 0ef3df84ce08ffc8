"""Decode through all layers in one compiled call, for layers of Llama's form in bf16 on a CPU.

Which models have that form is read from the code of their classes: layers, attention and decoder run the statements of
Llama's, Qwen2's or Qwen3's. Others run module by module, as do prompts. The roundings are those of a compiled run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlora.derive.fusible import code_of
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.fused_modules import FusedRMSNorm, GatedMLP, why_not_compiled
from distlora.model.paged_cache import BLOCK, CacheStep, PagedCache
from distlora_kernels import decode
from distlora_kernels.decode import (
    HEAD_COLUMNS,
    AdapterPair,
    DecodedLayer,
    DecodedLinear,
    Kept,
    Norm,
    Sizes,
    pack,
    product,
)
from distlora_kernels.lora_native import COLUMNS
from distlora_kernels.operands import FrozenWeight

_LIKE = ("llama", "qwen2", "qwen3")
"""Families of transformers whose forwards are Llama's: biases, norms of heads and windows are attributes."""
_PARTS = ("DecoderLayer", "Attention", "Model", "MLP", "RMSNorm")
_ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True, "gelu_new": True}
"""True for the tanh approximation of GELU."""


@functools.cache
def _forwards(part: str) -> frozenset[str]:
    """Return the code of forward of a part in each of the families."""
    modules = [(name, importlib.import_module(f"transformers.models.{name}.modeling_{name}")) for name in _LIKE]
    return frozenset(code_of(getattr(module, f"{name.capitalize()}{part}").forward) for name, module in modules)


def fits(model: CausalLM) -> bool:
    """Return whether `CompiledStep` computes this model's layers on this node. Compiles the library if nothing has."""
    decoder: Any = model.decoder
    embedding: Any = model.embedding
    layers: list[Any] = [block.inner for block in model.blocks]
    # FSDP2 replaces the class of a module, and keeps its forward.
    looks_up = isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward
    in_bf16 = looks_up and embedding.weight.dtype == torch.bfloat16 and model.compute_dtype is None
    if not in_bf16 or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        return False
    parts = {"Model": decoder, "DecoderLayer": layers[0], "Attention": layers[0].self_attn}
    if any(code_of(type(module).forward) not in _forwards(name) for name, module in parts.items()):
        return False
    kinds = {(type(layer), type(layer.self_attn)) for layer in layers}
    dora = any(getattr(module, "row_norms_squared", None) is not None for module in model.modules())
    modules = [(layer.mlp, layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
    if (
        len(kinds) > 1
        or dora
        or decoder.config.hidden_act not in _ACTIVATIONS
        or layers[0].self_attn.head_dim % HEAD_COLUMNS
    ):
        return False
    for mlp, *norms in modules:
        if type(mlp) is not GatedMLP and code_of(type(mlp).forward) not in _forwards("MLP"):
            return False
        if any(type(n) is not FusedRMSNorm and code_of(type(n).forward) not in _forwards("RMSNorm") for n in norms):
            return False
    covered = all(linear.is_covered for layer in layers for group in _linears(layer) for linear in group)
    return covered and why_not_compiled() is None and decode.available()


def _linears(layer: Any, slots: Collection[int] | None = None) -> list[list[DecodedLinear]]:
    """Return the linears of each input, with the adapters of these slots; None: with all."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]
    return [[_linear(linear, slots) for linear in group] for group in groups]


def _linear(linear: FrozenLinear, slots: Collection[int] | None) -> DecodedLinear:
    pairs = linear.pairs if isinstance(linear, AdaptedLinear) else []
    used = [pair for pair in pairs if slots is None or pair.slot in slots]
    adapters = [AdapterPair(pair.slot, pair.A, pair.B, pair.scaling) for pair in used]
    return DecodedLinear(linear.frozen_weight, linear.bias, adapters)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, float(norm.eps if type(norm) is FusedRMSNorm else norm.variance_epsilon))


class CompiledStep:
    """All layers of a model that `fits`, with its weights as panels."""

    def __init__(self, model: CausalLM, cache: PagedCache, slots: Collection[int] | None) -> None:
        """Pack the weights, and the adapters of these slots; None: rows do not choose, and each linear has one at most.

        `cache` has had its first forward.
        """
        self._model, self._cache, self._slots = model, cache, slots
        layers: list[Any] = [block.inner for block in model.blocks]
        attention, decoder = layers[0].self_attn, model.decoder
        heads = attention.q_proj.out_features // attention.head_dim
        key_heads = attention.k_proj.out_features // attention.head_dim
        gelu = _ACTIVATIONS[decoder.config.hidden_act]  # type: ignore[index, union-attr]
        sizes = Sizes(heads, key_heads, attention.head_dim, BLOCK, gelu)
        head = model.head
        whole = (
            head.takes_cross_entropy
            and not head.adapters
            and head.kept is None
            and head.bias is None
            and head.weight.shape[0] % COLUMNS == 0
        )
        self._head = pack(FrozenWeight((head.weight.detach(),), tuple(head.weight.shape))) if whole else None
        """Panels of an LM head whose product alone gives the logits."""
        self._kept = Kept([self._layer(layer) for layer in layers], sizes, by_rows=slots is not None)

    def _layer(self, layer: Any) -> DecodedLayer:
        attention = layer.self_attn
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        of_heads = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        first, second, query, key = (None if n is None else _norm(n) for n in (*norms, *of_heads))
        assert first is not None
        assert second is not None
        return DecodedLayer(
            norms=(first, second, query, key),
            inputs=tuple(_linears(layer, self._slots)),
            cache=self._cache.layer(attention.layer_idx),
            scale=attention.scaling,
            window=getattr(attention, "sliding_window", None),
        )

    def __call__(self, ids: Tensor, positions: Tensor, step: CacheStep, slots: Tensor | None) -> Tensor:
        """Return the logits (N, vocabulary) fp32 after one token of each row, (N, 1). `slots` (N,): their adapters."""
        assert step.tables is not None
        assert step.lengths is not None
        decoder: Any = self._model.decoder
        embedded = F.embedding(ids[:, 0], self._model.embedding.weight)  # type: ignore[arg-type]
        cosines, sines = decoder.rotary_emb(embedded[:, None], position_ids=positions)
        rotary = cosines[:, 0].to(embedded.dtype), sines[:, 0].to(embedded.dtype)
        hidden = self._kept.decode(embedded, rotary, step.places, step.tables, step.lengths, slots)
        hidden = decoder.norm(hidden)
        if self._head is not None:
            return product(hidden, self._head).float()
        self._model.head.rows = slots
        return self._model.head.adapted_logits(hidden)
