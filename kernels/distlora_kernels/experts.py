"""The adapted linear of a mixture of experts over one frozen 3-D weight: row s of the input goes through the weight
and the adapter of its expert, y_s = W_e x_s + s B_e (A_e x_s) + bias_e.

The rows come sorted by expert (`Routing`), so an expert's are neighbours. As in lora_linear.py the weight's Parameters
themselves are saved and dequantized again in backward, never a dense copy, and there is no dW. The adapter's update is
two low-rank products of an expert's rows, never a dense (E, O, I) update of the weight.

On the CPU, and in fp32, experts run one after the other and one expert's weight is dense at a time
(experts_torch.py); on a GPU in 16 bits all of them are one grouped product (experts_grouped.py), which needs the whole
fused weight dense and reads nothing on the host. Which of them runs is the Routing's choice: with bounds on the host,
the loop.

Letters: T tokens, K experts that a token chooses, S = K T rows, E experts, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import experts_grouped, experts_torch
from distlora_kernels.expert_operands import ExpertAdapter, ExpertChoice, ExpertLinear, Routing
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.scratch import DenseWeights

__all__ = ["ExpertAdapter", "ExpertChoice", "Routing", "combine", "dispatch", "expert_linear", "runs_grouped"]


_MOST_GROUPS = 1023
"""Of torch's grouped product."""


def runs_grouped(x: Tensor, *features: int, num_groups: int) -> bool:
    """Whether experts with so many features in and out can be one grouped product on this tensor's device and dtype; a
    Routing then needs no bounds on the host. torch's takes bf16 and rows of whole 16 bytes, on Hopper (9.x) and
    data-center Blackwell (10.x); elsewhere it falls back to a loop that reads the bounds in every product.
    """
    if num_groups > _MOST_GROUPS:
        return False
    if not x.is_cuda or x.dtype != torch.bfloat16 or any(size % 8 for size in features):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """x (T, H) -> (S, H): each row its token. The gradient adds a token's rows in the order of its choices."""
    rows: Tensor = _Dispatch.apply(x, routing)
    return rows


def combine(y: Tensor, routing: Routing) -> Tensor:
    """y (S, H), weighted already -> (T, H): each token the sum of its rows.

    On the CPU in the order of the experts, as transformers' eager experts add them; on a GPU in that of the token's
    choices, in fp32 and without atomics.
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
    """x (S, I), sorted by expert -> (S, O) in x's dtype; gradients for x and the adapter's a and b.

    weight (E, O, I), or (E, I, O) if `transposed`; bias (E, O). GEMMs run in x's dtype with fp32 accumulation; the
    adapter's gradients have its masters' dtype.
    """
    a, b, scale = (None, None, None) if adapter is None else adapter
    y: Tensor = _ExpertLinear.apply(x, a, b, bias, _Form(weight.shape, transposed, scale, routing), *weight.parts)
    return y


class _Form(NamedTuple):
    """What of an expert linear is no tensor of the graph."""

    shape: tuple[int, ...]
    transposed: bool
    scale: float | ExpertChoice | None
    routing: Routing

    def joined(self, a: Tensor | None, b: Tensor | None, bias: Tensor | None, parts: Sequence[Tensor]) -> ExpertLinear:
        adapter = None
        if self.scale is not None:
            assert a is not None
            assert b is not None
            adapter = ExpertAdapter(a, b, self.scale)
        return ExpertLinear(FrozenWeight(tuple(parts), self.shape), self.transposed, adapter, bias)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, form: _Form, *parts: Tensor
    ) -> Tensor:
        weights = DenseWeights(1)
        y, gated = _path(form.routing).forward(x, form.joined(a, b, bias, parts), form.routing, weights)
        ctx.form = form
        # x for dA, what the path keeps (s x A^T) for dB.
        ctx.save_for_backward(None if a is None else x, gated, *weights.saved, a, b, bias, *parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, dense, a, b, bias, *parts = ctx.saved_tensors
        weights = DenseWeights(1)
        weights.saved = [dense]
        linear = ctx.form.joined(a, b, bias, parts)
        dy, needs = dy.contiguous(), ctx.needs_input_grad[:3]
        gradients = _path(ctx.form.routing).backward(x, linear, ctx.form.routing, weights, gated, dy, needs)
        return (*gradients, None, None, *(None for _ in parts))


def _path(routing: Routing) -> ModuleType:
    """The module that computes forward and backward: the loop where the host knows whose rows are where."""
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
    """(S, H) -> (T, H): a token's rows added up in the order of its choices."""
    return rows[routing.inverse].view(-1, routing.num_tokens, rows.shape[1]).sum(dim=0)
