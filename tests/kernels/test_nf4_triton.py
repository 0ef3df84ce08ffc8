"""The Triton kernels of NF4: every bit as the reference has it, into memory that held NaN before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.formats import nf4
from support.bitsandbytes_weights import random_weight, with_zero_block
from support.tiers import diagonal

GROUP, BLOCK = nf4.GROUP, nf4.BLOCK
# One element, odd numbers, rows that straddle groups, exactly one group, and 3 groups with one weight more.
SHAPES = [(1, 1), (1, 63), (7, 33), (1001, 96), (128, 128), (1, 3 * GROUP + 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def random_parts(groups: int, device: torch.device, seed: int = 0) -> Parts:
    """Every code and every map entry, absmax of both signs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (groups, nf4.GROUP_BYTES), generator=generator, dtype=torch.uint8)
    scales = torch.randint(256, (groups, nf4.BLOCKS_PER_GROUP), generator=generator, dtype=torch.uint8)
    group_scale = torch.rand(groups, generator=generator) * 0.1
    return codes.to(device), scales.to(device), group_scale.to(device), torch.tensor(0.037, device=device)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantizing_equals_the_reference(
    triton_device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parts = random_parts(nf4.num_groups(math.prod(shape)), triton_device)
    absmax = torch.rand(parts[1].shape, generator=torch.Generator().manual_seed(1)).to(triton_device)
    for format, definition, operands in (
        (nf4.NF4, reference.nf4_dequantize, parts),
        (nf4.NF4_ABSMAX, reference.dequantize_blocks, (parts[0], absmax)),
    ):
        expected = definition(*operands, shape=shape, dtype=dtype)
        out = poisoned(shape, dtype, triton_device)
        assert format.dequantize(operands, shape=shape, dtype=dtype, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, expected)
        assert torch.equal(format.dequantize(operands, shape=shape, dtype=dtype), expected)


@pytest.mark.parametrize(
    ("shape", "ranks", "first_rank", "gap"), [((100, 128), 16, 8, 64), ((37, 192), 70, 3, 128), ((300, 64), 3, 0, 64)]
)
def test_a_weight_is_dequantized_beside_columns(
    triton_device: torch.device, shape: tuple[int, int], ranks: int, first_rank: int, gap: int
) -> None:
    parts = random_parts(nf4.num_groups(math.prod(shape)), triton_device)
    absmax = torch.rand(parts[1].shape, generator=torch.Generator().manual_seed(1)).to(triton_device)
    b = torch.randn(shape[0], ranks, generator=torch.Generator().manual_seed(2)).to(triton_device, torch.bfloat16)
    columns = torch.zeros(shape[0], gap, dtype=torch.bfloat16, device=triton_device)
    columns[:, first_rank : first_rank + ranks] = b
    plain = (parts[0], absmax)
    for format, operands, definition in (
        (nf4.NF4, parts, reference.nf4_dequantize),
        (nf4.NF4_ABSMAX, plain, reference.dequantize_blocks),
    ):
        expected = torch.cat((definition(*operands, shape=shape, dtype=torch.bfloat16), columns), dim=1)
        out = poisoned((shape[0], shape[1] + gap), torch.bfloat16, triton_device)
        nf4.dequantize_beside(format, operands, shape, b, first_rank=first_rank, out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("each", [(2, 64), (100, 192), (128, 128)], ids=str)  # Less than a tile, 2.3 tiles, two.
def test_experts_without_rows_are_not_dequantized(triton_device: torch.device, each: tuple[int, int]) -> None:
    """A tile (8,192 weights) is left out if no expert in it has rows: at the beginning, in the middle, at the end."""
    rows = torch.tensor([0, 0, 3, 0, 0, 0, 1, 2, 0, 0, 0])
    shape = (len(rows), *each)
    parts = random_parts(nf4.num_groups(math.prod(shape)), triton_device)
    out = poisoned(shape, torch.bfloat16, triton_device)
    nf4.NF4.dequantize_chosen(parts, rows.cumsum(0).int().to(triton_device), out)
    expected = reference.nf4_dequantize(*parts, shape=shape, dtype=torch.bfloat16)
    chosen = rows > 0
    assert torch.equal(out[chosen], expected[chosen])
    tiles = torch.arange(math.prod(shape)) // 8192
    used = chosen.repeat_interleave(math.prod(each))
    left_out = (torch.zeros(int(tiles[-1]) + 1).index_add_(0, tiles, used.float()) == 0)[tiles]
    assert out.flatten()[left_out].isnan().all()
    assert not out.flatten()[~left_out].isnan().any()
    assert left_out.any() == (math.prod(each) > 4096)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_slice_of_groups_is_dequantized_into_a_slice_of_the_weight(triton_device: torch.device, first: int) -> None:
    codes, scales, group_scale, offset = random_parts(5, triton_device)
    last = first + 2
    expected = reference.nf4_dequantize(codes, scales, group_scale, offset, shape=(5, GROUP), dtype=torch.bfloat16)
    weight = poisoned((5, GROUP), torch.bfloat16, triton_device)
    # group_scale[1:] starts at 4 bytes beyond any alignment.
    sliced = (codes[first:last], scales[first:last], group_scale[first:last], offset)
    nf4.NF4.dequantize(sliced, shape=(2 * GROUP,), dtype=torch.bfloat16, out=weight[first:last].view(-1))
    assert torch.equal(weight[first:last], expected[first:last])
    assert weight[:first].isnan().all()
    assert weight[last:].isnan().all()


@pytest.mark.parametrize(("shape", "dtype"), diagonal(SHAPES, DTYPES), ids=str)
def test_quantizing_equals_the_reference(
    triton_device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    flat = with_zero_block(random_weight(shape, dtype)).flatten()
    flat[-1] = -0.0
    codes, absmax = nf4.quantize_blocks(flat.to(triton_device))
    expected_codes, expected_absmax = reference.quantize_blocks(flat)
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(absmax.cpu(), expected_absmax)

    num_blocks = -(-flat.numel() // BLOCK)
    offset = torch.tensor(nf4.absmax_offset(nf4.absmax_group_sums(absmax), num_blocks), dtype=torch.float32)
    scales, group_scale = nf4.quantize_absmax(absmax, offset.to(triton_device), num_blocks)
    expected_scales, expected_group_scale = reference.quantize_absmax(expected_absmax, offset, num_blocks)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(group_scale.cpu(), expected_group_scale)


@pytest.mark.parametrize("magnitude", [1.0, 1e-41, 1e38], ids=["normal", "subnormal", "large"])
def test_quantizing_around_the_midpoints_equals_the_reference(triton_device: torch.device, magnitude: float) -> None:
    """The two neighbours of each midpoint too, which take the other code: nothing is lost to a fast division."""
    midpoints = torch.tensor(reference.nf4_midpoints())
    below, above = (torch.nextafter(midpoints, torch.tensor(to)) for to in (-math.inf, math.inf))
    flat = torch.cat((midpoints, torch.ones(1), below, above, torch.ones(17), torch.rand(GROUP // 2)))
    flat = torch.where(flat.abs() <= 1, flat, 0.0) * magnitude
    codes, absmax = nf4.quantize_blocks(flat.to(triton_device))
    expected_codes, expected_absmax = reference.quantize_blocks(flat)
    assert torch.equal(absmax.cpu(), expected_absmax)
    assert torch.equal(codes.cpu(), expected_codes)
    if magnitude == 1.0:
        first = torch.stack((codes.view(-1)[:8] >> 4, codes.view(-1)[:8] & 15), dim=1).view(-1)
        assert first[:15].tolist() == list(range(15)), "a weight on a midpoint goes to the lower level"


@pytest.mark.parametrize("side", [-math.inf, None, math.inf], ids=["below", "on", "above"])
def test_second_level_around_the_midpoints_equals_the_reference(
    triton_device: torch.device, side: float | None
) -> None:
    """The fp32 numbers next to each midpoint of the map, and the midpoint rounded to fp32."""
    entries = reference.dynamic_map().double()
    midpoints = ((entries[1:] + entries[:-1]) / 2).float()
    if side is not None:
        midpoints = torch.nextafter(midpoints, torch.tensor(side))
    absmax = torch.cat((midpoints, torch.ones(1))).view(1, -1).repeat(5, 1)  # The largest is 1, so that the scale is 1.
    absmax[3] *= 0.3
    num_blocks = 4 * 256 + 100
    offset = torch.zeros(())
    actual = nf4.quantize_absmax(absmax.to(triton_device), offset.to(triton_device), num_blocks)
    expected = reference.quantize_absmax(absmax, offset, num_blocks)
    assert torch.equal(actual[0].cpu(), expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_show_in_the_absmax(triton_device: torch.device, value: float, dtype: torch.dtype) -> None:
    weight = random_weight((256, 128), dtype)
    weight[200, 7] = value
    weight[200, 9] = math.inf  # A larger number beside NaN in its block.
    _, absmax = nf4.quantize_blocks(weight.flatten().to(triton_device))
    assert absmax.isfinite().logical_not().nonzero().tolist() == [[1, 200 * 2 - 256]]
    with pytest.raises(ValueError, match="NaN or Inf"):
        nf4.nf4_quantize(weight.to(triton_device))
