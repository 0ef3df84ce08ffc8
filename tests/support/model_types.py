"""All text decoders of the installed transformers, and a full-size config of each for the tests of any model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ENCODERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "reformer"),
}
"""Bidirectional encoders that `is_decoder` turns into decoders; no checkpoint of one is fine-tuned to write text."""
ENCODER_DECODERS = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "trocr", "whisper"),
}
"""Decoders that attend to an encoder."""
NOT_TEXT = {
    *("musicgen", "musicgen_melody", "moshi", "git", "fuyu", "emu3", "got_ocr2", "mllama", "phi4_multimodal"),
    *("moss_transcribe_diarize", "blt", "gemma4_assistant", "gemma4_unified_assistant"),
}
"""Audio, images and bytes in patches, and drafts of another model from its hidden states."""

COMPOSITES = ["mistral3", "mistral4", "mistral_large4", "kimi_k25", "glm5_next", "qwen3_vl"]
"""Outside the causal mapping: models of images and text whose text decoder is trained."""
COMPOSITES = [name for name in COMPOSITES if name in CONFIG_MAPPING]
UNBUILDABLE = {
    "dory": "config.json counts each of its layers as two",
    "gemma3n": "its vision tower needs timm; its text decoder is gemma3n_text",
}
"""Text decoders that `shrink` refuses, with the reason."""
CAUSAL = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in ENCODERS | ENCODER_DECODERS | NOT_TEXT]

MODELS_PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def on_page(names: Iterable[str]) -> list[str]:
    """Return the types that docs/models.md has a row for: not those that came with a newer transformers.

    A release of transformers fails no test by its new types alone. tests/tools/conformance_page.py adds their rows.
    """
    return [name for name in names if f"| `{name}` |" in MODELS_PAGE]


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_WINDOWS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4096}
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
_NGRAMS = {"eos_token_id": 1, "ple_layer_ids": [1], "ple_embed_dim": 2048, "ngram_vocab_size_base": 200000}

# Settings that every checkpoint of the type has and that the defaults of its class leave out, or cannot build without.
_MISSING: dict[str, dict[str, Any]] = {
    "cohere_compass_text": _ROPES,
    "laguna": _ROPES,
    "mellum": _ROPES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 2048, "ffn_hidden_size": 3584, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 4},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "minimax_m3_vl_text": {"num_hidden_layers": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "zaya": {"num_experts_per_tok": 1},
}
# Settings of checkpoints that the defaults of a type leave off.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4_text@shared": {"num_kv_shared_layers": 10},
    "gemma4_unified_text@shared": {"num_kv_shared_layers": 10},
    "gemma4_text@moe": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
    },
    "qwen2@windows": {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": 4096},
    "qwen3@windows": {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": 4096},
    "exaone4@windows": _WINDOWS,
    "mixtral@window": {"sliding_window": 4096},
    "granite@scaled": {
        "logits_scaling": 8.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "granitemoehybrid@dense": {"num_local_experts": 0},
    "falcon_h1@scaled": {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.7},
    "llama4_text@dense+moe": {"interleave_moe_layer_step": 2, "moe_layers": list(range(1, 48, 2))},
    "qwen4_exp_text@ngrams": _INDEXER | _NGRAMS,
    "phi3@longrope": {
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]},
    },
    "qwen3_5_text@raw": {"layer_types": None, "full_attention_interval": 4},
}
VARIANTS = {name: settings for name, settings in VARIANTS.items() if name.partition("@")[0] in CONFIG_MAPPING}


def config_of(name: str) -> dict[str, Any]:
    """Return a config.json at the size of the class defaults, of a model type or of a variant (`type@variant`)."""
    model_type = name.partition("@")[0]
    changes = _MISSING.get(model_type, {}) | VARIANTS.get(name, {})
    return {"model_type": model_type} | copy.deepcopy(changes)
