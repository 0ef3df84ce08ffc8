"""DoRA in the adapted linear, on the CPU's path and on the GPU's, against PEFT's formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.dora import initial_magnitude
from distlora_kernels.dropout import Dropout, dropped, threshold_of
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, Magnitude, RowChoice, lora_linear, lora_linears
from support.closeness import assert_close
from support.tiers import ci

BATCH, TOKENS, FEATURES = 3, 12, 128
OUTPUTS, RANKS = (100, 48, 64), (16, 3, 8)
ROWS = torch.tensor([8, 2, 5])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_norms_squared(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    return weight.dense(dtype).double().square().sum(dim=1).float()


def problem(
    dtype: torch.dtype, device: torch.device, *, packed: bool, dropout: bool, choice: bool, empty: tuple[int, ...] = ()
) -> tuple[Tensor, list[Linear], list[Tensor]]:
    """X (B, T, I), three linears of it (one with a bias, the last a LoRA), and the gradients of their outputs.

    `empty` rows of the weights are 0; the magnitude of the first of them is so too, where training starts.
    """
    x = randn(BATCH, TOKENS, FEATURES, seed=0).to(device, dtype)
    linears, dys = [], []
    for index, (out, rank) in enumerate(zip(OUTPUTS, RANKS, strict=True)):
        weight = (randn(out, FEATURES, seed=1 + index) / FEATURES**0.5).to(dtype)
        weight[list(empty)] = 0
        parts = nf4.nf4_quantize(weight) if packed else (weight,)
        frozen = FrozenWeight(tuple(part.to(device) for part in parts), (out, FEATURES), nf4.NF4 if packed else None)
        ranks = (rank, 5) if choice else (rank,)
        scale: float | RowChoice = 1.5
        if choice:
            scale = RowChoice(torch.tensor([1, -1, 0], device=device), (2.0, 0.5), ranks)
        a = (randn(sum(ranks), FEATURES, seed=11 + index) / FEATURES**0.5).to(device).requires_grad_()
        b = (0.3 * randn(out, sum(ranks), seed=21 + index)).to(device).requires_grad_()
        mask = Dropout((5, index), threshold_of(0.25), 3, ROWS.to(device)) if dropout else None
        magnitude = None
        if index < 2:
            squares = row_norms_squared(frozen, dtype)
            masters = initial_magnitude(squares) * (1 + 0.2 * randn(len(ranks), out, seed=51).to(device))
            masters[:, list(empty[1:])] = 0.5
            magnitude = Magnitude(masters.requires_grad_(), squares)
        bias = randn(out, seed=31).to(device, dtype) if index == 1 else None
        linears.append(Linear(frozen, Adapter(a, b, scale, mask, magnitude), bias))
        dys.append(randn(BATCH, TOKENS, out, seed=41 + index).to(device, dtype))
    return x, linears, dys


def trained(linears: list[Linear]) -> list[Tensor]:
    """Return A and b of each linear, then the magnitudes."""
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    magnitudes = [adapter.magnitude.masters for adapter in adapters if adapter.magnitude is not None]
    return [*(tensor for adapter in adapters for tensor in adapter[:2]), *magnitudes]


def peft_output(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, m: Tensor | None, kept: Tensor | None
) -> Tensor:
    """Return PEFT's DoRA output of one adapter without bias; LoRA's for rows of w that are 0.

    `kept` multiplies x; None without dropout.
    """
    seen = x if kept is None else x * kept
    if m is None:
        return x @ w.T + scale * (seen @ a.T) @ b.T
    empty = w.square().sum(dim=1) == 0
    k = torch.where(empty, 1.0, m / (w + scale * b @ a).norm(dim=1).detach().masked_fill(empty, 1))
    return x @ w.T + (k - 1) * (seen @ w.T) + k * ((seen @ a.T) @ b.T) * scale


def in_fp64(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients of PEFT's formula in fp64, row by row of the batch."""
    wide = x.double().requires_grad_()
    leaves = [t.detach().double().requires_grad_() for t in trained(linears)]
    ab, magnitudes = iter(leaves), iter(leaves[2 * len(linears) :])
    ys = []
    for linear in linears:
        adapter, w = linear.adapter, linear.weight.dense(x.dtype).double()
        assert adapter is not None
        a, b = next(ab), next(ab)
        m = None if adapter.magnitude is None else next(magnitudes)
        kept = None
        if adapter.dropout is not None:
            mask = dropped(adapter.dropout, BATCH * TOKENS, FEATURES).unflatten(0, (BATCH, TOKENS))
            kept = (~mask).double() * adapter.dropout.scale
        rows = []
        for row in range(BATCH):
            seen = None if kept is None else kept[row]
            if not isinstance(adapter.scale, RowChoice):
                rows.append(peft_output(wide[row], w, a, b, adapter.scale, None if m is None else m[0], seen))
                continue
            own, ranks = int(adapter.scale.rows[row]), adapter.scale.ranks
            if own < 0:
                rows.append(wide[row] @ w.T)
                continue
            part = slice(sum(ranks[:own]), sum(ranks[: own + 1]))
            scale = float(adapter.scale.scales[own])
            rows.append(peft_output(wide[row], w, a[part], b[:, part], scale, None if m is None else m[own], seen))
        y = torch.stack(rows)
        ys.append(y if linear.bias is None else y + linear.bias.double())
    gradients = torch.autograd.grad(ys, [wide, *leaves], [dy.double() for dy in dys])
    return [*(y.detach() for y in ys), *gradients]


def assert_equal_to_fp64(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Compare outputs and gradients with fp64; returns our gradients of the trained tensors."""
    expected = in_fp64(x, linears, dys)
    leaf = x.clone().requires_grad_()
    ys = lora_linears(leaf, linears)
    gradients = torch.autograd.grad(ys, [leaf, *trained(linears)], dys)
    for actual, reference in zip([*ys, *gradients], expected, strict=True):
        # As in test_lora_gpu.py. fp32: sums of up to 128 products. bf16: the operands and the result are rounded,
        # and with DoRA once more what the magnitude multiplies.
        assert_close(actual.to(x.dtype), reference.float(), ulps=8 if x.dtype == torch.float32 else 2)
    return list(gradients[1:])


FORMS = [
    pytest.param(
        packed, dropout, choice, id=f"{'nf4' if packed else 'dense'}{'-dropout' * dropout}{'-choice' * choice}"
    )
    for packed in (False, True)
    for dropout in (False, True)
    for choice in (False, True)
]


@pytest.mark.parametrize(("packed", "dropout", "choice"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_on_the_cpu(packed: bool, dropout: bool, choice: bool, dtype: torch.dtype) -> None:
    assert_equal_to_fp64(*problem(dtype, torch.device("cpu"), packed=packed, dropout=dropout, choice=choice))


GPU_FORMS = [
    # k is folded into the weight in the first two.
    (torch.bfloat16, "scratch", True, False, False),
    (torch.bfloat16, "fused", True, False, False),
    (torch.bfloat16, "scratch", False, True, True),
    ci(torch.bfloat16, "fused", True, True, True),
    ci(torch.bfloat16, "scratch", True, False, True),
    ci(torch.bfloat16, "scratch", False, False, False),
    ci(torch.float32, "fused", True, False, True),
    ci(torch.float32, "scratch", False, True, True),
]


@pytest.mark.parametrize(("dtype", "variant", "packed", "dropout", "choice"), GPU_FORMS, ids=str)
def test_outputs_and_gradients_on_the_gpus_path(
    triton_device: torch.device, dtype: torch.dtype, variant: Any, packed: bool, dropout: bool, choice: bool
) -> None:
    with fused.force_variant(variant):
        assert_equal_to_fp64(*problem(dtype, triton_device, packed=packed, dropout=dropout, choice=choice))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("path", "dropout"), [("torch", True), ci("torch", False), ci("triton", False), ci("triton", True)]
)
def test_nan_in_one_adapter_reaches_no_other(path: str, dropout: bool, request: pytest.FixtureRequest) -> None:
    """A non-finite value in one adapter, its magnitude or its rows changes no bit of the other's results."""
    device = torch.device("cpu") if path == "torch" else request.getfixturevalue("triton_device")
    x, linears, dys = problem(torch.bfloat16, device, packed=True, dropout=dropout, choice=True)
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    firsts = [own.scale.ranks[0] for own in adapters if isinstance(own.scale, RowChoice)]
    masters = [own.magnitude.masters for own in adapters if own.magnitude is not None]
    results = []
    for spoiled in (1.0, float("nan"), float("inf")):
        with torch.no_grad():
            x[0, 1], dys[0][0, 2] = spoiled, spoiled
            for own, rank in zip(adapters, firsts, strict=True):
                own.a[rank], own.b[:, rank] = spoiled, spoiled
            for own_masters in masters:
                own_masters[1, ::3] = spoiled
        leaf = x.clone().requires_grad_()
        ys = lora_linears(leaf, linears)
        dx, *gradients = torch.autograd.grad(ys, [leaf, *trained(linears)], dys)
        count = 2 * len(adapters)
        own_a = [da[:rank] for da, rank in zip(gradients[:count:2], firsts, strict=True)]
        own_b = [db[:, :rank] for db, rank in zip(gradients[1:count:2], firsts, strict=True)]
        results.append([*(y[1:] for y in ys), dx[1:], *own_a, *own_b, *(dm[0] for dm in gradients[count:])])
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


EMPTY = (7, 30)
EMPTY_FORMS = [
    pytest.param("torch", torch.float32, False, False, False, id="torch"),
    pytest.param("torch", torch.float32, False, True, True, id="torch-dropout-choice"),
    pytest.param("triton", torch.bfloat16, True, False, False, id="triton-folded"),
    pytest.param("triton", torch.bfloat16, False, False, False, id="triton", marks=pytest.mark.ci),
    pytest.param("triton", torch.bfloat16, False, True, False, id="triton-dropout", marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("path", "dtype", "packed", "dropout", "choice"), EMPTY_FORMS)
def test_a_row_of_the_base_that_is_zero_trains_as_plain_lora(
    path: str, dtype: torch.dtype, packed: bool, dropout: bool, choice: bool, request: pytest.FixtureRequest
) -> None:
    """Two SGD steps from B = 0 give no NaN (PEFT's 0 / 0), and no row stays at 0 once B has moved."""
    device = request.getfixturevalue("triton_device") if path == "triton" else torch.device("cpu")
    x, linears, dys = problem(dtype, device, packed=packed, dropout=dropout, choice=choice, empty=EMPTY)
    with torch.no_grad():
        for _, adapter, _ in linears:
            assert adapter is not None
            adapter.b.zero_()
    for step in range(2):
        gradients = assert_equal_to_fp64(x, linears, dys)
        with torch.no_grad():
            for leaf, gradient in zip(trained(linears), gradients, strict=True):
                leaf.sub_(gradient, alpha=0.01)
        for db in gradients[1:4:2]:
            assert bool((db[list(EMPTY)] != 0).all()), f"B does not move in step {step}"
        for dm in gradients[6:]:
            assert bool((dm[:, list(EMPTY)] == 0).all())
    weight, adapter, _ = linears[0]
    assert adapter is not None
    y, lora = (lora_linear(x, weight, form)[..., list(EMPTY)] for form in (adapter, adapter._replace(magnitude=None)))
    assert torch.equal(y, lora)
    assert bool((y[0] != 0).all())


def test_no_weight_is_kept_for_backward_and_one_output_at_the_most() -> None:
    x, linears, _ = problem(torch.float32, torch.device("cpu"), packed=True, dropout=False, choice=False)
    for weight, adapter, bias in linears[:2]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = lora_linear(x, weight, adapter, bias=bias)
        assert not any(t.shape == weight.shape and t.is_floating_point() for t in saved)
        outputs = [t for t in saved if t.shape == (BATCH * TOKENS, weight.shape[0])]
        assert len(outputs) == 1
        assert (outputs[0].data_ptr() == y.data_ptr()) == (bias is None), "without a bias it is the output itself"


def test_a_small_change_of_the_magnitudes_is_not_swallowed_on_the_gpus_path(triton_device: torch.device) -> None:
    """A change of 1/1000, below a bf16 ulp, survives when it is folded into the quantized weight."""
    out, features = 256, 512
    frozen = FrozenWeight(
        tuple(part.to(triton_device) for part in nf4.nf4_quantize(randn(out, features, seed=1))),
        (out, features),
        nf4.NF4,
    )
    squares = row_norms_squared(frozen, torch.bfloat16)
    x = randn(16, features, seed=2).to(triton_device, torch.bfloat16)
    a, b = randn(4, features, seed=3).to(triton_device), torch.zeros(out, 4, device=triton_device)
    outputs = []
    for change in (1.0, 1.001):
        magnitude = Magnitude(initial_magnitude(squares)[None] * change, squares)
        outputs.append(lora_linear(x, frozen, Adapter(a, b, 1.0, None, magnitude)))
    first, second = outputs
    assert torch.equal(first * torch.tensor(1.001), first), "multiplied to the output, nothing would be left"
    wide = first.double()
    slope = float(((second.double() - wide) * wide).sum() / (0.001 * wide.square().sum()))
    assert abs(slope - 1) < 0.15, f"{slope:.2f} of the change is left"
