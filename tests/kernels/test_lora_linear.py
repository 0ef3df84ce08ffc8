"""The adapted linear's autograd function against the reference, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, RowChoice, lora_linear, lora_linears
from support.closeness import assert_close
from support.lora_tensors import tensors

SHAPES = [(1, 64, 48, 4), (37, 100, 66, 3), (130, 256, 320, 16)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_are_those_of_the_function(with_bias: bool, per_row: bool) -> None:
    x, weight, a, b, bias = tensors((5, 24, 20, 4), torch.float64)
    scale: RowChoice | float = RowChoice(torch.tensor([0, 0, 0, 1, -1]), (2.0, 0.5), (1, 3)) if per_row else 2.0
    leaves = [t.requires_grad_() for t in (x.view(1, 5, 24), a, b)]

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, FrozenWeight((weight,), (20, 24)), Adapter(a, b, scale), bias=bias if with_bias else None)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_equal_the_reference(
    dtype: torch.dtype, shape: tuple[int, int, int, int], packed: bool
) -> None:
    x, weight, a, b, bias = tensors(shape, dtype)
    frozen = FrozenWeight(
        tuple(nf4.nf4_quantize(weight)) if packed else (weight,), (shape[2], shape[1]), nf4.NF4 if packed else None
    )
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for use_reference in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        if use_reference:  # In fp64 from the same rounded inputs: what the exact result is.
            wide = [leaf.double() for leaf in leaves]
            y = reference.lora_linear(wide[0], frozen.dense(dtype).double(), wide[1], wide[2], 2.0, bias.double())
            y.backward(dy.double())
        else:
            y = lora_linear(leaves[0], frozen, Adapter(leaves[1], leaves[2], 2.0), bias=bias)
            y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, actual, expected in zip(("y", "dx", "da", "db"), results[1], results[0], strict=True):
        # fp32: a sum of up to 330 products, rounded at random: some ulps. bf16: inputs of the second GEMM and the
        # outputs are rounded to bf16 (eps 2^-7): about one ulp each; da and db are then widened to fp32.
        ulps = 4 if dtype == torch.float32 else 2
        assert_close(actual.to(dtype), expected.to(torch.float32).to(dtype), ulps=ulps)
        assert actual.dtype == (dtype if name in ("y", "dx") else torch.float32)


def test_a_tiny_update_survives_in_bf16() -> None:
    """Added to an output already rounded to bf16, an update of 1e-3 of it keeps half of itself."""
    x, weight, a, b, _ = tensors((256, 1024, 1024, 16), torch.bfloat16)
    b = b * 1e-3
    exact = (x.double() @ a.to(torch.bfloat16).double().T) @ b.to(torch.bfloat16).double().T
    frozen = FrozenWeight((weight,), (1024, 1024))
    contribution = lora_linear(x, frozen, Adapter(a, b, 1.0)).double() - x.double() @ weight.double().T
    slope = float((contribution * exact).sum() / exact.square().sum())
    assert abs(slope - 1) < 0.1, f"{slope:.2f} of the update is left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_adapters", [1, 2])
def test_linears_of_one_input_together_equal_each_by_itself(dtype: torch.dtype, num_adapters: int) -> None:
    """Values and the input's gradient are equal bit for bit, but for a joined X A^T."""
    x, weight, a, b, bias = tensors((37, 100, 66, 3), dtype)
    frozen = FrozenWeight((weight,), (66, 100))
    packed = FrozenWeight(nf4.nf4_quantize(weight[:20]), (20, 100), nf4.NF4)
    results = []
    for together in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        small = Adapter(leaves[1] * 2, leaves[2][:20] * 1, 0.5) if num_adapters == 2 else None
        linears = [Linear(frozen, Adapter(leaves[1], leaves[2], 2.0), bias), Linear(packed), Linear(packed, small)]
        # A node, as the norm before a block's projections is: a leaf would add its gradients up itself.
        node = leaves[0] * 1
        if together:
            ys = lora_linears(node, linears)
        else:
            ys = tuple(lora_linear(node, *linear[:2], bias=linear.bias) for linear in linears)
        loss = sum((y.float() ** 2).sum() for y in ys)
        results.append([*ys, *torch.autograd.grad(loss, leaves)])
    for joined, alone in zip(*results, strict=True):
        if num_adapters == 1:
            assert torch.equal(joined, alone)
        else:
            assert_close(joined.to(dtype), alone.to(dtype), ulps=2)


def test_a_linear_whose_output_is_not_used_costs_no_gradient() -> None:
    x, weight, a, b, _ = tensors((5, 24, 20, 4), torch.float64)
    frozen = FrozenWeight((weight,), (20, 24))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    other = Adapter(a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_(), 1.0)
    used, _ = lora_linears(x, (Linear(frozen, Adapter(a, b, 2.0)), Linear(frozen, other)))
    alone = lora_linear(x, frozen, Adapter(a, b, 2.0))
    together = torch.autograd.grad(used.sum(), [*leaves, other.a, other.b], allow_unused=True)
    assert together[3] is together[4] is None
    for actual, expected in zip(together[:3], torch.autograd.grad(alone.sum(), leaves), strict=True):
        assert torch.equal(actual, expected)


def test_only_the_stored_parts_are_saved_for_backward() -> None:
    """Never a dequantized weight, a view, or a copy: FSDP2 frees and refills the Parameters' storage in between."""
    x, weight, a, b, _ = tensors((37, 128, 256, 3), torch.float32)
    parts = tuple(torch.nn.Parameter(part, requires_grad=False) for part in nf4.nf4_quantize(weight))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(
            x.requires_grad_(),
            FrozenWeight(parts, (256, 128), nf4.NF4),
            Adapter(a.requires_grad_(), b.requires_grad_(), 1.0),
        )
    own = [t for t in saved if t.numel() in {p.numel() for p in parts}]
    assert {id(t) for t in own} >= {id(p) for p in parts}
    assert not any(t.shape == weight.shape for t in saved)


@pytest.mark.ci
def test_gradients_under_torch_compile_are_those_without_it() -> None:
    x, weight, a, b, _ = tensors((37, 128, 256, 3), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

    def loss() -> Tensor:
        return lora_linear(x, FrozenWeight((weight,), (256, 128)), Adapter(a, b, 2.0)).square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    for actual, gradient in zip(
        torch.autograd.grad(torch.compile(loss, backend="aot_eager")(), leaves), expected, strict=True
    ):
        assert torch.equal(actual, gradient)
    with pytest.raises(RuntimeError, match="cannot be compiled; leave out fullgraph=True"):
        torch.compile(lambda: loss(), backend="aot_eager", fullgraph=True)()
