"""The linear of a mixture of experts: the loop and the grouped product agree with the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distlora_kernels import experts_grouped, experts_torch
from distlora_kernels.experts import expert_linear
from distlora_kernels.formats import nf4
from distlora_kernels.operands import ExpertAdapter, ExpertChoice, ExpertLinear, FrozenWeight, Routing
from support.closeness import assert_close

EXPERTS, CHOICES = 5, 2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routing_of(tokens: int, users: Tensor | None = None, *, seed: int = 0) -> Routing:
    """Return a routing in which no token chooses expert 3; `users` has the adapters of the tokens."""
    scores = random(tokens, EXPERTS, seed=seed)
    scores[:, 3] = -100
    adapters = None if users is None else (users, 3)
    return Routing.of(scores.topk(CHOICES).indices, EXPERTS, on_host=True, adapters=adapters)


def no_bounds(tokens: int) -> Routing:
    return routing_of(tokens)._replace(bounds=None)


def defined(
    x: Tensor,
    experts: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | float,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y (S, O): y_s = W_e x_s + gate_s B_e (A_e x_s) + bias_e with e = experts[s].

    Shapes: x (S, I), weight (E, O, I), a (E, R, I), b (E, O, R), bias (E, O), gate a number or (S, R). a or b may be
    (1, ...): shared by all experts.
    """
    a, b = (factor.expand(weight.shape[0], -1, -1) for factor in (a, b))
    xa = torch.einsum("si,sri->sr", x, a[experts]) * gate
    y = torch.einsum("si,soi->so", x, weight[experts]) + torch.einsum("sr,sor->so", xa, b[experts])
    return y if bias is None else y + bias[experts]


def packed(weight: Tensor) -> FrozenWeight:
    return FrozenWeight(nf4.nf4_quantize(weight), tuple(weight.shape), nf4.NF4)


SHARED = [("none", ""), ("scale", ""), ("rows", ""), ("scale", "a"), ("scale", "b"), ("rows", "a"), ("rows", "b")]
"""(choice of adapters, factor that all experts share)."""


@pytest.mark.parametrize(("gated", "shared"), SHARED)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("path", [experts_torch, experts_grouped], ids=["loop", "grouped"])
def test_forward_and_gradients_are_the_references(
    path: Any, quantized: bool, transposed: bool, gated: str, shared: str
) -> None:
    """The grouped product runs in bf16 only; rank 3 is not a multiple of 8."""
    dtype, ulps = (torch.float32, 8) if path is experts_torch else (torch.bfloat16, 4)
    ins, outs, rank, tokens = 24, 40, 3, 23
    # Rows choose among three users, of whom the last has no adapter of this weight.
    users = torch.arange(tokens) % 4 - 1 if gated == "rows" else None
    routing = routing_of(tokens, users)
    ranks = (2, 3) if gated == "rows" else (rank,)
    rank = sum(ranks)
    rows = routing.tokens.shape[0]
    fused = random(EXPERTS, *((ins, outs) if transposed else (outs, ins)), seed=2)
    weight = packed(fused) if quantized else FrozenWeight((fused.to(dtype),), tuple(fused.shape))
    dense = weight.dense(dtype).float()
    bias = random(EXPERTS, outs, seed=3).to(dtype)
    x, dy = random(rows, ins, seed=4).to(dtype), random(rows, outs, seed=5).to(dtype)
    of_a, of_b = (1 if shared == factor else EXPERTS for factor in "ab")
    a, b = random(of_a, rank, ins, seed=6) / 5, random(of_b, outs, rank, seed=7) / 5
    gate: Any = 0.5
    scale: float | ExpertChoice = 0.5
    if users is not None:
        scale = ExpertChoice((1, 0, -1), (2.0, 0.5), ranks)
        numbers = torch.tensor([1, 0, -1, -1])[users[routing.tokens]]
        gate = torch.where(numbers[:, None] == torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2.0, 2, 0.5, 0.5, 0.5]), 0)
    leaves = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    expected = defined(
        leaves[0],
        routing.experts,
        (dense.transpose(1, 2) if transposed else dense).double(),
        *leaves[1:],
        0.0 if gated == "none" else gate,
        bias.double(),
    )
    dx, da, db = torch.autograd.grad(expected, leaves, dy.double())

    adapter = None if gated == "none" else ExpertAdapter(a, b, scale)
    linear = ExpertLinear(weight, transposed, adapter, bias)
    y, kept = path.forward(x, linear, routing)
    gradients = path.backward(x, linear, routing, kept, dy, (True, True, True))
    assert_close(y, expected, ulps=ulps)
    assert_close(gradients.x, dx, ulps=ulps)
    if adapter is None:
        assert gradients.a is gradients.b is None
    else:
        assert gradients.a.dtype == gradients.b.dtype == torch.float32
        assert_close(gradients.a.to(dtype), da, ulps=ulps)
        assert_close(gradients.b.to(dtype), db, ulps=ulps)
        for gradient in (gradients.a, gradients.b):
            assert len(gradient) == 1 or gradient[3].count_nonzero() == 0, "no row chose it"


@pytest.mark.parametrize("path", [experts_torch, experts_grouped], ids=["loop", "grouped"])
def test_what_is_not_finite_in_one_trials_rows_reaches_no_other(path: Any) -> None:
    """Non-finite values in a trial's A, B and rows stay in that trial."""
    users = torch.arange(23) % 4 - 1
    routing = routing_of(23, users)
    own = users[routing.tokens] == 1
    weight = packed(random(EXPERTS, 40, 24, seed=2))
    x, dy = random(len(own), 24, seed=4).bfloat16(), random(len(own), 40, seed=5).bfloat16()
    a, b = random(EXPERTS, 8, 24, seed=6), random(EXPERTS, 40, 8, seed=7)
    adapter = ExpertAdapter(a, b, ExpertChoice((0, 1, 2), (2.0, 0.5, 1.0), (2, 3, 3)))
    linear, results = ExpertLinear(weight, False, adapter, None), []
    for spoiled in (1.0, float("nan"), float("inf")):
        x[own], dy[own] = spoiled, spoiled
        a[:, 2:5], b[:, :, 2:5] = spoiled, spoiled
        y, kept = path.forward(x, linear, routing)
        gradients = path.backward(x, linear, routing, kept, dy, (True, True, True))
        others = [0, 1, 5, 6, 7]
        results.append([y[~own], gradients.x[~own], gradients.a[:, others], gradients.b[:, :, others]])
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("on_host", [True, False])
def test_autograd_takes_what_the_path_gives_and_asks_for_no_more(on_host: bool) -> None:
    """Without bounds on the host the grouped product runs, in bf16."""
    routing, dtype, ulps = (routing_of(11), torch.float32, 8) if on_host else (no_bounds(11), torch.bfloat16, 4)
    weight = packed(random(EXPERTS, 40, 24, seed=2))
    a, b = (random(*shape, seed=6).requires_grad_() for shape in ((EXPERTS, 3, 24), (EXPERTS, 40, 3)))
    x = random(routing.tokens.shape[0], 24, seed=4).to(dtype)
    loss = expert_linear(x, weight, routing, transposed=False, adapter=ExpertAdapter(a, b, 0.5)).square().sum()
    loss.backward()
    linear = functools.partial(defined, experts=routing.experts, weight=weight.dense(torch.float32))
    da, db = torch.autograd.grad(linear(x.float(), a=a, b=b, gate=0.5).square().sum(), [a, b])
    assert_close(a.grad.to(dtype), da, ulps=ulps)
    assert_close(b.grad.to(dtype), db, ulps=ulps)


@pytest.mark.parametrize("recomputes", [False, True])
def test_each_chosen_expert_is_dequantized_once_per_pass_and_no_other_ever(
    monkeypatch: pytest.MonkeyPatch, recomputes: bool
) -> None:
    """Forward, recomputation and backward; three trials' adapters beside each other take no more."""
    users = torch.arange(23) % 4 - 1
    routing, weight = routing_of(23, users), packed(random(EXPERTS, 40, 24, seed=2))
    a, b = random(EXPERTS, 8, 24, seed=6).requires_grad_(), random(EXPERTS, 40, 8, seed=7).requires_grad_()
    adapter = ExpertAdapter(a, b, ExpertChoice((0, 1, 2), (2.0, 0.5, 1.0), (2, 3, 3)))
    x = random(len(routing.tokens), 24, seed=4).requires_grad_()
    experts: list[int] = []
    original = nf4.Nf4.slice

    def counted(self: nf4.Nf4, parts: Any, shape: Any, index: int, dtype: torch.dtype) -> Tensor:
        experts.append(index)
        return original(self, parts, shape, index, dtype)

    def run(rows: Tensor) -> Tensor:
        return expert_linear(rows, weight, routing, transposed=False, adapter=adapter).square()  # Keeps the output.

    monkeypatch.setattr(nf4.Nf4, "slice", counted)
    y = checkpoint(run, x, use_reentrant=False) if recomputes else run(x)
    y.sum().backward()
    assert sorted(experts) == sorted((3 if recomputes else 2) * [0, 1, 2, 4])
