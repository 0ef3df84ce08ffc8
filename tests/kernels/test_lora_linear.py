"""Linears with LoRA and DoRA, on the CPU and on the GPU's path, against PEFT's formula in fp64.

The GPU's path runs on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora_kernels import extension, fused, lora_gpu
from distlora_kernels.dora import initial_magnitude
from distlora_kernels.dropout import ChosenDropout, Dropout, Stream, dropped, threshold_of
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, Magnitude, RowChoice, lora_linear, lora_linears
from distlora_kernels.skinny import skinny_up
from support.closeness import assert_close, relative_error
from support.tiers import ci

BATCH, TOKENS, FEATURES = 3, 12, 128
OUTPUTS, RANKS = (100, 48, 64), (16, 3, 8)
ROWS = torch.tensor([8, 2, 5])
CPU = torch.device("cpu")
LORA, DORA = ("lora", "lora", "none"), ("dora", "dora", "lora")
"""Adapters of the three linears."""
Problem = tuple[Tensor, list[Linear], list[Tensor]]


pytestmark = pytest.mark.usefixtures("nan_memory")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares_of(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """Return the squared norms of the rows, as a start computes them."""
    return weight.dense(dtype).double().square().sum(dim=1).float()


def frozen(weight: Tensor, device: torch.device = CPU, *, packed: bool = True) -> FrozenWeight:
    parts = nf4.nf4_quantize(weight) if packed else (weight,)
    shape = (weight.shape[0], weight.shape[1])
    return FrozenWeight(tuple(part.to(device) for part in parts), shape, nf4.NF4 if packed else None)


def problem(
    dtype: torch.dtype,
    device: torch.device = CPU,
    kinds: tuple[str, ...] = LORA,
    *,
    packed: bool = True,
    dropout: str = "",
    choice: bool = False,
    empty: tuple[int, ...] = (),
    ranks: tuple[int, ...] = RANKS,
) -> Problem:
    """Return x (B, T, I), linears of it, of which the second has a bias, and the gradients of their outputs.

    `dropout` is "" for none, "one" for all rows, or "own" for one of each adapter. `empty` rows of the weights are 0;
    the magnitude of the first of them is so too, where training starts.
    """
    x = randn(BATCH, TOKENS, FEATURES, seed=0).to(device, dtype)
    linears, dys = [], []
    for index, (out, rank, kind) in enumerate(zip(OUTPUTS, ranks, kinds, strict=True)):
        weight = (randn(out, FEATURES, seed=1 + index) / FEATURES**0.5).to(dtype)
        weight[list(empty)] = 0
        base = frozen(weight, device, packed=packed)
        columns = (rank, 5) if choice else (rank,)
        scale: float | RowChoice = 1.5
        if choice:
            scale = RowChoice(torch.tensor([1, -1, 0], device=device), (2.0, 0.5), columns)
        a = (randn(sum(columns), FEATURES, seed=11 + index) / FEATURES**0.5).to(device).requires_grad_()
        b = (0.3 * randn(out, sum(columns), seed=21 + index)).to(device).requires_grad_()
        mask: Dropout | ChosenDropout | None = None
        if dropout == "one":
            mask = Dropout((5, index), threshold_of(0.25), 3, ROWS.to(device))
        elif dropout and isinstance(scale, RowChoice):
            # One adapter of the first linear drops nothing.
            streams = (Stream((5, index), threshold_of(0.25)), Stream((6, index), threshold_of(0.3 * index)))
            steps = torch.tensor([3, 9, 4], device=device)
            mask = ChosenDropout(streams, scale.rows, steps, ROWS.to(device), first=2)
        magnitude = None
        if kind == "dora":
            squares = squares_of(base, dtype)
            masters = initial_magnitude(squares) * (1 + 0.2 * randn(len(columns), out, seed=51).to(device))
            masters[:, list(empty[1:])] = 0.5
            magnitude = Magnitude(masters.requires_grad_(), squares)
        bias = randn(out, seed=31).to(device, dtype) if index == 1 else None
        linears.append(Linear(base, None if kind == "none" else Adapter(a, b, scale, mask, magnitude), bias))
        dys.append(randn(BATCH, TOKENS, out, seed=41 + index).to(device, dtype))
    return x, linears, dys


def adapters_of(linears: list[Linear]) -> list[Adapter]:
    return [linear.adapter for linear in linears if linear.adapter is not None]


def trained(linears: list[Linear]) -> list[Tensor]:
    """Return A and b of each linear, then the magnitudes."""
    adapters = adapters_of(linears)
    magnitudes = [adapter.magnitude.masters for adapter in adapters if adapter.magnitude is not None]
    return [*(tensor for adapter in adapters for tensor in adapter[:2]), *magnitudes]


def peft_output(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, m: Tensor | None, kept: Tensor | float
) -> Tensor:
    """Return PEFT's output of one adapter without bias; LoRA's without m and for rows of w that are 0.

    `kept` multiplies x.
    """
    seen = x * kept
    if m is None:
        return x @ w.T + scale * (seen @ a.T) @ b.T
    empty = w.square().sum(dim=1) == 0
    k = torch.where(empty, 1.0, m / (w + scale * b @ a).norm(dim=1).detach().masked_fill(empty, 1))
    return x @ w.T + (k - 1) * (seen @ w.T) + k * ((seen @ a.T) @ b.T) * scale


def kept_of(adapter: Adapter) -> Tensor:
    """Return what dropout multiplies the input by, (B, T, I)."""
    if adapter.dropout is None:
        return torch.ones(BATCH, 1, 1)
    kept = (~dropped(adapter.dropout, BATCH * TOKENS, FEATURES)).double().unflatten(0, (BATCH, TOKENS))
    if isinstance(adapter.dropout, Dropout):
        return kept * adapter.dropout.scale
    shares = [adapter.dropout.streams[int(own)].threshold / 2**16 if own >= 0 else 0 for own in adapter.scale.rows]
    return kept / (1 - torch.tensor(shares, dtype=torch.float64, device=kept.device))[:, None, None]


def in_fp64(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients of PEFT's formula in fp64, row by row of the batch."""
    wide = x.double().requires_grad_()
    leaves = [t.detach().double().requires_grad_() for t in trained(linears)]
    ab, magnitudes = iter(leaves), iter(leaves[2 * len(adapters_of(linears)) :])
    ys = []
    for weight, adapter, bias in linears:
        w = weight.dense(x.dtype).double()
        y = wide @ w.T
        if adapter is not None:
            a, b, kept = next(ab), next(ab), kept_of(adapter).to(x.device)
            m = None if adapter.magnitude is None else next(magnitudes)
            rows = []
            for row, base in enumerate(y):
                own, part, scale = 0, slice(None), adapter.scale
                if isinstance(scale, RowChoice):
                    own, ranks = int(scale.rows[row]), scale.ranks
                    part, scale = slice(sum(ranks[:own]), sum(ranks[: own + 1])), float(scale.scales[own])
                master = None if m is None else m[own]
                output = peft_output(wide[row], w, a[part], b[:, part], scale, master, kept[row])
                rows.append(base if own < 0 else output)
            y = torch.stack(rows)
        ys.append(y if bias is None else y + bias.double())
    gradients = torch.autograd.grad(ys, [wide, *leaves], [dy.double() for dy in dys])
    return [*(y.detach() for y in ys), *gradients]


def results_of(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Return outputs, then the gradients of x and of the trained tensors."""
    leaf = x.clone().requires_grad_()
    ys = lora_linears(leaf, linears)
    return [*ys, *torch.autograd.grad(ys, [leaf, *trained(linears)], dys)]


def assert_equal_to_fp64(x: Tensor, linears: list[Linear], dys: list[Tensor]) -> list[Tensor]:
    """Compare outputs and gradients with fp64; return our gradients of the trained tensors."""
    results = results_of(x, linears, dys)
    for number, (actual, reference) in enumerate(zip(results, in_fp64(x, linears, dys), strict=True)):
        # fp32: sums of up to 128 products, rounded at random. bf16: the operands of the second product and the result
        # are rounded (2^-8 each at most), and with DoRA once more what the magnitude multiplies.
        assert_close(actual.to(x.dtype), reference.float(), ulps=8 if x.dtype == torch.float32 else 2)
        assert actual.dtype == (x.dtype if number <= len(linears) else torch.float32)
    return results[len(linears) + 1 :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [LORA, DORA], ids="-".join)
def test_outputs_and_gradients_on_the_cpu(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    for packed, choice, dropout in itertools.product((False, True), (False, True), ("", "one")):
        assert_equal_to_fp64(*problem(dtype, CPU, kinds, packed=packed, dropout=dropout, choice=choice))


BF16, FP32 = torch.bfloat16, torch.float32
GPU_CELLS = [
    (BF16, "scratch", LORA, False, "", False),
    (FP32, "scratch", LORA, True, "one", True),
    (BF16, "fused", LORA, True, "own", True),
    # k is folded into the weight in the first two.
    (BF16, "scratch", DORA, True, "", False),
    (BF16, "fused", DORA, True, "", False),
]
MORE = itertools.product((BF16, FP32), ("scratch", "fused"), (LORA, DORA), (True, False), ("", "one"), (False, True))
GPU_CELLS += [ci(dtype, "scratch", LORA, True, "own", True) for dtype in (BF16, FP32)]
GPU_CELLS += [ci(*cell) for cell in MORE if cell not in GPU_CELLS and (cell[1] == "scratch" or cell[3])]


@pytest.mark.parametrize(("dtype", "variant", "kinds", "packed", "dropout", "choice"), GPU_CELLS, ids=str)
def test_outputs_and_gradients_on_the_gpus_path(
    triton_device: torch.device,
    dtype: torch.dtype,
    variant: Any,
    kinds: tuple[str, ...],
    packed: bool,
    dropout: str,
    choice: bool,
) -> None:
    with fused.force_variant(variant):
        assert_equal_to_fp64(*problem(dtype, triton_device, kinds, packed=packed, dropout=dropout, choice=choice))


def test_gradients_are_those_of_the_function() -> None:
    x, a, b, bias = (randn(*shape, seed=1).double() for shape in ((1, 5, 24), (4, 24), (20, 4), (20,)))
    weight = frozen(randn(20, 24, seed=2).double(), packed=False)
    choice = RowChoice(torch.tensor([0, 0, 0, 1, -1]), (2.0, 0.5), (1, 3))
    for scale, rows in ((2.0, x), (choice, x[0][:, None])):

        def function(x: Tensor, a: Tensor, b: Tensor, scale: float | RowChoice = scale) -> Tensor:
            return lora_linear(x, weight, Adapter(a, b, scale), bias=bias)

        assert torch.autograd.gradcheck(function, [each.clone().requires_grad_() for each in (rows, a, b)])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("path", "kinds", "dropout"),
    [
        ("torch", DORA, "one"),
        ("triton", LORA, "own"),
        *(ci("torch", DORA, ""), ci("triton", DORA, ""), ci("triton", DORA, "one")),
    ],
)
def test_nan_in_one_adapter_reaches_no_other(
    path: str, kinds: tuple[str, ...], dropout: str, request: pytest.FixtureRequest
) -> None:
    """A non-finite value in one adapter, its magnitude or its rows changes no bit of the other's results."""
    device = CPU if path == "torch" else request.getfixturevalue("triton_device")
    x, linears, dys = problem(torch.bfloat16, device, kinds, dropout=dropout, choice=True)
    adapters = adapters_of(linears)
    firsts = [own.scale.ranks[0] for own in adapters if isinstance(own.scale, RowChoice)]
    results = []
    for spoiled in (1.0, float("nan"), float("inf")):
        with torch.no_grad():
            x[0, 1], dys[0][0, 2] = spoiled, spoiled
            for own, rank in zip(adapters, firsts, strict=True):
                own.a[rank], own.b[:, rank] = spoiled, spoiled
                if own.magnitude is not None:
                    own.magnitude.masters[1, ::3] = spoiled
        found = results_of(x, linears, dys)
        ys, dx, gradients, count = found[:3], found[3], found[4:], 2 * len(adapters)
        own_a = [da[:rank] for da, rank in zip(gradients[:count:2], firsts, strict=True)]
        own_b = [db[:, :rank] for db, rank in zip(gradients[1:count:2], firsts, strict=True)]
        results.append([*(y[1:] for y in ys), dx[1:], *own_a, *own_b, *(dm[0] for dm in gradients[count:])])
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


EMPTY = (7, 30)
EMPTY_CELLS = [
    ("torch", torch.float32, False, "", False),
    ("torch", torch.float32, False, "one", True),
    ("triton", torch.bfloat16, True, "", False),
    *(ci("triton", torch.bfloat16, False, dropout, False) for dropout in ("", "one")),
]


@pytest.mark.parametrize(("path", "dtype", "packed", "dropout", "choice"), EMPTY_CELLS, ids=str)
def test_a_row_of_the_base_that_is_zero_trains_as_plain_lora(
    path: str, dtype: torch.dtype, packed: bool, dropout: str, choice: bool, request: pytest.FixtureRequest
) -> None:
    """Two SGD steps from B = 0 give no NaN (PEFT's 0 / 0), and no row stays at 0 once B has moved."""
    device = request.getfixturevalue("triton_device") if path == "triton" else CPU
    x, linears, dys = problem(dtype, device, DORA, packed=packed, dropout=dropout, choice=choice, empty=EMPTY)
    with torch.no_grad():
        for adapter in adapters_of(linears):
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
    y, lora = (lora_linear(x, weight, form)[..., list(EMPTY)] for form in (adapter, adapter._replace(magnitude=None)))
    assert torch.equal(y, lora)
    assert bool((y[0] != 0).all())


@pytest.mark.parametrize(("kinds", "dropout"), [(LORA, "one"), (DORA, "")])
def test_only_the_stored_parts_the_input_and_one_output_are_kept_for_backward(
    kinds: tuple[str, ...], dropout: str
) -> None:
    """Never a dequantized weight, a mask or a copy: FSDP2 frees and refills the Parameters' storage in between."""
    x, linears, _ = problem(torch.float32, CPU, kinds, dropout=dropout)
    for weight, adapter, bias in linears[:2]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = lora_linear(x.requires_grad_(), weight, adapter, bias=bias)
        assert {id(part) for part in weight.parts} <= {id(t) for t in saved}
        assert not any(t.shape == weight.shape and t.is_floating_point() for t in saved)
        inputs = [t for t in saved if t.dim() and t.shape[-1] == FEATURES and t.numel() == x.numel()]
        assert {t.data_ptr() for t in inputs} == {x.data_ptr()}
        outputs = [t for t in saved if t.shape == (BATCH * TOKENS, weight.shape[0])]
        assert len(outputs) == (kinds is DORA)
        if outputs:
            assert (outputs[0].data_ptr() == y.data_ptr()) == (bias is None), "without a bias it is the output itself"


@pytest.mark.parametrize("variant", ["torch", "scratch", ci("fused")])
def test_a_tiny_update_keeps_its_size_in_bf16(request: pytest.FixtureRequest, variant: Any) -> None:
    """The slope of a tiny update is 1 within 3 sigma of the rounding, at |sBA| / |W| = 1e-3 (1e-4 on a GPU).

    Added to an output already rounded to bf16, an update of 1e-3 of it keeps half of itself.
    """
    device = CPU if variant == "torch" else request.getfixturevalue("triton_device")
    on_gpu = device.type == "cuda"
    rows, features, out, rank = (4096, 4096, 4096, 16) if on_gpu else (256, 512, 512, 16)
    base = frozen((randn(out, features, seed=1) / features**0.5).bfloat16(), device)
    dense = base.dense(torch.bfloat16)
    x = randn(rows, features, seed=2).to(device, torch.bfloat16)
    a, b = randn(rank, features, seed=3).to(device), randn(out, rank, seed=4).to(device)
    b *= (1e-4 if on_gpu else 1e-3) * float(dense.norm()) / float((b @ a).norm())
    with fused.force_variant(None if variant == "torch" else variant), torch.no_grad():
        y = lora_linear(x, base, Adapter(a, b, 1.0)).double()
    exact = (x.double() @ a.bfloat16().double().T) @ b.bfloat16().double().T
    plain = x.double() @ dense.double().T
    slope = float(((y - plain) * exact).sum() / exact.square().sum())
    sigma = float((y - plain - exact).std() / exact.norm())
    assert abs(slope - 1) < 3 * sigma, f"{slope:.3f} of the update is left; its noise is {sigma:.3f}"
    assert relative_error(y, plain + exact) <= 1.01 * relative_error(x @ dense.T, plain)


def test_a_small_change_of_the_magnitudes_is_not_swallowed_on_the_gpus_path(triton_device: torch.device) -> None:
    """A change of 1/1000, below a bf16 ulp, survives when it is folded into the quantized weight."""
    base = frozen(randn(256, 512, seed=1), triton_device)
    squares = squares_of(base, torch.bfloat16)
    x = randn(16, 512, seed=2).to(triton_device, torch.bfloat16)
    a, b = randn(4, 512, seed=3).to(triton_device), torch.zeros(256, 4, device=triton_device)
    outputs = []
    for change in (1.0, 1.001):
        magnitude = Magnitude(initial_magnitude(squares)[None] * change, squares)
        outputs.append(lora_linear(x, base, Adapter(a, b, 1.0, None, magnitude)))
    first, second = outputs
    assert torch.equal(first * torch.tensor(1.001), first), "multiplied to the output, nothing would be left"
    wide = first.double()
    slope = float(((second.double() - wide) * wide).sum() / (0.001 * wide.square().sum()))
    assert abs(slope - 1) < 0.15, f"{slope:.2f} of the change is left"


@pytest.mark.parametrize(("ranks", "terms"), [((16, 3, 1), 0), ((40, 30, 1), 0), ((16, 3, 1), 3)])
def test_a_product_takes_the_adapters_term_as_further_columns(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], terms: int
) -> None:
    """It agrees with fp64 to the same bound, writes no term to memory, and keeps no copy of the input for backward."""
    if terms:
        monkeypatch.setattr(extension, "_LAUNCH_BYTES", -1e9)  # For so few rows only saved launches pay.
    x, linears, dys = problem(torch.bfloat16, triton_device, ranks=ranks)
    calls, saved = [], []
    monkeypatch.setattr(lora_gpu, "skinny_up", lambda *each, **options: calls.append(1) or skinny_up(*each, **options))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        fused.force_variant("scratch"),
    ):
        assert_equal_to_fp64(x, linears, dys)
    assert len(calls) == terms
    assert max(each.untyped_storage().nbytes() for each in saved if each.dtype == x.dtype) <= x.nbytes


def test_a_linear_whose_output_is_not_used_costs_no_gradient() -> None:
    x, linears, dys = problem(torch.float32, CPU, ("lora", "lora", "lora"))
    leaf = x.clone().requires_grad_()
    used, *_ = lora_linears(leaf, linears)
    together = torch.autograd.grad(used, [leaf, *trained(linears)], dys[0], allow_unused=True)
    assert together[3:] == (None,) * 4
    alone = torch.autograd.grad(lora_linear(leaf, *linears[0][:2]), [leaf, *trained(linears[:1])], dys[0])
    assert all(map(torch.equal, together[:3], alone))


@pytest.mark.ci
def test_gradients_under_torch_compile_are_those_without_it() -> None:
    x, linears, _ = problem(torch.float32, packed=False)
    weight, adapter, _ = linears[0]
    leaves = [x.requires_grad_(), *trained(linears[:1])]

    def loss() -> Tensor:
        return lora_linear(x, weight, adapter).square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(), leaves)
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(RuntimeError, match="cannot be compiled; leave out fullgraph=True"):
        torch.compile(lambda: loss(), backend="aot_eager", fullgraph=True)()
