"""Say which linears PEFT cannot adapt by name, although they are linears. Imports no torch."""

from __future__ import annotations

EXPERT_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Last names that PEFT turns into fused weights of experts, wherever they stand, by the type whose conversion of
checkpoints transformers uses (`distlora.derive.linears.conversion_of`)."""

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types on which PEFT refuses the target out_proj."""


def peft_refusal(model_type: str, path: str, conversion: str | None) -> str:
    """Return the reason why PEFT cannot adapt the linear at `path`; empty if it can.

    `conversion`: the type whose conversion of checkpoints transformers uses for model_type.
    """
    name = path.rpartition(".")[2]
    if name in EXPERT_NAMES.get(conversion or "", ()):
        return f"PEFT takes {name} for experts on {model_type}"
    if name == "out_proj" and model_type in MAMBA_TYPES:
        return f"PEFT refuses out_proj on {model_type}, whose CUDA kernels read its weight"
    return ""
