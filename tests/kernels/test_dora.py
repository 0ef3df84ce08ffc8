"""DoRA's norms and the gradient of its magnitudes, on the CPU and in Triton, against the formula itself in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distlora_kernels.dora import dora_norms, dy_gradients, magnitude_gradient, scaled_rows
from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX, nf4_quantize, quantize_blocks
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.skinny import skinny_dy
from support.closeness import assert_close
from support.tiers import diagonal

SCALE = 0.7


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the CPU for plain torch, then the device where Triton's kernels run."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def frozen(kind: str, weight: Tensor) -> FrozenWeight:
    shape = (weight.shape[0], weight.shape[1])
    if kind == "nested":
        return FrozenWeight(nf4_quantize(weight), shape, NF4)
    return FrozenWeight(quantize_blocks(weight.flatten()), shape, NF4_ABSMAX)


def dora_output(x: Tensor, w: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """Return DoRA's definition without dropout: the rows of W + s B A scaled to norm 1, times the magnitude."""
    direction = w + SCALE * b @ a
    return x @ (magnitude / direction.norm(dim=1).detach() * direction.T).T.T


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (33, 3), (200, 16), (33, 64)])
def test_norms(rows: int, rank: int, device: torch.device) -> None:
    w, a, b = (random(*shape, seed=rank, device=device) for shape in ((rows, 48), (rank, 48), (rows, rank)))
    squares, wa = w.double().square().sum(dim=1).float(), (w.double() @ a.double().T).float()
    expected = (w.double() + SCALE * b.double() @ a.double()).norm(dim=1)
    norms = dora_norms(squares, wa, a, b.requires_grad_(), SCALE)
    assert norms.dtype == torch.float32
    assert not norms.requires_grad
    assert_close(norms, expected, ulps=8)
    # 1 part in 256 of w a, a and b is lost in bf16.
    low = dora_norms(squares, wa.bfloat16(), a.bfloat16(), b.bfloat16(), SCALE)
    assert low.dtype == torch.float32
    assert_close(low.bfloat16(), expected, ulps=4)


def test_norms_of_rows_that_cancel_are_no_nan_and_nan_stays(device: torch.device) -> None:
    a, b = random(3, 64, seed=4, device=device), random(500, 3, seed=5, device=device)
    w = -SCALE * b @ a
    squares, wa = w.square().sum(dim=1), w @ a.T
    norms = dora_norms(squares, wa, a, b, SCALE)
    assert bool((norms >= 0).all())
    assert bool((norms < 0.01 * squares.sqrt()).all())
    assert bool((norms == 0).any()), "rounding made none of 500 sums negative, so the clamp was not tried"
    squares[7] = math.nan
    assert dora_norms(squares, wa, a, b, SCALE).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(("shape", "dtype"), diagonal([(1, 1), (515, 16), (37, 33)], [torch.float32, torch.bfloat16]))
def test_magnitude_gradient(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    rows, out = shape
    x, w, a, b = (
        random(*size, seed=index, device=device).double()
        for index, size in enumerate(((rows, 24), (out, 24), (3, 24), (out, 3)))
    )
    magnitude = (w.norm(dim=1) * (1 + 0.1 * random(out, seed=7, device=device))).requires_grad_()
    y = dora_output(x, w, a, b, magnitude)
    # Its sign is y's at most elements, as in a sum that does not cancel, whose rounding is small beside it.
    dy = (y.detach() + random(rows, out, seed=9, device=device)).to(dtype)
    (expected,) = torch.autograd.grad(y, magnitude, dy.double())

    y, magnitude = y.detach().to(dtype), magnitude.detach().float()
    gradient = magnitude_gradient(dy, y, magnitude)
    assert gradient.dtype == torch.float32
    # Of the rounded y, whatever the dtype, to fp32; of the true one to what y's rounding leaves.
    assert_close(gradient, (dy.double() * y.double()).sum(dim=0) / magnitude.double(), ulps=8)
    assert_close(gradient.to(dtype), expected, ulps=8)
    assert torch.equal(gradient, magnitude_gradient(dy, y, magnitude))


# The last shape straddles groups.
@pytest.mark.parametrize(("shape", "kind"), diagonal([(1, 64), (7, 192), (3, 16448)], ["plain", "nested"]))
def test_scaled_rows_are_dequantized_to_the_rows_times_their_factors(
    kind: str, shape: tuple[int, int], device: torch.device
) -> None:
    weight = frozen(kind, random(*shape, seed=0, device=device))
    factor = 1 + 0.2 * random(shape[0], seed=1, device=device)
    scaled = scaled_rows(weight, factor)
    expected = weight.dense(torch.float32).double() * factor.double()[:, None]
    # The absmax and the product are rounded once more each.
    assert_close(scaled.dense(torch.float32), expected, ulps=1)
    unchanged = scaled_rows(weight, torch.ones_like(factor))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(unchanged.dense(dtype), weight.dense(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"), diagonal([(5, 33, 3), (515, 16, 24), (40, 64, 40)], [torch.float32, torch.bfloat16])
)
def test_gradients_of_one_reading_are_those_of_several(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    rows, out, rank = shape
    dy, xa = random(rows, out, seed=0, device=device, dtype=dtype), random(rows, rank, seed=1, device=device)
    y, b = random(rows, out, seed=2, device=device, dtype=dtype), random(out, rank, seed=3, device=device, dtype=dtype)
    xa, magnitude = xa.to(dtype), 1 + random(out, seed=4, device=device).abs()
    dxa, db, dm = dy_gradients(dy, b, xa, y, magnitude, scale=1.5)
    expected_dxa, expected_db = skinny_dy(dy, b, xa, scale=1.5)
    assert torch.equal(dxa, expected_dxa)
    assert_close(db, expected_db, ulps=4)
    expected = (dy.double() * y.double()).sum(dim=0) / magnitude.double()
    # Sums of terms of both signs, in fp32: their rounding is that of the sum of their sizes.
    sizes = (dy.double() * y.double()).abs().sum(dim=0) / magnitude.double()
    assert bool(((dm.double() - expected).abs() <= 8 * torch.finfo(torch.float32).eps * sizes).all())
