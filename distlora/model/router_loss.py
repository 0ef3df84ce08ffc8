"""The load-balancing loss of a mixture of experts' routers: what a router leaves for it, and what it adds to the loss
sums of rows.

It is defined per row: what transformers computes (load_balancing_loss_func) for that row alone. transformers' own mean
is over whatever shares a micro-batch, and is no sum over rows; over rows, a step's loss does not depend on ranks,
micro-batches or empty rows.

Letters: B rows of the batch, T tokens of all of them, L tokens of a row, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distlora.architecture.families import ExpertLayout
from distlora.config import TrainConfig
from distlora.model.adapters import BlockContext
from distlora.model.layer_wrapper import Block

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Router(nn.Module):
    """A family's router; where a loss is to balance it, what that needs is left in the block's context."""

    def __init__(self, inner: nn.Module, context: BlockContext, *, top_k: int) -> None:
        super().__init__()
        self.inner = inner
        self.context, self.top_k = context, top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """(T, H) -> what the family's router gives, router logits (T, E) first."""
        output: tuple[Tensor, ...] = self.inner(hidden_states)
        if self.context.balanced is not None:
            self.context.leave_balance(balance_of(output[0], self.context.balanced, self.top_k))
        return output


def weight_of(train: TrainConfig, hf_config: PretrainedConfig) -> float:
    """What the loss counts in training: train.router_aux_loss, or without it what config.json says, as transformers
    reads it: router_aux_loss_coef where output_router_logits is set, else 0. Nothing in preference training, whose loss
    is one of pairs.
    """
    if train.objective == "dpo":
        return 0.0
    if train.router_aux_loss is not None:
        return train.router_aux_loss
    return float(hf_config.router_aux_loss_coef) if hf_config.output_router_logits else 0.0


def place_routers(blocks: Sequence[Block], layout: ExpertLayout, *, top_k: int) -> None:
    """Put a `Router` around each block's router."""
    for block in blocks:
        router = block.inner.get_submodule(layout.router)
        block.inner.set_submodule(layout.router, Router(router, block.context, top_k=top_k))


def balance_of(logits: Tensor, balanced: Tensor, top_k: int) -> Tensor:
    """router logits (T, E) and which positions count, `balanced` (B, L) bool -> (B, 2, E) fp32: for each row the
    sums over its positions of (how often an expert is among the top_k, its probability).

    The operations are those of transformers' load_balancing_loss_func.
    """
    batch, num_experts = balanced.shape[0], logits.shape[-1]
    probabilities = torch.softmax(logits, dim=-1)
    chosen = torch.topk(probabilities, top_k, dim=-1).indices
    mask = balanced.reshape(-1, 1).float()
    counts = torch.zeros_like(probabilities, dtype=torch.float32).scatter_(
        1, chosen, mask.expand(-1, top_k).contiguous()
    )
    both = torch.stack((counts, probabilities.float() * mask), dim=1)
    return both.view(batch, -1, 2, num_experts).sum(dim=1)


def balance_loss(balances: list[Tensor], balanced: Tensor) -> Tensor:
    """(B, 2, E) of every layer, and which positions count, (B, L) -> (B,) fp32: the load-balancing loss of Switch
    Transformers (arXiv 2101.03961, equations 4 to 6) over the positions of a row and all layers together, as
    transformers computes it for that row alone. 0 for a row of which nothing counts.
    """
    total = torch.stack(balances).sum(dim=0)
    positions = balanced.sum(dim=1).clamp_min(1) * len(balances)
    mean = total / positions[:, None, None]
    return (mean[:, 0] * mean[:, 1]).sum(dim=1) * total.shape[-1]


def balanced_positions(labels: Tensor) -> Tensor:
    """labels (B, T) -> (B, T) bool: the positions up to a row's last target. What follows is padding or trains nothing,
    and of an empty row nothing counts.
    """
    targets = torch.roll(labels >= 0, 1, dims=1)  # The target of position t is the token at t + 1.
    targets[:, 0] = False
    return targets.flip(1).int().cumsum(dim=1).flip(1) > 0


def ask_for_balance(blocks: Sequence[Block], labels: Tensor | None) -> Tensor | None:
    """Tell the blocks over which positions their routers are to be balanced, those of `labels` (B, L), which are
    returned; None: nothing is asked.
    """
    balanced = None if labels is None else balanced_positions(labels)
    for block in blocks:
        block.balanced = balanced
    return balanced


def balance_sums(blocks: Sequence[Block], labels: Tensor, balanced: Tensor) -> Tensor:
    """(B,) fp32: the load-balancing loss of each row of the forward that has run, once for each of its targets. A
    step's loss, a mean over targets, is then the mean of what transformers computes for each row, weighted by targets.
    """
    balances = [block.balance for block in blocks if block.balance is not None]
    for block in blocks:
        block.balance = None  # It holds the graph.
    return (labels >= 0).sum(dim=1) * balance_loss(balances, balanced)
