"""The optimizer of the trained parameters and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distlora.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in one fused pass. The learning rate is set before every step (`learning_rate`)."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of the update that ends step `step` (from 0 to total_steps - 1).

    Linear from lr/warm-up to lr over the warm-up steps, then cosine or linear down to 0 at total_steps, or constant.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.schedule == "linear" else config.lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named `<state>/<parameter>`, for safetensors."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`: everything goes to its parameter's device."""
    for name, tensor in tensors.items():
        key, _, path = name.partition("/")
        parameter = parameters[path]
        optimizer.state[parameter][key] = tensor.to(parameter.device)
