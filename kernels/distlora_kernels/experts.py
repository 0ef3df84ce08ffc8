"""Apply the adapted linear of a mixture of experts over one frozen 3-D weight.

Row s of the input goes through the weight and the adapter of its expert e: y_s = W_e x_s + s B_e (A_e x_s) + bias_e.

Rows come sorted by expert (`Routing`). As in lora_linear.py the weight's Parameters themselves are saved and
dequantized again in backward, never a dense copy, and there is no dW. The adapter's update is two low-rank products of
an expert's rows, never a dense (E, O, I) update.

On the CPU, and in fp32, experts run one after the other with one dense weight at a time (experts_torch.py). On a GPU in
16 bits all experts are one grouped product (experts_grouped.py), which needs all chosen experts' weights dense and does
not synchronize. The Routing decides: with boundaries on the host, the loop runs.

Letters: T tokens, K experts per token, S = K T rows, E experts, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import experts_grouped, experts_torch
from distlora_kernels.dispatch import check_compilation
from distlora_kernels.operands import ExpertAdapter, ExpertChoice, ExpertLinear, FrozenWeight, Routing

__all__ = ["ExpertAdapter", "ExpertChoice", "Routing", "combine", "dispatch", "expert_linear", "runs_grouped"]


_MOST_GROUPS = 1023
"""Most groups that torch's grouped product takes."""


def runs_grouped(x: Tensor, *features: int, num_groups: int) -> bool:
    """Return whether experts with these features can run as one grouped product on this tensor's device and dtype.

    A Routing then needs no boundaries on the host. torch's grouped product takes bf16 and rows of whole 16 bytes, on
    Hopper (9.x) and data-center Blackwell (10.x); elsewhere it falls back to a loop that synchronizes in every product.
    """
    if num_groups > _MOST_GROUPS:
        return False
    if not x.is_cuda or x.dtype != torch.bfloat16 or any(size % 8 for size in features):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Return each row's token, (S, H) of x (T, H). The gradient sums a token's rows in the order of its choices."""
    rows: Tensor = _Dispatch.apply(x, routing)
    return rows


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Return the sum of each token's rows, (T, H) of the weighted y (S, H).

    The order of the sum is that of the experts on the CPU, as in transformers' eager experts; on a GPU it is that of
    the token's choices, in fp32 and without atomics.
    """
    tokens: Tensor = _Combine.apply(y, routing)
    return tokens


def expert_linear(
    x: Tensor,
    weight: FrozenWeight,
    routing: Routing,
    *,
    transposed: bool,
    adapter: ExpertAdapter | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y (S, O) in x's dtype, with gradients for x and the adapter's a and b.

    GEMMs run in x's dtype with fp32 accumulation; the adapter's gradients have its masters' dtype.

    Args:
        x: (S, I), sorted by expert.
        weight: (E, O, I), or (E, I, O) if `transposed`.
        routing: Experts of the rows.
        transposed: Whether the weight is stored (E, I, O).
        adapter: The experts' adapters; the gradient of a shared factor is summed over the experts.
        bias: (E, O), without gradient.
    """
    check_compilation()
    a, b = (None, None) if adapter is None else adapter[:2]
    # Without tensors, which autograd keeps and frees.
    form = _with_tensors(ExpertLinear(weight, transposed, adapter, None), None, None, None, ())
    y: Tensor = _ExpertLinear.apply(x, a, b, bias, form, routing, *weight.parts)
    return y


def _with_tensors(linear: ExpertLinear, a: Any, b: Any, bias: Tensor | None, parts: Sequence[Tensor]) -> ExpertLinear:
    """Return the linear with these tensors in place of its own."""
    adapter = None if linear.adapter is None else linear.adapter._replace(a=a, b=b)
    return linear._replace(weight=linear.weight._replace(parts=tuple(parts)), adapter=adapter, bias=bias)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        form: ExpertLinear,
        routing: Routing,
        *parts: Tensor,
    ) -> Tensor:
        y, gated = _path(routing).forward(x, _with_tensors(form, a, b, bias, parts), routing)
        ctx.form, ctx.routing = form, routing
        # x for dA, s x A^T for dB.
        ctx.save_for_backward(None if a is None else x, gated, a, b, bias, *parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, a, b, bias, *parts = ctx.saved_tensors
        linear, routing = _with_tensors(ctx.form, a, b, bias, parts), ctx.routing
        dy, needs = dy.contiguous(), ctx.needs_input_grad[:3]
        gradients = _path(routing).backward(x, linear, routing, gated, dy, needs)
        return (*gradients, None, None, None, *(None for _ in parts))


def _path(routing: Routing) -> ModuleType:
    """Return the module that computes forward and backward: the loop if the host has the boundaries."""
    return experts_grouped if routing.bounds is None else experts_torch


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x[routing.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _sum_of_choices(dy, ctx.routing), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        if y.is_cuda:
            return _sum_of_choices(y, routing)
        return y.new_zeros(routing.num_tokens, y.shape[1]).index_add_(0, routing.tokens, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy[ctx.routing.tokens], None


def _sum_of_choices(rows: Tensor, routing: Routing) -> Tensor:
    """Return the sum of a token's rows in the order of its choices, (S, H) -> (T, H)."""
    num_choices = len(rows) // max(routing.num_tokens, 1)  # A rank may receive no rows for its experts.
    return rows[routing.inverse].view(num_choices, routing.num_tokens, rows.shape[1]).sum(dim=0)
