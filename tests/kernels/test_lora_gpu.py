"""The GPU path of the adapted linears agrees with fp64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distlora_kernels import extension, fused, lora_gpu
from distlora_kernels.dropout import ChosenDropout, Dropout, Stream, apply_dropout, threshold_of
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, RowChoice, lora_linear, lora_linears
from distlora_kernels.skinny import skinny_up
from support.closeness import assert_close, relative_error
from support.gates import gate_of
from support.tiers import ci, diagonal

BATCH, TOKENS, FEATURES = 3, 12, 128
OUTPUTS = (100, 48, 64)
RANKS = (16, 3)
ROWS = torch.tensor([8, 2, 5])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool,
    dropout: bool,
    choice: bool,
    ranks: tuple[int, ...] = RANKS,
) -> tuple[Tensor, list[Linear], list[Tensor]]:
    """Return x (B, T, I), three linears of it (the last without adapter), and the outputs' gradients."""
    x = randn(BATCH, TOKENS, FEATURES, seed=0).to(device, dtype)
    linears, dys = [], []
    for index, (out, rank) in enumerate(zip(OUTPUTS, (*ranks, 1), strict=True)):
        weight = (randn(out, FEATURES, seed=1 + index) / FEATURES**0.5).to(dtype)
        parts = nf4.nf4_quantize(weight) if packed else (weight,)
        frozen = FrozenWeight(tuple(part.to(device) for part in parts), (out, FEATURES), nf4.NF4 if packed else None)
        columns = (rank, 5) if choice else (rank,)
        scale: float | RowChoice = 1.5
        if choice:
            scale = RowChoice(torch.tensor([1, -1, 0], device=device), (2.0, 0.5), columns)
        a = (randn(sum(columns), FEATURES, seed=11 + index) / FEATURES**0.5).to(device).requires_grad_()
        b = randn(out, sum(columns), seed=21 + index).to(device).requires_grad_()
        mask = Dropout((5, index), threshold_of(0.25), 3, ROWS.to(device)) if dropout else None
        bias = randn(out, seed=31).to(device, dtype) if index == 1 else None
        linears.append(Linear(frozen, None if index == 2 else Adapter(a, b, scale, mask), bias))
        dys.append(randn(BATCH, TOKENS, out, seed=41 + index).to(device, dtype))
    return x, linears, dys


def in_fp64(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients (x, then a and b of each adapter) of the formula in fp64."""
    wide = x.double().requires_grad_()
    flat, ys, leaves = wide.flatten(0, 1), [], [wide]
    for linear in linears:
        y = flat @ linear.weight.dense(x.dtype).double().T
        if linear.bias is not None:
            y = y + linear.bias.double()
        if linear.adapter is not None:
            a, b, scale, dropout = linear.adapter[:4]
            a64, b64 = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
            leaves += [a64, b64]
            seen = flat if dropout is None else apply_dropout(flat, dropout)
            gate = scale if isinstance(scale, float) else gate_of(scale, flat.shape[0])
            y = y + (seen @ a64.T * gate) @ b64.T
        ys.append(y.unflatten(0, x.shape[:-1]))
    gradients = torch.autograd.grad(ys, leaves, [dy.double() for dy in dys])
    return [*(y.detach() for y in ys), *gradients]


def run(variant: Any, x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients (x, then a and b of each adapter) of the variant."""
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *(t for linear in linears if linear.adapter is not None for t in linear.adapter[:2])]
    with fused.force_variant(variant):
        ys = lora_linears(leaf, linears)
        return [*ys, *torch.autograd.grad(ys, leaves, dys)]


FORMS = [
    (packed, variant, dropout, choice)
    for packed, variant in ((False, "scratch"), (True, "scratch"), (True, "fused"))
    for dropout in (False, True)
    for choice in (False, True)
]
CELLS = [(*FORMS[number], dtype) for number, dtype in ((0, torch.bfloat16), (7, torch.float32), (11, torch.bfloat16))]
CELLS += [
    ci(*form, dtype) for form in FORMS for dtype in (torch.float32, torch.bfloat16) if (*form, dtype) not in CELLS
]


@pytest.mark.parametrize(("packed", "variant", "dropout", "choice", "dtype"), CELLS, ids=str)
def test_outputs_and_gradients_of_linears_that_share_an_input(
    triton_device: torch.device, variant: str, packed: bool, dropout: bool, choice: bool, dtype: torch.dtype
) -> None:
    x, linears, dys = problem(dtype, triton_device, packed=packed, dropout=dropout, choice=choice)
    expected = in_fp64(x, linears, dys)
    results = run(variant, x, linears, dys)
    for actual, reference in zip(results, expected, strict=True):
        # fp32: sums of up to 128 products, rounded at random. bf16: the operands of the second product and the result
        # are rounded (2^-8 each at most), a and b before they are used.
        assert_close(actual.to(dtype), reference.float(), ulps=8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize(("ranks", "terms"), [((16, 3), 0), ((40, 30), 0), ((16, 3), 3)])
def test_a_product_takes_the_adapters_term_as_further_columns(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, int], terms: int
) -> None:
    """It agrees with fp64 to the same bound, writes no term to memory, and keeps no copy of the input for backward."""
    if terms:
        monkeypatch.setattr(extension, "_LAUNCH_BYTES", -1e9)  # For so few rows only saved launches pay.
    x, linears, dys = problem(torch.bfloat16, triton_device, packed=True, dropout=False, choice=False, ranks=ranks)
    expected, calls, saved = in_fp64(x, linears, dys), [], []

    def up(*operands: Any, **options: Any) -> Tensor:
        calls.append(operands)
        return skinny_up(*operands, **options)

    monkeypatch.setattr(lora_gpu, "skinny_up", up)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda each: each):
        results = run("scratch", x, linears, dys)
    assert len(calls) == terms
    for actual, reference in zip(results, expected, strict=True):
        assert_close(actual.to(torch.bfloat16), reference.float(), ulps=2)
    assert max(each.untyped_storage().nbytes() for each in saved if each.dtype == x.dtype) <= x.nbytes


@pytest.mark.parametrize(
    ("m", "features", "outs", "forward", "copied"),
    [
        (8192, 4096, (4096, 1024, 1024), True, 1),  # Llama 8B: q, k and v; o; gate and up; down.
        (8192, 4096, (4096,), False, None),
        (8192, 4096, (14336, 14336), True, None),
        (8192, 14336, (4096,), False, 0),
        (2048, 4096, (4096,), True, 0),
        (8192, 8192, (8192, 1024, 1024), True, 1),  # Llama 70B.
        (8192, 28672, (8192,), False, 0),
    ],
)
def test_products_are_extended_where_bytes_are_saved(
    m: int, features: int, outs: tuple[int, ...], forward: bool, copied: int | None
) -> None:
    rank = 16 * len(outs)
    choose = {"m": m, "written": sum(outs), "copied": features, "rank": rank, "products": len(outs)}
    assert extension.extends(**choose, itemsize=2) == forward
    assert not extension.extends(**choose, itemsize=4)
    assert extension.carrier(m, features, dict(enumerate(outs)), rank, 2) == copied


def with_own_dropout(linears: list[Linear]) -> list[Linear]:
    """Give each adapter another dropout; one adapter of the first linear drops nothing."""
    found = []
    for index, linear in enumerate(linears):
        adapter = linear.adapter
        if adapter is not None:
            assert isinstance(adapter.scale, RowChoice)
            streams = (Stream((5, index), threshold_of(0.25)), Stream((6, index), threshold_of(0.5 * index)))
            device = adapter.scale.rows.device
            steps = torch.tensor([3, 9, 4], device=device)
            dropout = ChosenDropout(streams, adapter.scale.rows, steps, ROWS.to(device), first=2)
            linear = linear._replace(adapter=adapter._replace(dropout=dropout))
        found.append(linear)
    return found


@pytest.mark.parametrize(("variant", "dtype"), diagonal(["scratch", "fused"], [torch.float32, torch.bfloat16]), ids=str)
def test_adapters_that_rows_choose_have_their_own_dropout(
    triton_device: torch.device, variant: str, dtype: torch.dtype
) -> None:
    x, linears, dys = problem(dtype, triton_device, packed=True, dropout=False, choice=True)
    linears = with_own_dropout(linears)
    expected = in_fp64(x, linears, dys)
    results = run(variant, x, linears, dys)
    for actual, reference in zip(results, expected, strict=True):
        assert_close(actual.to(dtype), reference.float(), ulps=8 if dtype == torch.float32 else 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("variant", ["scratch", ci("fused")])
def test_nan_in_one_adapters_rows_reaches_no_other(triton_device: torch.device, variant: str) -> None:
    """Rows 0 use the second adapter, rows 2 the first: the first's gradients and outputs are the same bits."""
    x, linears, dys = problem(torch.bfloat16, triton_device, packed=True, dropout=False, choice=True)
    linears = with_own_dropout(linears)
    results = []
    for spoiled in (1.0, float("nan"), float("inf")):
        x[0, 1], dys[0][0, 2], dys[1][0, 3] = spoiled, spoiled, spoiled
        leaf = x.clone().requires_grad_()
        adapters = [linear.adapter for linear in linears if linear.adapter is not None]
        with fused.force_variant(variant):
            ys = lora_linears(leaf, linears)
            dx, *gradients = torch.autograd.grad(ys, [leaf, *(t for own in adapters for t in own[:2])], dys)
        firsts = [own.scale.ranks[0] for own in adapters if isinstance(own.scale, RowChoice)]
        own_a = [da[:rank] for da, rank in zip(gradients[::2], firsts, strict=True)]
        own_b = [db[:, :rank] for db, rank in zip(gradients[1::2], firsts, strict=True)]
        assert all(torch.isfinite(da).all() == (spoiled == 1) for da in gradients[::2])
        results.append([*(y[1:] for y in ys), dx[1:], *own_a, *own_b])
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", ["fused", ci("scratch")])
def test_a_fresh_adapter_leaves_the_base_output_within_an_ulp(triton_device: torch.device, variant: str) -> None:
    x, linears, _ = problem(torch.bfloat16, triton_device, packed=True, dropout=False, choice=False)
    weight, adapter, _ = linears[0]
    assert adapter is not None
    fresh = adapter._replace(b=torch.zeros_like(adapter.b))
    with fused.force_variant(variant), torch.no_grad():
        actual, base = lora_linear(x, weight, fresh), lora_linear(x, weight)
    assert_close(actual, base, ulps=1)


@pytest.mark.parametrize("variant", ["scratch", ci("fused")])
def test_a_tiny_update_keeps_its_size_in_bf16(triton_device: torch.device, variant: str) -> None:
    """The slope of a tiny update is 1 within 3 sigma of the rounding, at |sBA| / |W| = 1e-3 (1e-4 on a GPU)."""
    on_gpu = triton_device.type == "cuda"
    rows, features, out, rank = (4096, 4096, 4096, 16) if on_gpu else (256, 512, 512, 16)
    weight = (randn(out, features, seed=1) / features**0.5).bfloat16()
    frozen = FrozenWeight(tuple(p.to(triton_device) for p in nf4.nf4_quantize(weight)), (out, features), nf4.NF4)
    dense = frozen.dense(torch.bfloat16)
    x = randn(rows, features, seed=2).to(triton_device, torch.bfloat16)
    a, b = randn(rank, features, seed=3).to(triton_device), randn(out, rank, seed=4).to(triton_device)
    b *= (1e-4 if on_gpu else 1e-3) * float(dense.norm()) / float((b @ a).norm())
    with fused.force_variant(variant), torch.no_grad():
        y = lora_linear(x, frozen, Adapter(a, b, 1.0)).double()
    base = x.double() @ dense.double().T
    exact = (x.double() @ a.bfloat16().double().T) @ b.bfloat16().double().T
    slope = float(((y - base) * exact).sum() / exact.square().sum())
    sigma = float((y - base - exact).std() / exact.norm())
    assert abs(slope - 1) < 3 * sigma, f"{slope:.3f} of the update is left; its noise is {sigma:.3f}"
    library = relative_error(x @ dense.T, base)
    assert relative_error(y, base + exact) <= 1.01 * library
