"""Load-balancing loss of a mixture of experts' routers, per row of the batch.

It is what transformers' load_balancing_loss_func computes for that row alone. transformers averages over the
micro-batch, which is not a sum over rows. Per row, a step's loss does not depend on ranks, micro-batches or empty rows.

Letters: B rows of the batch, T tokens of all of them, L tokens of a row, E experts, H hidden size.
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
    """A family's router that stores statistics in the layer's context if a loss balances it."""

    def __init__(self, inner: nn.Module, context: BlockContext, *, top_k: int) -> None:
        super().__init__()
        self.inner = inner
        self.context, self.top_k = context, top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Return the family's router's output for (T, H): router logits (T, E) first."""
        output: tuple[Tensor, ...] = self.inner(hidden_states)
        if self.context.balanced is not None:
            self.context.leave_balance(balance_of(output[0], self.context.balanced, self.top_k))
        return output


def weight_of(train: TrainConfig, hf_config: PretrainedConfig) -> float:
    """Return the weight of the router loss in training: train.router_aux_loss, or config.json's.

    As in transformers, that is router_aux_loss_coef if output_router_logits is set, otherwise 0. With DPO it is 0.
    """
    if train.objective == "dpo":
        return 0.0
    if train.router_aux_loss is not None:
        return train.router_aux_loss
    return float(hf_config.router_aux_loss_coef) if hf_config.output_router_logits else 0.0


def place_routers(blocks: Sequence[Block], layout: ExpertLayout, *, top_k: int) -> None:
    """Put a `Router` around each layer's router."""
    for block in blocks:
        router = block.inner.get_submodule(layout.router)
        block.inner.set_submodule(layout.router, Router(router, block.context, top_k=top_k))


def balance_of(logits: Tensor, balanced: Tensor, top_k: int) -> Tensor:
    """Return (B, 2, E) fp32 from router logits (T, E): per row, sums over the positions in `balanced` (B, L) bool.

    The sums count how often an expert is among the top_k, and add its probability. The operations are those of
    transformers' load_balancing_loss_func.
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
    """Return (B,) fp32 losses from every layer's (B, 2, E) and the positions (B, L) that count; 0 without positions.

    It is the load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) over a row's positions and
    all layers together, as transformers computes it for that row alone.
    """
    total = torch.stack(balances).sum(dim=0)
    positions = balanced.sum(dim=1).clamp_min(1) * len(balances)
    mean = total / positions[:, None, None]
    return (mean[:, 0] * mean[:, 1]).sum(dim=1) * total.shape[-1]


def balanced_positions(labels: Tensor) -> Tensor:
    """Return (B, T) bool from labels (B, T): the positions up to a row's last target, none for an empty row.

    What follows is padding or trains nothing.
    """
    targets = torch.roll(labels >= 0, 1, dims=1)  # The target of position t is the token at t + 1.
    targets[:, 0] = False
    return targets.flip(1).int().cumsum(dim=1).flip(1) > 0


def ask_for_balance(blocks: Sequence[Block], labels: Tensor | None) -> Tensor | None:
    """Make the layers' routers collect statistics over the positions of `labels` (B, L), which are returned.

    None: no statistics.
    """
    balanced = None if labels is None else balanced_positions(labels)
    for block in blocks:
        block.balanced = balanced
    return balanced


def balance_sums(blocks: Sequence[Block], labels: Tensor, balanced: Tensor) -> Tensor:
    """Return (B,) fp32: each row's load-balancing loss in the last forward, once per target.

    A step's loss, a mean over targets, is then the mean over rows of transformers' loss, weighted by targets.
    """
    balances = [block.balance for block in blocks if block.balance is not None]
    for block in blocks:
        block.balance = None  # It holds the graph.
    return (labels >= 0).sum(dim=1) * balance_loss(balances, balanced)
