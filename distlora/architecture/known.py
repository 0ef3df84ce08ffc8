"""List the sizes of well-known models as in their config.json on the hub, to plan a run by name. Imports no torch.

Only what sizes depend on is here, and what limits the length of a row: no other rotary settings, no token ids.
tests/test_architectures.py holds the parameters that follow from them to the counts that the hub shows, one for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.config.errors import nearest

Settings = dict[str, Any]

MXFP4_NAMES = {"openai/gpt-oss-20b": "unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-120b": "unsloth/gpt-oss-120b-BF16"}
"""What is on the hub in MXFP4, which is not read (distlora/architecture/families.py), and a copy in bf16 of each."""


def _decoder(
    model_type: str, hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, positions: int
) -> Settings:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, positions: int = 2048) -> Settings:
    """LLaMA and Llama 2, whose 70B has 8 heads of keys."""
    return _decoder("llama", hidden, inner, layers, heads, heads, 32_000, positions)


def _llama3(hidden: int, inner: int, layers: int, heads: int, positions: int = 131_072) -> Settings:
    return _decoder("llama", hidden, inner, layers, heads, 8, 128_256, positions)


def _qwen(model_type: str, hidden: int, inner: int, layers: int, heads: int, key_heads: int, **rest: Any) -> Settings:
    """Qwen2.5 and Qwen3, whose larger Qwen2.5 pad the vocabulary further."""
    positions = 32_768 if model_type == "qwen2" else 40_960
    return _decoder(model_type, hidden, inner, layers, heads, key_heads, 151_936, positions) | rest


def _qwen3_moe(hidden: int, inner: int, expert: int, layers: int, heads: int) -> Settings:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert}
    return _qwen("qwen3_moe", hidden, inner, layers, heads, 4, head_dim=128, decoder_sparse_step=1) | experts


def _gemma3(hidden: int, inner: int, layers: int, heads: int, key_heads: int, head_size: int, window: int) -> Settings:
    """Return the text model of a Gemma 3; one layer in six sees all tokens."""
    kinds = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)]
    settings = _decoder("gemma3_text", hidden, inner, layers, heads, key_heads, 262_144, 131_072)
    return settings | {
        "head_dim": head_size,
        "tie_word_embeddings": True,
        "layer_types": kinds,
        "sliding_window": window,
    }


def _with_vision(text: Settings) -> Settings:
    """Return a Gemma 3 with a vision tower beside its text model, and rows for images in its vocabulary."""
    return {"model_type": "gemma3", "text_config": text | {"vocab_size": 262_208}}


def _gpt_oss(layers: int, experts: int) -> Settings:
    settings = _decoder("gpt_oss", 2880, 2880, layers, 64, 8, 201_088, 131_072)
    return settings | {
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],
    }


_LLAMA3_8B, _LLAMA3_70B = (4096, 14_336, 32, 32), (8192, 28_672, 80, 64)
_TIED = {"tie_word_embeddings": True}
_PADDED = {"vocab_size": 152_064}

_KNOWN: tuple[tuple[Settings, str], ...] = (
    (_llama(4096, 11_008, 32, 32), "huggyllama/llama-7b"),
    (_llama(5120, 13_824, 40, 40), "huggyllama/llama-13b"),
    (_llama(6656, 17_920, 60, 52), "huggyllama/llama-30b"),
    (_llama(8192, 22_016, 80, 64), "huggyllama/llama-65b"),
    (
        _llama(4096, 11_008, 32, 32, 4096),
        "NousResearch/Llama-2-7b-hf NousResearch/Llama-2-7b-chat-hf meta-llama/Llama-2-7b-hf "
        "meta-llama/Llama-2-7b-chat-hf",
    ),
    (
        _llama(5120, 13_824, 40, 40, 4096),
        "NousResearch/Llama-2-13b-hf NousResearch/Llama-2-13b-chat-hf meta-llama/Llama-2-13b-hf "
        "meta-llama/Llama-2-13b-chat-hf",
    ),
    (
        _llama(8192, 28_672, 80, 64, 4096) | {"num_key_value_heads": 8},
        "NousResearch/Llama-2-70b-hf NousResearch/Llama-2-70b-chat-hf meta-llama/Llama-2-70b-hf "
        "meta-llama/Llama-2-70b-chat-hf",
    ),
    (
        _llama3(*_LLAMA3_8B, 8192),
        "NousResearch/Meta-Llama-3-8B NousResearch/Meta-Llama-3-8B-Instruct meta-llama/Meta-Llama-3-8B "
        "meta-llama/Meta-Llama-3-8B-Instruct",
    ),
    (
        _llama3(*_LLAMA3_70B, 8192),
        "NousResearch/Meta-Llama-3-70B NousResearch/Meta-Llama-3-70B-Instruct meta-llama/Meta-Llama-3-70B "
        "meta-llama/Meta-Llama-3-70B-Instruct",
    ),
    (
        _llama3(*_LLAMA3_8B),
        "NousResearch/Meta-Llama-3.1-8B NousResearch/Meta-Llama-3.1-8B-Instruct meta-llama/Llama-3.1-8B "
        "meta-llama/Llama-3.1-8B-Instruct meta-llama/Meta-Llama-3.1-8B meta-llama/Meta-Llama-3.1-8B-Instruct",
    ),
    (
        _llama3(*_LLAMA3_70B),
        "unsloth/Llama-3.3-70B-Instruct meta-llama/Llama-3.3-70B-Instruct meta-llama/Llama-3.1-70B "
        "meta-llama/Llama-3.1-70B-Instruct meta-llama/Meta-Llama-3.1-70B meta-llama/Meta-Llama-3.1-70B-Instruct",
    ),
    (
        _llama3(16_384, 53_248, 126, 128),
        "meta-llama/Llama-3.1-405B meta-llama/Llama-3.1-405B-Instruct meta-llama/Meta-Llama-3.1-405B "
        "meta-llama/Meta-Llama-3.1-405B-Instruct",
    ),
    (
        _llama3(2048, 8192, 16, 32) | _TIED | {"head_dim": 64},
        "unsloth/Llama-3.2-1B unsloth/Llama-3.2-1B-Instruct meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct",
    ),
    (
        _llama3(3072, 8192, 28, 24) | _TIED | {"head_dim": 128},
        "unsloth/Llama-3.2-3B unsloth/Llama-3.2-3B-Instruct meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct",
    ),
    (_qwen("qwen2", 896, 4864, 24, 14, 2, **_TIED), "Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct"),
    (_qwen("qwen2", 1536, 8960, 28, 12, 2, **_TIED), "Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-1.5B-Instruct"),
    (_qwen("qwen2", 2048, 11_008, 36, 16, 2, **_TIED), "Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct"),
    (_qwen("qwen2", 3584, 18_944, 28, 28, 4, **_PADDED), "Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct"),
    (_qwen("qwen2", 5120, 13_824, 48, 40, 8, **_PADDED), "Qwen/Qwen2.5-14B Qwen/Qwen2.5-14B-Instruct"),
    (_qwen("qwen2", 5120, 27_648, 64, 40, 8, **_PADDED), "Qwen/Qwen2.5-32B Qwen/Qwen2.5-32B-Instruct"),
    (_qwen("qwen2", 8192, 29_568, 80, 64, 8, **_PADDED), "Qwen/Qwen2.5-72B Qwen/Qwen2.5-72B-Instruct"),
    (_qwen("qwen3", 1024, 3072, 28, 16, 8, head_dim=128, **_TIED), "Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B-Base"),
    (_qwen("qwen3", 2048, 6144, 28, 16, 8, head_dim=128, **_TIED), "Qwen/Qwen3-1.7B Qwen/Qwen3-1.7B-Base"),
    (_qwen("qwen3", 2560, 9728, 36, 32, 8, head_dim=128, **_TIED), "Qwen/Qwen3-4B Qwen/Qwen3-4B-Base"),
    (_qwen("qwen3", 4096, 12_288, 36, 32, 8, head_dim=128), "Qwen/Qwen3-8B Qwen/Qwen3-8B-Base"),
    (_qwen("qwen3", 5120, 17_408, 40, 40, 8, head_dim=128), "Qwen/Qwen3-14B Qwen/Qwen3-14B-Base"),
    (_qwen("qwen3", 5120, 25_600, 64, 64, 8, head_dim=128), "Qwen/Qwen3-32B"),
    (_qwen3_moe(2048, 6144, 768, 48, 32), "Qwen/Qwen3-30B-A3B Qwen/Qwen3-30B-A3B-Base"),
    (_qwen3_moe(4096, 12_288, 1536, 94, 64), "Qwen/Qwen3-235B-A22B"),
    (
        _decoder("mistral", 4096, 14_336, 32, 32, 8, 32_000, 32_768) | {"sliding_window": 4096},
        "mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1",
    ),
    (
        _decoder("mistral", 4096, 14_336, 32, 32, 8, 32_768, 32_768) | {"sliding_window": None},
        "unsloth/mistral-7b-v0.3 unsloth/mistral-7b-instruct-v0.3 mistralai/Mistral-7B-v0.3 "
        "mistralai/Mistral-7B-Instruct-v0.3",
    ),
    (
        _decoder("mistral", 5120, 14_336, 40, 32, 8, 131_072, 131_072) | {"head_dim": 128, "sliding_window": None},
        "unsloth/Mistral-Nemo-Base-2407 unsloth/Mistral-Nemo-Instruct-2407 mistralai/Mistral-Nemo-Base-2407 "
        "mistralai/Mistral-Nemo-Instruct-2407",
    ),
    (
        _decoder("mistral", 5120, 32_768, 40, 32, 8, 131_072, 32_768) | {"head_dim": 128, "sliding_window": None},
        "mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501 "
        "unsloth/Mistral-Small-24B-Base-2501 unsloth/Mistral-Small-24B-Instruct-2501",
    ),
    (
        _decoder("mixtral", 4096, 14_336, 32, 32, 8, 32_000, 32_768)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        "mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1",
    ),
    (
        _decoder("mixtral", 6144, 16_384, 56, 48, 8, 32_000, 65_536)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        "mistralai/Mixtral-8x22B-v0.1",
    ),
    (
        _decoder("mixtral", 6144, 16_384, 56, 48, 8, 32_768, 65_536)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
    ),
    (
        _gemma3(1152, 6912, 26, 4, 1, 256, 512) | {"max_position_embeddings": 32_768},
        "unsloth/gemma-3-1b-pt unsloth/gemma-3-1b-it google/gemma-3-1b-pt google/gemma-3-1b-it",
    ),
    (
        _with_vision(_gemma3(2560, 10_240, 34, 8, 4, 256, 1024)),
        "unsloth/gemma-3-4b-pt unsloth/gemma-3-4b-it google/gemma-3-4b-pt google/gemma-3-4b-it",
    ),
    (
        _with_vision(_gemma3(3840, 15_360, 48, 16, 8, 256, 1024)),
        "unsloth/gemma-3-12b-pt unsloth/gemma-3-12b-it google/gemma-3-12b-pt google/gemma-3-12b-it",
    ),
    (
        _with_vision(_gemma3(5376, 21_504, 62, 32, 16, 128, 1024)),
        "unsloth/gemma-3-27b-pt unsloth/gemma-3-27b-it google/gemma-3-27b-pt google/gemma-3-27b-it",
    ),
    (_decoder("phi3", 5120, 17_920, 40, 40, 10, 100_352, 16_384), "microsoft/phi-4"),
    (
        _decoder("phi3", 3072, 8192, 32, 24, 8, 200_064, 131_072)
        | _TIED
        | {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096},
        "microsoft/Phi-4-mini-instruct",
    ),
    (_gpt_oss(24, 32), "unsloth/gpt-oss-20b-BF16 openai/gpt-oss-20b"),
    (_gpt_oss(36, 128), "unsloth/gpt-oss-120b-BF16 openai/gpt-oss-120b"),
)
"""Sizes, and the names on the hub that have them: an open copy first where the original is gated."""

ARCHITECTURES: dict[str, Settings] = {name: settings for settings, names in _KNOWN for name in names.split()}
"""config.json's sizes by a model's name on the hub."""


def architecture_named(name: str) -> Mapping[str, Any] | None:
    """Return the sizes of a model by its name on the hub, in any case; None if it is not built in."""
    return {known.lower(): settings for known, settings in ARCHITECTURES.items()}.get(name.lower())


def nearest_architecture(name: str) -> str:
    """Return ` (did you mean ...?)` for a name that resembles one of a built-in model, else an empty string."""
    return nearest(name, ARCHITECTURES, cutoff=0.87)
