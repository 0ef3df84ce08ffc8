"""The embedding and the head trained whole beside adapters: PEFT's modules_to_save.

They are parameters of the base that are not frozen, so they are loaded, sharded and gathered like it, and their
gradients are summed like those of full fine-tuning. On a model that ties the head to the embedding PEFT trains copies
apart from each other and from what stays frozen; so do we.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from distlora.architecture.tokens import EMBEDDING, HEAD


def train_whole(
    embedding: nn.Module, head: nn.Module, names: Collection[str], *, dtype: torch.dtype, training: bool
) -> None:
    """Put parameters of their own (on meta) in the place of the frozen `weight` of those of the two that are named, and
    take the two apart where they are one.

    Trained ones are fp32 masters; where it is not `training`, all are frozen in `dtype`, the run's.
    """
    if head.weight is embedding.weight:
        head.weight = _like(head, dtype, trained=False)
    for name, module in ((EMBEDDING, embedding), (HEAD, head)):
        if name in names:
            module.weight = _like(module, torch.float32 if training else dtype, trained=training)


def _like(module: nn.Module, dtype: torch.dtype, *, trained: bool) -> nn.Parameter:
    shape = module.get_parameter("weight").shape
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)
