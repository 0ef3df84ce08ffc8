"""Check the GPU kernels beside library GEMMs and other libraries' sequences, time them, and print Markdown.

    python benchmarks/gpu_kernels.py                                  all sections, some minutes on a GPU
    python benchmarks/gpu_kernels.py linear --shapes llama-70b/o,llama-70b/down --m 16,8192     the bounds of linears
    python benchmarks/gpu_kernels.py --device cpu --shapes 192x128 --m 16       checks every row and times nothing

Exit status: 0; 1 if a variant gives a wrong result; 2 if it cannot run. Letters: M rows, I in features, O out features,
R rank, N columns.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora.results.record import Table
from distlora_kernels import elementwise, fused, operands, reference
from distlora_kernels.dispatch import interpreted
from distlora_kernels.formats import FORMATS, Format
from distlora_kernels.formats.base import dtype_of
from distlora_kernels.formats.flat import BlockFormat
from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX, nf4_quantize
from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import Adapter, FrozenWeight, Linear
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up
from measuring import measurement_notes, names_of, number, numbers, parser_of, show

Outputs = Mapping[str, Tensor]
OURS, LIBRARY, TRANSFORMERS, PLAIN = "ours", "library GEMM", "transformers", "plain bf16 GEMM"
SCRATCH, FUSED, FUSED_ALONE = "ours, scratch", "ours, fused", "ours, fused GEMM alone"
PEFT, UNSLOTH = "PEFT sequence, fp32 adapter", "Unsloth sequence"
DEQUANTIZATION, LINEARS = "Dequantization", "Adapted linears"
FORWARD, TRAINING = "forward", "forward + backward"
MOST_FUSED_ROWS = 512
"""Most rows of the fused variant: every tile of rows decodes the weight again."""

Shapes = tuple[tuple[int, int], ...]
"""(O, I) of linears of one input."""


def _model(name: str, hidden: int, queries: int, intermediate: int, keys: int = 1024) -> dict[str, Shapes]:
    return {
        f"{name}/qkv": ((queries, hidden), (keys, hidden), (keys, hidden)),
        f"{name}/o": ((hidden, queries),),
        f"{name}/gate-up": ((intermediate, hidden), (intermediate, hidden)),
        f"{name}/down": ((hidden, intermediate),),
    }


GROUPS = _model("llama-8b", 4096, 4096, 14336) | _model("llama-70b", 8192, 8192, 28672)
GROUPS |= _model("qwen3-32b", 5120, 8192, 25600)
MODELS = ",".join(dict.fromkeys(name.partition("/")[0] for name in GROUPS))


def groups_named(names: str) -> dict[str, Shapes]:
    """Parse `llama-70b`, `llama-70b/down` and `128x64+64x64` (O x I), separated by commas; return shapes by label."""
    groups: dict[str, Shapes] = {}
    for name in names.split(","):
        known = {key: shapes for key, shapes in GROUPS.items() if key == name or key.startswith(name + "/")}
        shapes = tuple((int(out), int(features)) for out, features in re.findall(r"(\d+)x(\d+)", name))
        if not known and (labelled(shapes, "+") != name or len({features for _, features in shapes}) != 1):
            raise argparse.ArgumentTypeError(
                f"{name!r} is not {MODELS}, one of their groups (llama-70b/down) or OxI+OxI..."
            )
        groups |= {f"{key} {labelled(found)}": found for key, found in known.items()} or {labelled(shapes): shapes}
    return groups


def labelled(shapes: Shapes, plus: str = " + ") -> str:
    """Return shapes as text."""
    return plus.join(f"{out}x{features}" for out, features in shapes)


SCALE = 2.0
"""Scale of the adapters: a power of two, so that rounding s B and B agree."""
BLOCK_FORMATS = tuple({each.label: each for each in FORMATS.values() if isinstance(each, BlockFormat)}.values())
"""The registered formats other than NF4, one of each label: of int4 the last, which has zero points."""


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return Gaussian bf16 numbers."""
    return torch.randn(shape, device=generator.device, dtype=torch.bfloat16, generator=generator)


def random_weight(format: Format, shape: tuple[int, int], generator: torch.Generator) -> tuple[FrozenWeight, Tensor]:
    """Return a random weight (O, I), and its values in bf16 by the format's definition."""
    dtype, device = torch.bfloat16, generator.device
    if not isinstance(format, BlockFormat):
        codes, *second = nf4_quantize(normal(shape, generator))
        absmax = reference.dequantize_absmax(*second)
        parts = (codes, *second) if format is NF4 else (codes, absmax)
        dense = reference.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)
        return FrozenWeight(parts, shape, format), dense
    stored = {}
    for part in format.parts:
        size = (format.num_groups(shape), *part.shape)
        if part.dtype == "uint8":
            stored[part.name] = torch.randint(256, size, dtype=torch.uint8, device=device, generator=generator)
            last = part.name
        else:
            stored[part.name] = torch.rand(size, device=device, generator=generator).add_(1).to(dtype_of(part))
    # These bytes hold scales, or everything: from 0x60 to 0x6F they are finite and of a like size in every format.
    stored[last] = stored[last] & 0x0F | 0x60
    parts = tuple(stored.values())
    return FrozenWeight(parts, shape, format), format.decode_into(torch.empty(shape, dtype=dtype, device=device), parts)


def masters(linear: Linear) -> tuple[Tensor, Tensor]:
    """Return the fp32 masters a and b of a linear's one adapter."""
    adapter = cast(Adapter, linear.adapter)
    return adapter.a, adapter.b


def outputs_of(
    forward: Callable[[], Iterable[Tensor]], leaves: Mapping[str, Tensor], dys: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Return forward's outputs y0..., and with `dys` their gradients: dx of the leaf x."""
    with torch.set_grad_enabled(dys is not None):
        ys = list(forward())
    found = {f"y{index}": y.detach() for index, y in enumerate(ys)}
    if dys:
        gradients = torch.autograd.grad(ys, list(leaves.values()), list(dys))
        found |= zip((f"d{name}" for name in leaves), gradients, strict=True)
    return found


def one_output(run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the output of `run` by its name."""
    return {"y0": run()}


@dataclass(kw_only=True)
class Row:
    """One way to run a task, and its figures: none if it is wrong or nothing is timed."""

    task: str
    name: str
    run: Callable[[], Outputs] | None
    """Returns the outputs by name; None once the row is judged."""
    expected: Outputs
    floor: tuple[float, float]
    """Fewest bytes and flops of the task."""
    section: str = ""
    shape: str = ""
    num_rows: int = 0
    """M; 0 without rows."""
    fault: str = ""
    ulps: float = math.nan
    seconds: float = 0.0
    peak: int = 0
    plain: float = 0.0
    """Seconds of the task's first row, which the others are compared with."""
    share: float = 0.0
    """Share of `seconds` that the task needs at the rate that binds."""
    binds: str = ""

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        figures = [f"WRONG: {self.fault}" if self.fault else "no figures", "", "", ""]
        if self.seconds:
            share = f"{self.share:.0%} of {self.binds}" if self.share else ""
            ratio = f"{self.seconds / self.plain:.2f}" if self.plain else ""
            figures = [f"{self.seconds * 1e6:.1f}", ratio, share, f"{self.peak / 2**20:.0f}"]
        return [self.shape, str(self.num_rows or ""), self.task, self.name, *figures, f"{self.ulps:.2f}"]


@dataclass(frozen=True)
class Gpu:
    """The device; bytes per second of a copy of 1 GiB (read and written), and flops per second of a bf16 GEMM."""

    device: torch.device
    bandwidth: float = 0.0
    """0 where nothing is timed."""
    gemm: float = 0.0

    def judge(self, section: str, shape: str, num_rows: int, rows: Iterable[Row]) -> list[Row]:
        """Return the rows with their figures: check all, then time the right ones in turns."""
        judged = []
        for row in rows:
            assert row.run is not None
            row.section, row.shape, row.num_rows = section, shape, num_rows
            try:
                row.ulps, row.fault = check(row.run(), row.expected, wide=row.task.startswith("d"))
            except Exception as error:  # Such a candidate is wrong; the others are still measured.
                traceback.print_exc()
                row.fault = f"raised {type(error).__name__} (its traceback is on stderr)"
            judged.append(row)
        right = [(row, row.run) for row in judged if not row.fault and row.run is not None]
        if self.bandwidth and right:
            peaks = [peak_bytes(run, self.device) for _, run in right]
            times = median_seconds([run for _, run in right], self.device)
            for (row, _), row.peak, row.seconds in zip(right, peaks, times, strict=True):
                first = next(each for each in judged if each.task == row.task)
                nbytes, flops = row.floor
                row.plain = first.seconds if section != DEQUANTIZATION else 0.0
                least = {f"copy bandwidth ({nbytes / row.seconds / 1e9:,.0f} GB/s)": nbytes / self.bandwidth}
                least["GEMM rate"] = flops / self.gemm
                row.binds = max(least, key=lambda name: least[name])
                row.share = least[row.binds] / row.seconds
        for row in judged:
            row.run, row.expected = None, {}  # They hold tensors.
        return judged


def worst_tile_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest ||actual - expected|| of a 64 x 64 tile over the mean norm of `expected`, in bf16 epsilons.

    One wrong tile shows, however large the matrix. NaN stays NaN. Raises ValueError if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = (actual.detach().float() - expected.float()).square_().flatten(0, -2)
    rows, columns = min(64, error.shape[0]), min(64, error.shape[1])
    error = torch.nn.functional.pad(error, (0, -error.shape[1] % columns, 0, -error.shape[0] % rows))
    tiles = error.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum(dim=(1, 3))
    scale = expected.float().square().mean() * (rows * columns)
    return float((tiles.max() / scale).sqrt()) / torch.finfo(torch.bfloat16).eps


def check(actual: Outputs, expected: Outputs, *, wide: bool) -> tuple[float, str]:
    """Return the worst error in epsilons of bf16, and the fault, "" if there is none; `wide`: all are gradients."""
    if actual.keys() != expected.keys():
        return math.nan, f"gives {sorted(actual)}, expected {sorted(expected)}"
    worst, faults = 0.0, []
    for name, value in expected.items():
        error, limit = worst_tile_error(actual[name], value), 4.0 if wide or name.startswith("d") else 2.0
        if not error <= limit:
            faults.append(f"{name} is {error:.2g} ulps off (at most {limit:g})")
        worst = error if error != error else max(worst, error)
    return worst, "; ".join(faults)


def median_seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the median seconds of each run on the GPU, by CUDA events, with a cold L2 and without CUDA graphs.

    The candidates take turns, so that a clock that drops as the GPU warms up drops for all.
    """
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)  # More bytes than any L2 cache holds.
    for run in runs:
        for _ in range(3):
            run()
    slowest = max(_timed(run, flush) for run in runs)
    rounds = min(max(int(0.3 / slowest), 5), 50)
    turns = [[_timed(run, flush) for run in runs] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _timed(run: Callable[[], object], flush: Tensor) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # They also give the host about 0.3 ms to queue short sequences, so that GPU time is measured; sequences of many
    # small operations show the host's time, as in training.
    for _ in range(3):
        flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of one run over the memory before it: outputs, temporaries and our scratch."""
    operands.reserve_scratch(device, 0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del outputs
    return peak


def measured_gpu(device: torch.device) -> Gpu:
    """Measure the GPU's copy of 1 GiB, and its bf16 GEMM of 8192 cubed."""
    source = torch.ones(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right, out = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(3))
    copy, gemm = median_seconds([lambda: target.copy_(source), lambda: torch.mm(left, right.T, out=out)], device)
    return Gpu(device, bandwidth=2 * 2**30 / copy, gemm=2 * 8192**3 / gemm)


def dequantizations(shape: tuple[int, int], device: torch.device) -> Iterator[Row]:
    """Yield ours for every format, and bitsandbytes' of NF4."""
    generator, out = torch.Generator(device).manual_seed(0), torch.empty(shape, dtype=torch.bfloat16, device=device)
    for format in (NF4, NF4_ABSMAX, *BLOCK_FORMATS):
        weight, dense = random_weight(format, shape, generator)
        task, floor = f"{format.name} to bf16", (format.num_bytes(shape) + out.nbytes, 0.0)
        run = partial(one_output, partial(weight.dense, out.dtype, out))
        yield Row(task=task, name=OURS, run=run, expected={"y0": dense}, floor=floor)
        if format is NF4 and has_bitsandbytes():
            from bitsandbytes import functional

            # With nested statistics, as Linear4bit calls it, on weights with our codes.
            stored = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            run = partial(one_output, partial(functional.dequantize_4bit, *stored))
            yield Row(task=task, name="bitsandbytes dequantize_4bit", run=run, expected={"y0": dense}, floor=floor)


Operation = Callable[..., Tensor | tuple[Tensor, ...]]
Task = tuple[dict[str, Tensor], Sequence[Tensor], Operation, Operation, float]
"""Operands with gradients by name, the others, the library's operation, ours, and the fewest bytes."""


def adapter_products(shape: tuple[int, int], m: int, r: int, device: torch.device) -> dict[str, Task]:
    """Return the adapter's products. Each reads or writes its large operand once."""
    (out, features), generator = shape, torch.Generator(device).manual_seed(0)
    sizes = ((m, features), (m, out), (r, features), (out, r), (m, r), (m, r))
    x, dy, a, b, xa, dxa = (normal(size, generator) for size in sizes)
    of_x, of_dy = (2 * (m * each + r * (m + each)) for each in (features, out))

    def library_dy(dy: Tensor, b: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
        return dy @ b, (dy.T @ xa) * SCALE

    return {
        "x A^T": ({}, (x, a), lambda x, a: x @ a.T, skinny_down, of_x),
        "(x A^T) B^T": ({}, (xa, b), lambda xa, b: xa @ b.T, skinny_up, of_dy),
        "dY B, dB": ({}, (dy, b, xa), library_dy, partial(skinny_dy, scale=SCALE), of_dy),
        "dA": ({}, (dxa, x), lambda dxa, x: dxa.T @ x, skinny_grad, of_x),
    }


def elementwise_operations(n: int, m: int, device: torch.device) -> dict[str, Task]:
    """Return the operations, with N as hidden size, inner columns, heads of up to 128 columns, and vocabulary."""
    generator = torch.Generator(device).manual_seed(0)
    x, second, weight = (normal(shape, generator) for shape in ((m, n), (m, n), (n,)))
    size = math.gcd(128, n)
    angles = torch.randn(1, m, size, device=device, generator=generator)
    heads = {name: part.view(1, m, -1, size).transpose(1, 2) for name, part in (("q", x), ("k", second[:, :size]))}
    labels = torch.arange(m, device=device) % n

    def own_losses(logits: Tensor) -> Tensor:
        elementwise.cross_entropy_(logits, labels)
        return logits

    def losses(logits: Tensor) -> Tensor:
        return elementwise.reference_cross_entropy(logits, labels)[1]

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return elementwise.reference_rotated(q, cos, sin), elementwise.reference_rotated(k, cos, sin)

    norm, own_norm = (
        partial(each, eps=1e-6, plus_one=False) for each in (elementwise.reference_rms_norm, elementwise.rms_norm)
    )
    gate, own_gate = (partial(each, activation="silu") for each in (elementwise.reference_gated, elementwise.gated))
    turn = 4 * (1 + size / n)
    return {
        "RMSNorm": ({"x": x}, (weight,), norm, own_norm, 5 * x.nbytes),
        "SwiGLU": ({"gate": x, "up": second}, (), gate, own_gate, 8 * x.nbytes),
        "rotary embedding": (heads, (angles.cos(), angles.sin()), rotated, elementwise.rotate, turn * x.nbytes),
        "cross-entropy": ({}, (x,), losses, own_losses, 2 * x.nbytes),
    }


def operation_rows(library: str, tasks: Mapping[str, Task]) -> Iterator[Row]:
    """Yield the library's and ours of each task, with backward where operands have gradients."""
    for task, (leaves, others, definition, ours, nbytes) in tasks.items():
        expected = on_own_operands(definition, leaves, others, torch.float32)()
        for name, operation in {library: definition, OURS: ours}.items():
            run = on_own_operands(operation, leaves, others, torch.bfloat16)
            yield Row(task=task, name=name, run=run, expected=expected, floor=(nbytes, 0.0))


def on_own_operands(
    operation: Operation, leaves: Mapping[str, Tensor], others: Sequence[Tensor], dtype: torch.dtype
) -> Callable[[], Outputs]:
    """Return a function that runs the operation and its backward, with operands of its own.

    Operations write over their operands: only the first run has the right ones, and is checked.
    """
    copied = partial(Tensor.to, dtype=dtype, copy=True, memory_format=torch.preserve_format)
    own = {name: copied(leaf).requires_grad_() for name, leaf in leaves.items()}
    rest = [copied(each) for each in others]
    # The first leaves have the outputs' shapes.
    dys = [torch.ones_like(each) for each in list(own.values())[: 2 if "q" in own else 1]]

    def forward() -> tuple[Tensor, ...]:
        outputs = operation(*(leaf.view_as(leaf) for leaf in own.values()), *rest)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return partial(outputs_of, forward, own, dys or None)


# The sequences of PEFT and Unsloth are plain torch, written after reading their code (2026-11): peft/tuners/lora/bnb.py
# over bitsandbytes' MatMul4Bit, and unsloth/kernels/fast_lora.py. Our dequantization, one launch, stands in for theirs,
# which takes three, so the sequences are faster than theirs by two launches and 0.3 bytes per weight.

Forward = Callable[[Tensor, tuple[Linear, ...]], Iterable[Tensor]]


def linear_rows(shapes: Shapes, m: int, rank: int, device: torch.device, format: Format) -> Iterator[Row]:
    """Yield every way of forward, and of forward and backward; other formats than NF4 have the scratch alone."""
    generator = torch.Generator(device).manual_seed(0)
    x = normal((m, shapes[0][1]), generator).requires_grad_()
    dys, leaves, linears, dense = [normal((m, out), generator) for out, _ in shapes], {"x": x}, [], []
    for index, shape in enumerate(shapes):
        frozen, weight = random_weight(format, shape, generator)
        # The fp32 masters are bf16 numbers, so that all have them. Without the adapter outputs would change by 10 %,
        # far beyond a check's limit.
        a = normal((rank, shape[1]), generator).mul_(shape[1] ** -0.5).float().requires_grad_()
        deviation = 2.5 * float(weight.float().square().mean().sqrt())
        b = normal((shape[0], rank), generator).mul_(deviation).float().requires_grad_()
        leaves |= {f"a{index}": a, f"b{index}": b}
        linears.append(Linear(frozen, Adapter(a, b, SCALE)))
        dense.append(weight)
    wide = x.detach().float().requires_grad_()

    def definition(*, adapted: bool) -> Iterator[Tensor]:
        for weight, linear in zip(dense, linears, strict=True):
            a, b = masters(linear)
            yield wide @ weight.float().T + (SCALE * (wide @ a.T) @ b.T if adapted else 0)

    wide_dys = [dy.float() for dy in dys]
    bare = outputs_of(partial(definition, adapted=False), {"x": wide}, wide_dys)
    adapted = outputs_of(partial(definition, adapted=True), leaves | {"x": wide}, wide_dys)
    nf4 = format is NF4
    fits = nf4 and m <= MOST_FUSED_ROWS and all(fused.supports(shape) for shape in shapes)
    ways: dict[str, Callable[..., Iterable[Tensor]]] = {SCRATCH: partial(lora_linears)}
    ways |= {PEFT: peft, UNSLOTH: unsloth} if nf4 else {}
    values, weights = m * (shapes[0][1] + sum(out for out, _ in shapes)), sum(map(math.prod, shapes))
    stored = sum(format.num_bytes(shape) for shape in shapes)
    for backward in (False, True):
        task, passes = (TRAINING if backward else FORWARD) + ("" if nf4 else f", {format.label}"), 1 + backward
        run: Callable[[], Outputs] = partial(plain_gemms, x.detach(), dense, dys if backward else [])
        plain = {name: value for name, value in bare.items() if backward or name[0] == "y"}
        floor = (2 * (weights + values) * passes, 2.0 * m * weights * passes)
        yield Row(task=task, name=PLAIN, run=run, expected=plain, floor=floor)
        row = partial(Row, task=task, expected={key: adapted[key] for key in adapted if backward or key[0] == "y"})
        floor = ((stored + 2 * values) * passes, floor[1])
        for name, way in ways.items():
            run = partial(outputs_of, partial(way, x, tuple(linears)), leaves, dys if backward else None)
            if name == SCRATCH and fits:
                yield row(name=FUSED, run=partial(forced, "fused", run), floor=floor)
            yield row(name=name, run=partial(forced, "scratch", run) if name == SCRATCH else run, floor=floor)
        if fits and len(linears) == 1 and not backward:
            # With given x A^T, for the bound on the quantized weight's bandwidth.
            a, b = (master.detach().to(x.dtype) for master in masters(linears[0]))
            alone = partial(fused.fused_linear, x.detach(), linears[0].weight, xa=x.detach() @ a.T, b=b * SCALE)
            yield row(name=FUSED_ALONE, run=partial(one_output, alone), floor=(stored, 0.0))


def forced(variant: fused.Variant, run: Callable[[], Outputs]) -> Outputs:
    """Run with a forced variant, backward included."""
    with fused.force_variant(variant):
        return run()


def plain_gemms(x: Tensor, dense: Sequence[Tensor], dys: Sequence[Tensor]) -> Outputs:
    """Run the library's GEMMs of forward, and of dX: explicit, as autograd would not let these accumulate."""
    outputs = {f"y{index}": x @ weight.T for index, weight in enumerate(dense)}
    for dy, weight in zip(dys, dense if dys else (), strict=True):
        outputs["dx"] = outputs["dx"].addmm_(dy, weight) if "dx" in outputs else dy @ weight
    return outputs


class _FourBitBase(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: a new bf16 weight in forward and in backward; only quantized bytes are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *parts: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*parts)
        return torch.nn.functional.linear(x, FrozenWeight(parts, shape, NF4).dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        dx = dy @ FrozenWeight(parts, ctx.shape, NF4).dense(dy.dtype)
        return (dx, None, *(None for _ in parts))


def peft(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run PEFT's sequence: x is cast to fp32, and the adapter's products run in fp32."""
    outputs = []
    for linear in linears:
        a, b = masters(linear)
        result = cast(Tensor, _FourBitBase.apply(x, linear.weight.shape, *linear.weight.parts)).clone()
        down = torch.nn.functional.linear(x.to(a.dtype), a)
        outputs.append(result + (torch.nn.functional.linear(down, b) * SCALE).to(result.dtype))
    return outputs


class _Unsloth(torch.autograd.Function):
    """LoRA_W, and LoRA_QKV's pattern for several: backward recomputes X A^T, and dY B twice per linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Linear, ...], *masters: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for linear, a, b in zip(linears, masters[::2], masters[1::2], strict=True):
            y = x @ linear.weight.dense(x.dtype).T
            y.addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=SCALE)
            outputs.append(y)
        ctx.linears = linears
        ctx.save_for_backward(x, *masters)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *masters = ctx.saved_tensors
        dx, gradients = None, []
        for linear, dy, a, b in zip(ctx.linears, dys, masters[::2], masters[1::2], strict=True):
            down, up = a.to(dy.dtype), b.to(dy.dtype)
            da, db = torch.empty_like(down.T), torch.empty_like(up.T)
            da.addmm_(x.T, dy @ up, alpha=SCALE, beta=0)
            db.addmm_(down @ x.T, dy, alpha=SCALE, beta=0)
            gradients += [da.T, db.T]
            weight = linear.weight.dense(dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(dy @ up, down, alpha=SCALE)
        return (dx, None, *gradients)


def unsloth(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run Unsloth's sequence."""
    every = [master for linear in linears for master in masters(linear)]
    return list(cast(tuple[Tensor, ...], _Unsloth.apply(x, linears, *every)))


def all_rows(options: argparse.Namespace, gpu: Gpu) -> Iterator[Row]:
    """Yield the rows of the sections, each as soon as its group is measured."""
    groups, counts, device = options.shapes, options.m, gpu.device
    shapes = dict.fromkeys(shape for group in groups.values() for shape in group)
    if "dequantize" in options.sections:
        for shape in shapes:
            yield from gpu.judge(DEQUANTIZATION, labelled((shape,)), 0, dequantizations(shape, device))
    for section, formats in (("linear", (NF4,)), ("formats", BLOCK_FORMATS)):
        for label, format in itertools.product(groups if section in options.sections else (), formats):
            for m in counts:
                yield from gpu.judge(LINEARS, label, m, linear_rows(groups[label], m, options.r, device, format))
    for shape, m in itertools.product(shapes if "skinny" in options.sections else (), counts):
        products = operation_rows(LIBRARY, adapter_products(shape, m, options.r, device))
        yield from gpu.judge("Products of the adapter", labelled((shape,)), m, products)
    columns = dict.fromkeys(features for _, features in shapes)
    for n, m in itertools.product(columns if "elementwise" in options.sections else (), counts):
        operations = operation_rows(TRANSFORMERS, elementwise_operations(n, m, device))
        yield from gpu.judge("Elementwise operations", str(n), m, operations)


HEADINGS = ("shape (O x I, N)", "M", "task", "variant", "us", "x plain", "of the GPU", "peak MiB", "ulps")
TIMED = "Median times by CUDA events, cold L2, no CUDA graphs; candidates take turns within a group."
LEGEND = (
    "`x plain`: time over that of the first row of the same task: the library's bf16 GEMMs, or transformers' "
    "operation. `of the GPU`: fraction of the measured copy bandwidth or GEMM rate, whichever binds, for the task's "
    "least work. `peak MiB`: beyond the operands, with scratch. `ulps`: the worst 64 x 64 tile of any output, in bf16 "
    "epsilons."
)


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Return a table per section."""
    sections = dict.fromkeys(row.section for row in rows)
    return [Table(name, HEADINGS, [row.cells() for row in rows if row.section == name]) for name in sections]


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per bound of the README's table, for an H100-class GPU: PASS, FAIL, or `not measured`."""
    # A linear alone by its O x I, without the name of its group.
    found = {(row.shape.split()[-1], row.num_rows, row.task, row.name): row for row in rows if "+" not in row.shape}
    dequantized = [row for (_, m, task, name), row in found.items() if (m, task, name) == (0, "nf4 to bf16", OURS)]
    # From 2^26 weights on, which a copy of 1 GiB compares with.
    large = {row.shape: row.share for row in dequantized if math.prod(map(int, row.shape.split("x"))) >= 2**26}
    for shape, share in (large or {"from 2^26 weights on": 0.0}).items():
        yield _verdict(f"dequantization reaches 85 % of the copy bandwidth, {shape}", share, 0.85)
    for shape, most in {"8192x8192": 1.16, "8192x28672": 1.12}.items():
        for peer, text, least in (
            (PLAIN, f"at most {most} x the plain GEMMs of forward and dX", 1 / most),
            (PEFT, "at least 1.3 x faster than the PEFT sequence (fp32 adapter)", 1.3),
            (UNSLOTH, "not slower than the Unsloth sequence", 1.0),
        ):
            ours, theirs = (found.get((shape, 8192, TRAINING, name)) for name in (SCRATCH, peer))
            speedup = theirs.seconds / ours.seconds if ours and theirs and ours.seconds and theirs.seconds else 0.0
            yield _verdict(f"{shape}, M = 8192, forward + backward: {text}", speedup, least)
    alone = found.get(("8192x8192", 16, FORWARD, FUSED_ALONE))
    text = "8192x8192, M = 16: fused reaches 60 % of the quantized weight's bandwidth"
    yield _verdict(text, alone.share if alone else 0.0, 0.60)


def _verdict(text: str, measured: float, least: float) -> str:
    word = "not measured" if not measured else "PASS" if measured >= least else "FAIL"
    return f"{word}  {text}: {measured:.2f} (at least {least:.2f})"


SECTIONS = ("dequantize", "linear", "formats", "skinny", "elementwise")


def main() -> int:
    """Measure and print. Returns the exit status."""
    parser, counts = parser_of(__doc__), (1, 16, 64, 128, 256, 512, 2048, 8192)
    sections = f"of {','.join(SECTIONS)}; all by default"
    parser.add_argument("sections", nargs="?", type=names_of(SECTIONS), default=SECTIONS, help=sections)
    shapes = f"{MODELS}, one of their groups (llama-70b/down), or OxI+OxI (linears of one input); all models by default"
    parser.add_argument("--shapes", type=groups_named, default=groups_named(MODELS), help=shapes)
    parser.add_argument("--m", type=numbers, default=counts, help="numbers of rows (1,16,64,128,256,512,2048,8192)")
    parser.add_argument("--r", type=number, default=16, help="adapter rank (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu checks without timing")
    parser.add_argument("--check", action="store_true", help="check on the GPU too without timing, as for a sanitizer")
    options = parser.parse_args()
    device, on_gpu, rows = torch.device(options.device), options.device == "cuda", list[Row]()
    if on_gpu and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device to time kernels on; --device cpu --shapes 192x128 --m 16 checks every row, and "
            "python tests/tools/compiled_kernels.py compiles the kernels and counts their instructions"
        )
    if on_gpu:
        # With its index, as tensors have it: the scratch is kept per device.
        device = torch.device("cuda", torch.cuda.current_device())
        # As in distlora's workers: sums of split GEMMs in fp32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Else the CPU runs torch implementations.
    interprets = not on_gpu and os.environ.get("TRITON_INTERPRET") == "1"
    with interpreted() if interprets else contextlib.nullcontext():
        gpu, began = measured_gpu(device) if on_gpu and not options.check else Gpu(device), time.monotonic()
        for row in all_rows(options, gpu):
            rows.append(row)
            figure = row.fault or (f"{row.seconds * 1e6:.1f} us" if row.seconds else "right")
            where = f"{row.section}, {row.shape}{f', M={row.num_rows}' if row.num_rows else ''}"
            print(f"{time.monotonic() - began:5.0f} s  {where}, {row.task}: {row.name}: {figure}", file=sys.stderr)
    rates = f"Copy bandwidth {gpu.bandwidth / 1e12:.2f} TB/s, bf16 GEMM {gpu.gemm / 1e12:.0f} TFLOP/s."
    method = f"{rates} {TIMED}" if gpu.bandwidth else "Outputs and gradients are checked; nothing is timed."
    found = list(verdicts(rows)) if gpu.bandwidth else []
    show(
        "GPU kernels", tables_of(rows), measurement_notes("triton", "bitsandbytes"), sentences=[method, LEGEND, *found]
    )
    wrong = [row for row in rows if row.fault]
    if wrong:
        print(f"error: {len(wrong)} of {len(rows)} rows are wrong; see WRONG in the table", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
