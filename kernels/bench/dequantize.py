"""Compare dequantization to bf16: NF4 with double quantization, and with plain absmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distlora_kernels import reference
from distlora_kernels.nf4 import dequantize_blocks, nf4_dequantize, nf4_quantize
from distlora_kernels.nf4_cpu import has_bitsandbytes

from . import costs
from .costs import Rates, Step
from .problem import Group, normal
from .table import Candidate, Place, Row, judge

SECTION, TASK = "Dequantization", "NF4 to bf16"
OURS, PLAIN_ABSMAX = "ours", "ours, plain absmax"


def rows(groups: Sequence[Group], device: torch.device, rates: Rates) -> Iterator[Row]:
    """Yield the rows of every distinct shape."""
    for shape in dict.fromkeys(shape for group in groups for shape in group.shapes):
        place = Place(section=SECTION, shape=f"{shape[0]}x{shape[1]}", num_rows=0, device=device, rates=rates)
        yield from judge(place, _candidates(shape, device))


def _candidates(shape: tuple[int, int], device: torch.device) -> Iterator[Candidate]:
    generator = torch.Generator(device).manual_seed(0)
    parts = nf4_quantize(normal(shape, device, generator))
    codes, absmax = parts[0], reference.dequantize_absmax(*parts[1:])
    dtype = torch.bfloat16
    expected = {"w": reference.nf4_dequantize(*parts, shape=shape, dtype=dtype)}
    out = torch.empty(shape, dtype=dtype, device=device)
    step = costs.dequantize(*shape)
    plain = Step(step.nbytes - absmax.numel() - 4 * absmax.shape[0] + absmax.nbytes)
    yield Candidate(
        name=OURS,
        task=TASK,
        run=lambda: {"w": nf4_dequantize(*parts, shape=shape, dtype=dtype, out=out)},
        expected=expected,
        steps=(step,),
        floor=(step.nbytes, 0.0),
    )
    yield Candidate(
        name=PLAIN_ABSMAX,
        task=TASK,
        run=lambda: {"w": dequantize_blocks(codes, absmax, shape=shape, dtype=dtype, out=out)},
        expected=expected,
        steps=(plain,),
        floor=(plain.nbytes, 0.0),
    )
    if has_bitsandbytes():
        yield _bitsandbytes(expected["w"], step)


def _bitsandbytes(dense: torch.Tensor, step: Step) -> Candidate:
    """Run dequantize_4bit with nested statistics, as Linear4bit calls it, on weights with our codes."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return Candidate(
        name="bitsandbytes dequantize_4bit",
        task=TASK,
        run=lambda: {"w": functional.dequantize_4bit(codes, state)},
        expected={"w": dense},
        steps=(Step(2.8 * dense.numel()), Step(0.0), Step(0.0)),
        floor=(step.nbytes, 0.0),
    )
