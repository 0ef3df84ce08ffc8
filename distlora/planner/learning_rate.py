"""Choose optim.lr by the model, where a published sweep has it. Imports no torch.

Source: tinker-cookbook 9dfcc3a2, recipes/chat_sl/results/sft_sweep.md: the rate of the lowest held-out loss of LoRA on
all linear layers (tulu3, 780 steps of 128 documents, Adam) among 4e-5, 1e-4, 3e-4, 1e-3 and 3e-3. Its adapters have
alpha = 32 and the scale s = alpha / r of y = x W^T + s (x A^T) B^T, where the best rate hardly depends on the rank
("LoRA Without Regret", Schulman et al. 2025). Adam moves each element of B by about the rate, so r terms of scale s
move an output by r x s x rate. Another adapter's rate here keeps that product (the largest of its linears), and is
never above the published rate, because A moves by the rate alone. With LoRA+ (optim.loraplus_lr_ratio) the rate of B
keeps it. Full fine-tuning takes a tenth of the published rate (same source).
"""

from __future__ import annotations

import dataclasses

from distlora.config import AdapterConfig, Config
from distlora.config.objectives import OBJECTIVES
from distlora.config.training import DEFAULT_LR
from distlora.planner.choose import SettingChange
from distlora.planner.model import PlannedModel

SWEPT = {
    ("llama", 2048, 16, 128_256): ("Llama 3.2 1B", 1e-3),
    ("llama", 3072, 28, 128_256): ("Llama 3.2 3B", 1e-3),
    ("llama", 4096, 32, 128_256): ("Llama 3.1 8B", 3e-4),
    ("llama", 8192, 80, 128_256): ("Llama 3 70B", 3e-4),
    ("qwen3", 2560, 36, 151_936): ("Qwen3 4B", 1e-3),
    ("qwen3", 4096, 36, 151_936): ("Qwen3 8B", 1e-3),
    ("qwen3", 5120, 64, 151_936): ("Qwen3 32B", 3e-4),
    ("qwen3_moe", 2048, 48, 151_936): ("Qwen3 30B-A3B", 1e-3),
    ("qwen3_moe", 4096, 94, 151_936): ("Qwen3 235B-A22B", 3e-4),
    ("gpt_oss", 2880, 24, 201_088): ("gpt-oss-20b", 1e-4),
    ("gpt_oss", 2880, 36, 201_088): ("gpt-oss-120b", 3e-4),
}
"""(name, best rate) by (model_type, hidden size, layers, vocabulary)."""
SWEPT_ALPHA = 32
"""r x s of the adapters in that sweep."""
FAR_ABOVE = 30
"""Ratio to the usual rate from which a rate is warned of: the published sweeps span 75."""
FULL_RATIO = 0.1
"""Rate of full fine-tuning, as a fraction of LoRA's."""


def with_learning_rate(config: Config, model: PlannedModel) -> tuple[Config, SettingChange | None]:
    """Return the settings with a number in optim.lr, and the choice with its source; None if it was set."""
    if config.optim.lr is not None:
        return config, None
    lr, source = _rate(config.adapter, config.train.objective, model)
    if config.adapter.method == "lora" and (ratio := config.optim.loraplus_lr_ratio) > 1:
        lr, source = lr / ratio, f"{source}; B has it, and A 1/{ratio:g} of it (optim.loraplus_lr_ratio)"
    lr = float(f"{lr:.3g}")
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))
    return changed, SettingChange(settings={"optim.lr": lr}, why=source)


def warning_of_rate(lr: float, adapter: AdapterConfig, objective: str, model: PlannedModel) -> str | None:
    """Return a sentence about an optim.lr far above the usual one of the model and method; None for any other."""
    usual = _rate(adapter, objective, model)[0]
    if lr <= FAR_ABOVE * usual:
        return None
    return (
        f"WARNING: optim.lr={lr:g} is {lr / usual:,.0f} times the usual rate for this model and adapter ({usual:g}), "
        "and training will probably diverge; leave optim.lr out to use that rate"
    )


def _rate(adapter: AdapterConfig, objective: str, model: PlannedModel) -> tuple[float, str]:
    architecture = model.shapes.architecture
    settings = architecture.text(model.settings)
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    swept = SWEPT.get((architecture.model_type, *(settings.get(name) for name in names)))  # type: ignore[arg-type]
    is_full = adapter.method == "full"
    if (lr := OBJECTIVES[objective].lr) is not None:
        source = f"the default of train.objective={objective}: the sweeps are of next-token losses"
        return (lr * FULL_RATIO, f"{source}; full fine-tuning takes a tenth") if is_full else (lr, source)
    if swept is None:
        source = "the default; no published sweep has this model, so try others (distlora sweep)"
        return (DEFAULT_LR * FULL_RATIO if is_full else DEFAULT_LR), source
    name, published = swept
    source = f"{published:g} is best for LoRA on {name} at r x scale = {SWEPT_ALPHA} (tinker-cookbook)"
    if is_full:
        return published * FULL_RATIO, f"{source}; full fine-tuning takes a tenth"
    paths = {adapted.path for block in model.shapes.adapters(adapter) for adapted in block}
    r_times_scale = max(adapter.rank_of(path) * adapter.scaling_of(path) for path in paths)
    lr = published * min(1, SWEPT_ALPHA / r_times_scale)
    return lr, source + (f"; here it is {r_times_scale:g}" if r_times_scale != SWEPT_ALPHA else "")
