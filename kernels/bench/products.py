"""Time dequantization, NF4's beside bitsandbytes', and compare the adapter's products with the library's.

Letters: M rows, I in features, O out features, R rank.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX
from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up

from .problem import BLOCK_FORMATS, SCALE, Group, normal, random_weight
from .table import Candidate, Place, Rates, Row, judge

DEQUANTIZATION, TO_BF16 = "Dequantization", f"{NF4.name} to bf16"
SKINNY, LIBRARY = "Products of the adapter", "library GEMM"
OURS = "ours"

Run = Callable[[], Mapping[str, Tensor]]


def dequantize_rows(groups: Sequence[Group], device: torch.device, rates: Rates | None) -> Iterator[Row]:
    """Yield the rows of dequantization, for every distinct shape."""
    for shape in dict.fromkeys(shape for group in groups for shape in group.shapes):
        label = f"{shape[0]}x{shape[1]}"
        place = Place(section=DEQUANTIZATION, shape=label, num_rows=0, device=device, rates=rates)
        yield from judge(place, _dequantizations(shape, device))


def _dequantizations(shape: tuple[int, int], device: torch.device) -> Iterator[Candidate]:
    generator, out = torch.Generator(device).manual_seed(0), torch.empty(shape, dtype=torch.bfloat16, device=device)
    for format in (NF4, NF4_ABSMAX, *BLOCK_FORMATS):
        parts, dense = random_weight(format, shape, device, generator)
        ours = Candidate(
            name=OURS,
            task=f"{format.name} to bf16",
            run=partial(_named, partial(FrozenWeight(parts, shape, format).dense, out.dtype, out)),
            expected={"w": dense},
            floor=(format.num_bytes(shape) + out.nbytes, 0.0),
        )
        yield ours
        if format is NF4 and has_bitsandbytes():
            from bitsandbytes import functional

            # With nested statistics, as Linear4bit calls it, on weights with our codes.
            packed, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            theirs = partial(functional.dequantize_4bit, packed, state)
            yield dataclasses.replace(ours, name="bitsandbytes dequantize_4bit", run=partial(_named, theirs))


def _named(dequantize: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {"w": dequantize()}


def skinny_rows(
    groups: Sequence[Group], counts: Sequence[int], rank: int, device: torch.device, rates: Rates | None
) -> Iterator[Row]:
    """Yield the rows of the adapter's products, for every distinct shape and M."""
    for shape in dict.fromkeys(shape for group in groups for shape in group.shapes):
        for count in counts:
            place = Place(section=SKINNY, shape=f"{shape[0]}x{shape[1]}", num_rows=count, device=device, rates=rates)
            yield from judge(place, _skinny_products(shape, count, rank, device), baseline=LIBRARY)


def _skinny_products(shape: tuple[int, int], m: int, r: int, device: torch.device) -> Iterator[Candidate]:
    (out, features), generator = shape, torch.Generator(device).manual_seed(0)
    x, dy = normal((m, features), device, generator), normal((m, out), device, generator)
    a, b = normal((r, features), device, generator), normal((out, r), device, generator)
    xa, dxa = normal((m, r), device, generator), normal((m, r), device, generator)
    wide_x, wide_dy, wide_xa = x.float(), dy.float(), xa.float()

    def ours_dy() -> dict[str, Tensor]:
        return dict(zip(("dxa", "db"), skinny_dy(dy, b, xa, scale=SCALE), strict=True))

    # Each reads or writes its large operand once.
    tasks: tuple[tuple[str, Run, Run, dict[str, Tensor], Tensor], ...] = (
        ("x A^T", lambda: {"xa": x @ a.T}, lambda: {"xa": skinny_down(x, a)}, {"xa": wide_x @ a.float().T}, x),
        ("(x A^T) B^T", lambda: {"y": xa @ b.T}, lambda: {"y": skinny_up(xa, b)}, {"y": wide_xa @ b.float().T}, dy),
        (
            "dY B, dB",
            lambda: {"dxa": dy @ b, "db": (dy.T @ xa) * SCALE},
            ours_dy,
            {"dxa": wide_dy @ b.float(), "db": SCALE * (wide_dy.T @ wide_xa)},
            dy,
        ),
        ("dA", lambda: {"da": dxa.T @ x}, lambda: {"da": skinny_grad(dxa, x)}, {"da": dxa.float().T @ wide_x}, x),
    )
    for task, library, ours, expected, large in tasks:
        nbytes = large.nbytes + 2 * r * (m + large.shape[1])
        for name, run in ((LIBRARY, library), (OURS, ours)):
            yield Candidate(name=name, task=task, run=run, expected=expected, floor=(nbytes, 0.0))
