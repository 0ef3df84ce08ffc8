"""The paths of a GPU as tables: what is trained, on how many ranks, and what comes after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.family_models import VARIANTS
from support.low_bit_models import MODELS

Sections = Mapping[str, Mapping[str, Any]]
FULL: Sections = {"adapter": {"method": "full"}, "quant": {"method": "none"}}
KEPT: Sections = {"quant": {"method": "keep"}}
DORA: Sections = {"adapter": {"use_dora": True}}

SETTINGS: dict[str, Sections] = {
    "qlora": {},
    "fp32": {"train": {"dtype": "fp32"}},
    "liger kernels": {"train": {"fused_kernels": "liger"}},
    "no fused kernels": {"train": {"fused_kernels": "none"}},
    "checkpointing=none": {"train": {"checkpointing": "none"}},
    "checkpointing=offload": {"train": {"checkpointing": "offload"}},
    "checkpointing=selective": {"train": {"checkpointing": "selective"}},
    "mlp_tile": {"train": {"mlp_tile": 24}},
    "accumulate=block": {"train": {"accumulate": "block", "global_batch": 8}},
    "attention=sdpa": {"train": {"attention": "sdpa"}},
    "measured": {"plan": {"measure": True}},
    "dense_layers": {"quant": {"dense_layers": 2}},
    "dora": DORA,
    "dora, dropout": {"adapter": {"use_dora": True, "lora_dropout": 0.1}},
    "dropout": {"adapter": {"lora_dropout": 0.1}},
    "pissa": {"adapter": {"init": "pissa"}},
    "loftq": {"adapter": {"init": "loftq"}},
    "full": FULL,
    "unquantized": {"quant": {"method": "none"}},
    "neftune": {"train": {"neftune_alpha": 5}},
    "muon": {"optim": {"name": "muon"}},
}
"""Settings of llama's runs by name."""
TYPES = """
qwen3 qwen3_moe gemma3 mixtral gpt_oss deepseek_v3 granitemoehybrid qwen3_next gemma4_text glm4_moe lfm2
""".split()  # noqa: SIM905
SMALL = ("llama", "qwen3", "qwen3_moe", "gemma3", "mixtral", "gpt_oss")
"""Types that small_models.py writes; family_models.py writes the others."""
OBJECTIVES = ("dpo", "ipo", "kto", "orpo", "simpo", "reward")
AFTER_TRAINING = ("generate llama", "generate qwen3_moe", "generate gpt_oss", "evaluate", "merge", "resume")

PATHS: dict[str, tuple[str, Sections]] = {
    **{name: ("llama", sections) for name, sections in SETTINGS.items()},
    **{f"type {name}": (name, {}) for name in TYPES},
    **{f"keep {name}": (f"kept-{name}", KEPT) for name in MODELS},
    **{name: ("llama", {"train": {"objective": name}}) for name in OBJECTIVES},
    "grpo": ("llama", {"train": {"objective": "grpo"}}),
    "grpo, temperature": ("llama", {"train": {"objective": "grpo"}, "rollout": {"temperature": 0.7}}),
    **{name: (name.partition(" ")[2] or "llama", {}) for name in AFTER_TRAINING},
    "generate kept-fp8": ("kept-fp8", KEPT),
    **{f"captured {name}": (name, {}) for name in ("llama", "qwen3_moe")},
    **{f"variant {name}": (f"variant-{name}", {}) for name in VARIANTS},
}
"""(model, settings) of the paths of one rank. With MODE=skip no answer has a likelihood, so a KL term is refused."""

RANK, WORLD = 3, 8
OF_EIGHT: dict[str, tuple[str, Sections]] = {
    "fsdp2": ("llama", {}),
    "replicas": ("llama", {"parallel": {"shard_degree": 4}}),
    "offload": ("llama", {"train": {"checkpointing": "offload"}}),
    "saves": ("llama", {"train": {"save_every": 1}}),
    "resident_blocks": ("llama", {"parallel": {"resident_blocks": "auto"}}),
    "dense_layers, sharded": ("llama", {"quant": {"dense_layers": 1}}),
    "full, sharded": ("llama", FULL),
    "keep, sharded": ("kept-fp8", KEPT),
    "experts": ("qwen3_moe", {}),
    "experts divided": ("qwen3_moe", {"parallel": {"expert_degree": "replica"}}),
    "grpo, sharded": ("llama", {"train": {"objective": "grpo"}}),
    "zero3": ("llama", {"parallel": {"backend": "zero3"}}),
    "zero3, offloaded": ("llama", {"parallel": {"backend": "zero3", "offload_base": True}}),
}
"""(model, settings) of the paths of rank RANK of WORLD, whose collectives move nothing."""
