"""Write a model's sizes and rotary embedding as GGUF metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. YaRN follows llama-context.cpp (llama-cpp-python
0.3.36): it multiplies cos and sin by (1 + 0.1 ln factor) and by rope.scaling.attn_factor, and overwrites
rope.scaling.yarn_attn_factor, where its own converter puts attention_factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType


def add_hyperparameters(writer: GGUFWriter, config: Any, say: Callable[[str], None]) -> None:
    """Add the metadata of a transformers config, which has defaults for what config.json leaves out."""
    head_dim = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config, say))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        _add_yarn(writer, config)


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return the tensor rope_freqs.weight, the divisors of the frequencies for Llama 3; else None."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    frequencies, _ = _frequencies(config)
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, head_size(config), 2) / head_size(config))
    return (plain / frequencies).astype(np.float32)


def _frequencies(config: Any) -> tuple[np.ndarray[Any, Any], float]:
    """Return transformers' frequencies and its factor of cos and sin."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    return frequencies.double().numpy(), scaling


def _add_yarn(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    factor = rope["factor"]
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    _, scaling = _frequencies(config)
    writer.add_rope_scaling_attn_factors(scaling / (1 + 0.1 * math.log(factor)))


def _context(config: Any, say: Callable[[str], None]) -> int:
    """Return the context length: at most a sliding window, as llama.cpp has no window for these families."""
    limit: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or window >= limit or (types is not None and "sliding_attention" not in types):
        return limit
    say(
        f"the model attends to a window of {window:,} tokens, and llama.cpp's {config.model_type} to all: they are the "
        f"same up to {window:,} tokens, which the file names as its context (of {limit:,})"
    )
    return int(window)
