"""NF4 on the CPU agrees with bitsandbytes and with the reference, bit for bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from distlora_kernels import nf4_cpu, reference
from distlora_kernels.formats import nf4
from support.bitsandbytes_weights import DTYPES, SHAPES, bitsandbytes_dequantize, random_weight, with_zero_block


def test_levels_and_dynamic_map_are_bitsandbytes_own() -> None:
    assert torch.equal(torch.tensor(reference.NF4_LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(reference.dynamic_map(), bnb.create_dynamic_map())
    assert reference.dynamic_map()[reference.ZERO_SCALE] == 0


@pytest.mark.parametrize("quantize", [reference.quantize_blocks, nf4_cpu.quantize_blocks], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_absmax_equal_bitsandbytes(quantize, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = with_zero_block(random_weight(shape, dtype))
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, absmax = quantize(weight.flatten())
    whole_bytes = weight.numel() // 2
    assert torch.equal(codes.view(-1)[:whole_bytes], expected.view(-1)[:whole_bytes])
    if weight.numel() % 2:
        assert codes.view(-1)[whole_bytes] >> 4 == expected.view(-1)[whole_bytes] >> 4
    num_blocks = -(-weight.numel() // 64)
    assert torch.equal(absmax.view(-1)[:num_blocks], state.absmax)
    assert not absmax.view(-1)[num_blocks:].any()
    padding = codes.view(-1)[-(-weight.numel() // 2) :]
    assert (padding == reference.ZERO_CODE * 17).all(), "padding must be codes of zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", ["reference", "bitsandbytes", "table"])
def test_dequantizing_bitsandbytes_own_bytes_equals_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], path: str
) -> None:
    if path == "table":
        monkeypatch.setattr(nf4_cpu, "has_bitsandbytes", lambda: False)
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = bitsandbytes_dequantize(packed, state, shape)

    groups = nf4.num_groups(weight.numel())
    codes = torch.full((groups * nf4.GROUP_BYTES,), 0x77, dtype=torch.uint8)
    codes[: packed.numel()] = packed.view(-1)
    scales = torch.zeros(groups * nf4.BLOCKS_PER_GROUP, dtype=torch.uint8)
    scales[: state.absmax.numel()] = state.absmax
    parts = (codes.view(groups, -1), scales.view(groups, -1), state.state2.absmax, state.offset)
    if path == "reference":
        actual = reference.nf4_dequantize(*parts, shape=shape, dtype=dtype)
    else:
        actual = nf4.NF4.dequantize(parts, shape=shape, dtype=dtype)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_level_is_the_exactly_nearest_entry(shape: tuple[int, ...]) -> None:
    weight = random_weight(shape, torch.float32)
    num_blocks = -(-weight.numel() // 64)
    _, absmax = nf4.quantize_blocks(weight.flatten())
    _, scales, group_scale, offset = nf4.nf4_quantize(weight)
    assert offset == torch.tensor(math.fsum(absmax.view(-1)[:num_blocks].tolist()) / num_blocks)
    # A tensor of one block has absmax = offset and group_scale 0.
    divisor = torch.where(group_scale > 0, group_scale, 1.0)
    normalized = ((absmax - offset) / divisor[:, None]).view(-1)[:num_blocks].double()
    distance = (normalized[:, None] - reference.dynamic_map().double()[None, :]).abs()
    chosen = distance.gather(1, scales.view(-1)[:num_blocks, None].long()).squeeze(1)
    assert torch.equal(chosen, distance.min(dim=1).values)


@pytest.mark.parametrize("quantize", [reference.quantize_blocks, nf4_cpu.quantize_blocks], ids=["reference", "cpu"])
def test_a_weight_on_a_midpoint_goes_to_the_lower_level(quantize) -> None:
    midpoints = torch.tensor(reference.nf4_midpoints())
    block = torch.zeros(64)
    block[0] = 1.0  # absmax 1: the other weights are their own normalized values.
    block[1:16] = midpoints
    codes, _ = quantize(block)
    index = torch.stack((codes.view(-1)[:8] >> 4, codes.view(-1)[:8] & 15), dim=1).view(-1)
    assert index[1:16].tolist() == list(range(15))


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0371, 1e-40])
def test_the_weights_around_midpoints_and_ends_of_bins_have_the_codes_of_the_reference(scale: float) -> None:
    ends = torch.arange(-nf4_cpu.BINS, nf4_cpu.BINS + 1) / nf4_cpu.BINS
    above = below = torch.cat((torch.tensor(reference.nf4_midpoints()), ends))
    points = [above]
    for _ in range(4):
        above, below = (torch.nextafter(each, torch.tensor(end)) for each, end in ((above, 2.0), (below, -2.0)))
        points += [above, below]
    blocks = torch.zeros(-(-sum(map(len, points)) // 63), 64)
    blocks[:, 0] = 1.0
    flat = torch.nn.functional.pad(torch.cat(points).clamp(-1, 1), (0, blocks[:, 1:].numel() - sum(map(len, points))))
    blocks[:, 1:] = flat.view(-1, 63)
    own, expected = (
        quantize(blocks.flatten() * scale) for quantize in (nf4_cpu.quantize_blocks, reference.quantize_blocks)
    )
    assert torch.equal(own[0], expected[0])
    assert torch.equal(own[1], expected[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_of_a_weight_are_quantized_as_the_whole_is(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what is quantized at once, and of no whole groups; by threads of one thread each."""
    before = torch.get_num_threads()
    monkeypatch.setattr(nf4_cpu, "PIECE_GROUPS", 16 // threads)
    torch.set_num_threads(threads)
    try:
        check_pieces()
        with torch.inference_mode():
            check_pieces()
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == threads, "what later threads begin with"
    finally:
        torch.set_num_threads(before)


def check_pieces() -> None:
    weight = random_weight((nf4_cpu.PIECE_GROUPS + 2, nf4.GROUP + 1), torch.bfloat16).flatten()
    for own, expected in zip(nf4_cpu.quantize_blocks(weight), reference.quantize_blocks(weight), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_quantizing_slices_of_groups_equals_slices_of_the_whole(cut: int) -> None:
    weight = random_weight((129, 640), torch.bfloat16).flatten()
    codes, absmax = nf4.quantize_blocks(weight)
    parts = [nf4.quantize_blocks(part) for part in weight.split(cut * nf4.GROUP)]
    assert torch.equal(torch.cat([part[0] for part in parts]), codes)
    assert torch.equal(torch.cat([part[1] for part in parts]), absmax)
    sums = [nf4.absmax_group_sums(part[1]) for part in parts]
    assert torch.equal(torch.cat(sums), nf4.absmax_group_sums(absmax))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    weight = random_weight((256, 128), torch.float32)
    weight[200, 7] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        nf4.nf4_quantize(weight)


def test_the_import_of_bitsandbytes_reaches_no_kernel_of_the_hub(tmp_path: Path) -> None:
    """On a processor with AVX512-BF16 it asks `kernels` for one (tests/launcher/test_confined.py sees that there)."""
    (tmp_path / "kernels.py").write_text("def get_kernel(name): return name")
    (tmp_path / "bitsandbytes.py").write_text(
        "try:\n    from kernels import get_kernel\nexcept ImportError:\n    get_kernel = None\n"
    )
    code = (
        "from distlora_kernels.nf4_cpu import has_bitsandbytes; assert has_bitsandbytes()\n"
        "import bitsandbytes; assert bitsandbytes.get_kernel is None\n"
        "from kernels import get_kernel; assert get_kernel('a') == 'a'\n"
    )
    search = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": search}, check=True)
