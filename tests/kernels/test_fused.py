"""Products that decode a quantized weight agree with fp64, and the right variant is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.formats import nf4
from distlora_kernels.operands import FrozenWeight
from support.closeness import assert_close
from support.tiers import diagonal

# M, O, I, R: M in every bucket of the tables; no O is a multiple of a tile; I = 320 leaves half a tile of codes, and
# its rows cross from one group into the next (O I > 16,384); R is padded, and beyond one tile of ranks (72).
SHAPES = [(1, 48, 64, 3), (16, 100, 320, 16), (37, 66, 192, 40), (64, 100, 320, 3), (130, 48, 320, 72)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("nan_memory")


class Operands:
    """Random operands of both products, rounded to `dtype`."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, nested: bool = True):
        m, o, i, r = shape
        generator = torch.Generator().manual_seed(m)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(dtype).to(device)

        dense = torch.randn(o, i, generator=generator) / i**0.5
        parts = nf4.nf4_quantize(dense) if nested else nf4.quantize_blocks(dense.reshape(-1))
        self.weight = FrozenWeight(
            tuple(part.to(device) for part in parts), (o, i), nf4.NF4 if nested else nf4.NF4_ABSMAX
        )
        self.x, self.xa, self.b, self.bias, self.addend = (random(*s) for s in ((m, i), (m, r), (o, r), (o,), (m, o)))
        # As columns of a wider product.
        self.xa = torch.cat([self.xa, torch.full_like(self.xa, torch.nan)], dim=1)[:, :r]
        self.dy, self.dxa, self.a = (random(*s) for s in ((m, o), (m, r), (r, i)))
        self.exact = self.weight.dense(dtype).double()


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Assert a few ulps in fp32 (sums of up to 400 products), else one rounding: 0.3 eps and a bit for the sum."""
    assert torch.isfinite(actual).all()
    assert_close(actual, exact, ulps=4 if actual.dtype == torch.float32 else 0.35)


@pytest.mark.parametrize(("shape", "dtype"), diagonal(SHAPES, DTYPES), ids=str)
def test_forward_is_the_exact_product_rounded_once(
    triton_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    p = Operands(shape, dtype, triton_device, nested=shape[0] != 37)
    y = fused.fused_linear(p.x, p.weight, addend=p.addend, xa=p.xa, b=p.b, bias=p.bias)
    base = p.x.double() @ p.exact.T
    assert_rounded_once(y, base + p.xa.double() @ p.b.double().T + p.addend.double() + p.bias.double())
    assert_rounded_once(fused.fused_linear(p.x, p.weight), base)


@pytest.mark.parametrize(("shape", "dtype"), diagonal(SHAPES, DTYPES), ids=str)
def test_backward_is_the_exact_product_rounded_once(
    triton_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    p = Operands(shape, dtype, triton_device, nested=shape[0] != 37)
    base = p.dy.double() @ p.exact
    assert_rounded_once(fused.fused_linear_dx(p.dy, p.weight, dxa=p.dxa, a=p.a), base + p.dxa.double() @ p.a.double())
    assert_rounded_once(fused.fused_linear_dx(p.dy, p.weight), base)


@pytest.mark.parametrize(("nested", "dtype"), diagonal([True, False], DTYPES), ids=str)
def test_the_decoded_weight_is_the_dequantized_one_bit_for_bit(
    triton_device: torch.device, dtype: torch.dtype, nested: bool
) -> None:
    """Products with the identity have one term each."""
    p = Operands((1, 52, 320, 1), dtype, triton_device, nested)
    weight = p.weight.dense(dtype)
    identity_i, identity_o = (torch.eye(n, dtype=dtype, device=triton_device) for n in (320, 52))
    assert torch.equal(fused.fused_linear(identity_i, p.weight), weight.T)
    assert torch.equal(fused.fused_linear_dx(identity_o, p.weight), weight)


@pytest.mark.parametrize("num_parts", [2, 5])
def test_a_split_sum_counts_every_term_once(triton_device: torch.device, num_parts: int) -> None:
    """5 parts of 3 tiles: no part is empty. bf16, where the parts themselves must stay in fp32."""
    from distlora_kernels import fused_triton

    p = Operands((3, 48, 320, 16), torch.bfloat16, triton_device)
    parts = list(p.weight.parts)
    y = fused_triton.linear(p.x, parts, 48, addend=p.addend, xa=p.xa, b=p.b, bias=p.bias, num_parts=num_parts)
    adapter = p.xa.double() @ p.b.double().T
    assert_rounded_once(y, p.x.double() @ p.exact.T + adapter + p.addend.double() + p.bias.double())
    p = Operands((3, 330, 64, 16), torch.bfloat16, triton_device)
    dx = fused_triton.dx(p.dy, list(p.weight.parts), 64, dxa=p.dxa, a=p.a, num_parts=num_parts)
    assert_rounded_once(dx, p.dy.double() @ p.exact + p.dxa.double() @ p.a.double())
