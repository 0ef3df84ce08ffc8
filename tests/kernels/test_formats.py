"""The formats of frozen weights: values of the reference libraries bit for bit, and Triton's equal to the CPU's."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import gguf
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from distlora_kernels import dispatch
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.formats import FORMATS
from distlora_kernels.formats.base import Format, dtype_of
from distlora_kernels.formats.flat import E2M1, BlockFormat
from distlora_kernels.formats.fp8_block import FP8_BLOCK, in_tiles
from distlora_kernels.formats.gguf import Gguf
from distlora_kernels.formats.integers import INT8, Int4
from distlora_kernels.reference import GROUP
from support.tiers import ci, diagonal

ALL = [name for name, format in FORMATS.items() if isinstance(format, BlockFormat)]  # NF4 has test_nf4.py.
# All branches of the int4 class and of its kernel.
DEFAULT = [name for name in ALL if not name.startswith("int4")] + ["int4_g32", "int4_g128_fp16_zeros"]
REST = [name for name in ALL if name not in DEFAULT]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
# One weight; rows that are no whole blocks; rows that straddle groups; one weight more than a group; two experts.
SHAPES = [(1, 1), (7, 33), (171, 96), (1, GROUP + 1), (2, 130, 256)]

Parts = tuple[Tensor, ...]


def random_parts(format: Format, groups: int, seed: int = 0) -> Parts:
    """Every code and every byte of a scale, NaN among them; other scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for part in format.parts:
        shape = (groups, *part.shape)
        if part.dtype == "uint8":
            most = 17 if part.name == "zeros" else 256
            parts.append(torch.randint(most, shape, generator=generator, dtype=torch.uint8))
        else:
            parts.append((torch.randn(shape, generator=generator) * 0.3).to(dtype_of(part)))
    return tuple(parts)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Assert that all bits are the same; NaN are alike."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    words = {2: torch.int16, 4: torch.int32}[found.element_size()]
    found, expected = (
        values.nan_to_num(0.0, math.inf, -math.inf).contiguous().view(words) for values in (found, expected)
    )
    assert torch.equal(found, expected)


def scheme(strategy: str, kind: str, size: int, *, symmetric: bool = True) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=4, type=kind, strategy=strategy, group_size=size, symmetric=symmetric)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def mxfp4_values(parts: Parts, dtype: torch.dtype) -> Tensor:
    codes, scales = parts
    weights = convert_moe_packed_tensors(codes.view(1, -1, 1, 16), scales.view(1, -1, 1), dtype=dtype)
    return weights[0].T.reshape(-1)


def nvfp4_values(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return the library's values, bf16; its own functions give them in fp32 too."""
    tensors = []
    for codes, scales, global_scale in zip(*parts, strict=True):
        packed, scale = codes.view(64, 128), scales.view(64, 16).view(torch.float8_e4m3fn)
        arguments = scheme("tensor_group", "float", 16)
        if dtype == torch.bfloat16:
            compressed = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale[None]}
            compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
            tensors.append(compressor.decompress(compressed, arguments)["weight"])
        else:
            values = unpack_fp4_from_uint8(packed, 64, 256, torch.float32)
            found = dequantize(values, scale.float(), args=arguments.weights, global_scale=global_scale[None])
            tensors.append(found.to(dtype))
    return torch.cat(tensors).view(-1)


def int4_values(format: Int4, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return the library's values, which have the dtype of the scales."""
    codes, scales, *zeros = (part.reshape(16 * part.shape[0], -1) for part in parts)
    scale_dtype = dtype if scales.dtype == dtype else torch.float32
    compressed = {"weight_packed": codes.view(torch.int32), "weight_scale": scales.to(scale_dtype)}
    compressed["weight_shape"] = torch.tensor((len(codes), GROUP // 16))
    for zero in zeros:
        compressed["weight_zero_point"] = pack_to_int32(zero.to(torch.int8) - 8, 4, packed_dim=0)
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    return (
        compressor.decompress(compressed, scheme("group", "int", format.block, symmetric=not zeros))["weight"]
        .to(dtype)
        .view(-1)
    )


def reference_values(format: Format, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return all weights that the groups hold, the last ones too, as the reference library computes them."""
    if isinstance(format, Gguf):
        stored = parts[0].numpy().reshape(-1, format.nbytes)
        with warnings.catch_warnings(action="ignore"):  # numpy's, of products with NaN.
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[format.name.upper()])
        return torch.from_numpy(values).view(-1).to(dtype)
    if isinstance(format, Int4):
        return int4_values(format, parts, dtype)
    return {"mxfp4": mxfp4_values, "nvfp4": nvfp4_values}[format.name](parts, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *diagonal([name for name in DEFAULT if name not in ("int8", "fp8_block")], DTYPES),
        *(ci(name, torch.bfloat16) for name in REST),
    ],
    ids=str,
)
def test_values_are_those_of_the_reference_library(name: str, dtype: torch.dtype) -> None:
    format = FORMATS[name]
    for seed, shape in enumerate(SHAPES):
        parts = random_parts(format, format.num_groups(shape), seed)
        if name == "mxfp4":
            parts[1].clamp_(max=254)  # OCP's NaN is 2^128 for torch 2.13's ldexp, Inf for those before.
        if len(parts) == 3 and name != "nvfp4":
            parts[2].clamp_(max=15)  # The library packs zero points in 4 bits.
        expected = reference_values(format, parts, dtype)[: math.prod(shape)].view(shape)
        assert_same(format.dequantize(parts, shape=shape, dtype=dtype), expected)
        out = torch.full(shape, 12345.0, dtype=dtype)
        assert format.dequantize(parts, shape=shape, dtype=dtype, out=out).data_ptr() == out.data_ptr()
        assert_same(out, expected)


def test_a_zero_point_of_16_is_subtracted() -> None:
    """GPTQ stores zero points less one."""
    format = FORMATS["int4_g64_zeros"]
    codes, scales, zeros = random_parts(format, 1)
    weight = format.dequantize((codes, scales, torch.full_like(zeros, 16)), shape=(GROUP,), dtype=torch.bfloat16)
    unpacked = torch.stack((codes & 15, codes >> 4), dim=-1).view(-1, 64).to(torch.bfloat16)
    assert_same(weight, ((unpacked - 16) * scales.view(-1, 1)).view(-1))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 130), (300, 2300), (4, 64, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_values_are_those_of_transformers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, columns = math.prod(shape[:-1]), shape[-1]
    down, across = -(-rows // 128), -(-columns // 128)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.randn(down, across, generator=generator)
    parts = (in_tiles(codes), scales.flatten())
    found = FP8_BLOCK.dequantize(parts, shape=shape, dtype=dtype)
    weight = codes.view(torch.float8_e4m3fn)
    assert_same(found, _dequantize_fp8_weight(weight, scales, [128, 128], torch.float32).to(dtype).view(shape))
    if rows % 128 == columns % 128 == 0:
        assert_same(found, Fp8Dequantize(None)._dequantize_one(weight, scales, dtype).view(shape))


def in_triton(format: Format, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return what the Triton kernel writes, on a GPU or in the interpreter, over memory that held other numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.full(shape, 12345.0, dtype=dtype, device=device)
    interpreter = contextlib.nullcontext() if device == "cuda" else dispatch.interpreted()
    with interpreter, warnings.catch_warnings(action="ignore"):  # numpy's, of products with NaN.
        format.dequantize([part.to(device) for part in parts], shape=shape, dtype=dtype, out=out)
    return out.cpu()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_numbers_at_the_ends_of_fp32_are_exact(name: str) -> None:
    """Powers from 2^-127 to infinity; scales that are subnormal in e4m3, and 0."""
    format = FORMATS[name]
    codes, scales, *rest = random_parts(format, 1)
    scales[0] = torch.arange(scales.numel()).to(torch.uint8)
    codes[0] = (torch.arange(codes.numel()) // 8 % 16 * 17).to(torch.uint8)
    levels = torch.tensor(E2M1, dtype=torch.float64)[(codes & 15).long()].repeat_interleave(2, dim=1)
    factor = torch.ldexp(torch.ones(scales.shape, dtype=torch.float64), scales.int() - 127)
    if name == "nvfp4":
        rest = [torch.tensor([3.0])]
        factor = (scales.view(torch.float8_e4m3fn).float() / 3.0).double()
    expected = (levels * factor.repeat_interleave(format.block, dim=1)).float().view(-1)
    parts = (codes, scales, *rest)
    assert_same(format.dequantize(parts, shape=(GROUP,), dtype=torch.float32), expected)
    assert_same(in_triton(format, parts, (GROUP,), torch.float32), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [*diagonal(DEFAULT, DTYPES), *(ci(name, torch.bfloat16) for name in REST)], ids=str
)
def test_triton_writes_the_same_values(name: str, dtype: torch.dtype) -> None:
    format = FORMATS[name]
    shapes = (
        [(300, 130), (1, 5), (3, 1), (2, 128, 256)] if format.tile else [(1, 1), (7, 33), (1, GROUP + 1), (2, 96, 128)]
    )
    for seed, shape in enumerate(shapes):
        parts = random_parts(format, format.num_groups(shape), seed)
        assert_same(in_triton(format, parts, shape, dtype), format.dequantize(parts, shape=shape, dtype=dtype))


@pytest.mark.parametrize("name", ["mxfp4", "int4_g128_fp16_zeros", "fp8_block", "q4_0", "q6_K", "nf4"])
def test_experts_without_rows_are_not_dequantized(name: str) -> None:
    """One expert at a time on the CPU. On a GPU half a group is left out if no expert in it has rows."""
    format, rows = FORMATS[name], torch.tensor([0, 2, 0, 0, 1, 0])
    shape, ends = (6, 200, 130) if format.tile else (6, 100, 192), rows.cumsum(0).int()
    parts = random_parts(format, format.num_groups(shape)) + ((torch.tensor(0.1),) if format.replicated else ())
    expected = format.dequantize(parts, shape=shape, dtype=torch.bfloat16)
    chosen = (rows > 0)[:, None, None].expand(shape)
    # Weights of a program: half of a tile's rows, or a run.
    runs = torch.arange(6 * 200) // 64 if format.tile else torch.arange(math.prod(shape)) // 8192
    per_run = chosen[..., 0] if format.tile else chosen
    used = torch.zeros(int(runs[-1]) + 1).index_add_(0, runs, per_run.flatten().float())[runs] > 0
    written = used.view(6, 200, 1).expand(shape) if format.tile else used.view(shape)
    assert not written.all()
    interpreter = contextlib.nullcontext() if torch.cuda.is_available() else dispatch.interpreted()
    for where, touched in ((contextlib.nullcontext(), chosen), (interpreter, written)):
        device = "cuda" if where is interpreter and torch.cuda.is_available() else "cpu"
        out = torch.full(shape, 12345.0, dtype=torch.bfloat16, device=device)
        with where, warnings.catch_warnings(action="ignore"):
            format.dequantize_chosen([part.to(device) for part in parts], ends.to(device), out)
        assert_same(out.cpu(), torch.where(touched, expected, 12345.0))


@pytest.mark.parametrize("name", DEFAULT)
def test_parts_of_a_weight_are_those_of_the_whole(name: str) -> None:
    """Groups alone, as a rank has them; experts; and rows, also of blocks that straddle them, none, and one twice."""
    format = FORMATS[name]
    for shape in ((3, 200, 128), (300, 200), (1, 7), (GROUP + 1, 1)):
        parts = random_parts(format, format.num_groups(shape))
        whole = format.dequantize(parts, shape=shape, dtype=torch.bfloat16)
        if len(shape) == 3:
            for expert in range(shape[0]):
                assert_same(format.slice(parts, shape, expert, torch.bfloat16), whole[expert])
            continue
        rows = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
        for chosen in (rows, rows[:0]) if format.tile is None else ():
            assert_same(format.dequantize_rows(parts, shape, chosen, torch.bfloat16), whole[chosen])
    groups = format.groups_of(parts, 1, 2)
    if format.tile is None:
        assert_same(format.dequantize(groups, shape=(1, 1), dtype=torch.bfloat16), whole[GROUP:])


@given(st.data())
@pytest.mark.parametrize("name", ["nvfp4", "int8", "q4_1", "q6_K"])
def test_rows_of_any_shape(name: str, data: st.DataObject) -> None:
    format = FORMATS[name]
    shape = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 600)), label="shape")
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=20), label="rows"), dtype=torch.long)
    parts = random_parts(format, format.num_groups(shape))
    whole = format.dequantize(parts, shape=shape, dtype=torch.float32)
    assert_same(format.dequantize_rows(parts, shape, rows, torch.float32), whole[rows])


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e-41, 1e37], ids=str)
def test_int8_rounds_to_the_nearest_code(magnitude: float) -> None:
    weights = torch.randn(3 * GROUP + 130, generator=torch.Generator().manual_seed(0)) * magnitude
    weights[256:384] = 0
    codes, scales = INT8.quantize(weights)
    found = INT8.dequantize((codes, scales), shape=weights.shape, dtype=torch.float32)
    step = scales.view(-1, 1).expand(-1, 128).reshape(-1)[: len(weights)]
    assert ((found - weights).abs() <= step * 0.5001).all()
    assert (found[256:384] == 0).all()
    if magnitude > 1e-36:
        assert (codes.view(torch.int8).view(-1, 128)[: len(weights) // 128 + 1].abs().amax(dim=1) == 127).sum() > 380
    # A rank quantizes its own groups.
    for part, alone in zip((codes, scales), INT8.quantize(weights[GROUP : 3 * GROUP]), strict=True):
        assert torch.equal(part[1:3], alone)


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e-41, 1e37], ids=str)
def test_fp8_rounds_to_the_nearest_number(magnitude: float) -> None:
    weight = torch.randn(300, 140, generator=torch.Generator().manual_seed(0)) * magnitude
    weight[:128, :128] = 0
    codes, scales = FP8_BLOCK.quantize(in_tiles(weight).view(-1))
    found = FP8_BLOCK.dequantize((codes, scales), shape=weight.shape, dtype=torch.float32)
    # 3 mantissa bits: half a step is 1/16 of the number, and of the smallest normal number below it.
    error, step = (found - weight).abs(), in_tiles(weight).abs() / 16 + scales[:, None] * 2**-10
    assert (in_tiles(error) <= step * 1.001).all()
    assert (found[:128, :128] == 0).all()
    if magnitude > 1e-36:
        assert ((codes & 127).amax(dim=1) == 126)[scales > 1e-37].all()
    for part, alone in zip((codes, scales), FP8_BLOCK.quantize(in_tiles(weight)[1:3].view(-1)), strict=True):
        assert torch.equal(part[1:3], alone)


@pytest.mark.parametrize("format", [INT8, FP8_BLOCK], ids=lambda format: format.name)
@pytest.mark.parametrize("fault", [math.nan, -math.inf])
def test_nan_and_inf_are_not_quantized(format: Format, fault: float) -> None:
    weights = torch.ones(GROUP)
    weights[-1] = fault
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        format.quantize(weights)


def test_every_layout_has_a_format_and_the_bytes_of_its_tensors() -> None:
    assert FORMATS.keys() == FORMAT_LAYOUTS.keys()
    for format in FORMATS.values():
        for part in (*format.parts, *format.replicated):
            assert part.nbytes == torch.empty(part.shape, dtype=dtype_of(part)).nbytes
