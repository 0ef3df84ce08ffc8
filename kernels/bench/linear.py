"""Compare adapted linears, forward and training: bf16 GEMMs, our variants, and the peers' sequences.

The sequences of PEFT and Unsloth are plain torch, written after reading their code (2026-11): peft/tuners/lora/bnb.py
over bitsandbytes' MatMul4Bit, and unsloth/kernels/fast_lora.py. Our dequantization, one launch, stands in for theirs,
which takes three, so the sequences are faster than theirs by two launches and 0.3 bytes per weight.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import fused
from distlora_kernels.formats import Format
from distlora_kernels.formats.nf4 import NF4
from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.operands import Adapter, FrozenWeight, Linear

from . import problem
from .problem import SCALE, Batch, Group, Weights, expected_outputs, make_batch, make_weights
from .table import FORWARD, TRAINING, Candidate, Place, Rates, Row, judge

SECTION = "Adapted linears"
PLAIN, SCRATCH, FUSED, FUSED_ALONE = "plain bf16 GEMM", "ours, scratch", "ours, fused", "ours, fused GEMM alone"
PEFT, PEFT_AUTOCAST, UNSLOTH = "PEFT sequence, fp32 adapter", "PEFT sequence, autocast", "Unsloth sequence"
MOST_FUSED_ROWS = 512
"""Most rows of the fused variant: every tile of rows decodes the weight again."""

Forward = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One group at one M, forward only or with backward."""

    group: Group
    weights: Weights
    batch: Batch
    backward: bool
    base: dict[str, Tensor]
    """Expected outputs without the adapter."""
    adapted: dict[str, Tensor]
    """Expected outputs with the adapter."""

    @property
    def num_rows(self) -> int:
        """M."""
        return self.batch.x.shape[0]

    def candidate(self, name: str, forward: Forward, parameters: Sequence[Tensor]) -> Candidate:
        """Return the candidate of `forward`; `parameters` are its adapters' masters, none for the dense base alone."""
        expected, task = self.adapted if parameters else self.base, TRAINING if self.backward else FORWARD
        format = self.weights.format
        return Candidate(
            name=name,
            task=task if format is NF4 else f"{task}, {format.label}",
            run=partial(train if self.backward else infer, forward, self.batch, parameters),
            expected=expected if self.backward else _outputs(expected),
            floor=problem.floor(self.group, self.num_rows, format if parameters else None, backward=self.backward),
        )


def rows(
    groups: Sequence[Group],
    counts: Sequence[int],
    rank: int,
    device: torch.device,
    rates: Rates | None,
    formats: Sequence[Format] = (NF4,),
) -> Iterator[Row]:
    """Yield the rows of every group, format and M."""
    for group, format in itertools.product(groups, formats):
        weights = make_weights(group.shapes, rank, device, format)
        for count in counts:
            place = Place(section=SECTION, shape=group.label, num_rows=count, device=device, rates=rates)
            batch = make_batch(group.shapes, count, device)
            base = expected_outputs(weights, batch, adapted=False)
            adapted = expected_outputs(weights, batch, adapted=True)
            problems = [Problem(group, weights, batch, backward, base, adapted) for backward in (False, True)]
            judged = [candidate for each in problems for candidate in candidates(each)]
            yield from judge(place, judged, baseline=PLAIN)


def candidates(each: Problem) -> Iterator[Candidate]:
    """Yield every candidate of a problem; other formats than NF4 have the scratch alone."""
    linears, masters, dense = each.weights.linears, each.weights.masters, each.weights.dense
    plain = each.candidate(PLAIN, partial(_products, dense=dense), ())
    # Backward is explicit: autograd would not let the products of dX accumulate.
    run = partial(_plain_training, dense, each.batch)
    yield dataclasses.replace(plain, run=run) if each.backward else plain
    nf4 = each.weights.format is NF4
    fits = nf4 and each.num_rows <= MOST_FUSED_ROWS and all(fused.supports(shape) for shape in each.group.shapes)
    for name, variant in ((SCRATCH, "scratch"), (FUSED, "fused"))[: 1 + fits]:
        ours = each.candidate(name, partial(lora_linears, linears=linears), masters)
        yield dataclasses.replace(ours, run=partial(_run_forced, cast(fused.Variant, variant), ours.run))
    if fits and len(each.group.shapes) == 1 and not each.backward:
        yield _fused_alone(each)
    for name, sequence in ((PEFT, peft), (PEFT_AUTOCAST, peft_autocast), (UNSLOTH, unsloth)) if nf4 else ():
        yield each.candidate(name, partial(sequence, linears=linears), masters)


def _run_forced(variant: fused.Variant, run: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Run with a forced variant, backward included."""
    with fused.force_variant(variant):
        return run()


def infer(forward: Forward, batch: Batch, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return y0, y1... without gradient; `parameters` are ignored."""
    with torch.no_grad():
        return {f"y{index}": y for index, y in enumerate(forward(batch.x))}


def train(forward: Forward, batch: Batch, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return y0..., dx, and da0, db0... of each linear's a and b."""
    ys = forward(batch.x)
    dx, *gradients = torch.autograd.grad(list(ys), [batch.x, *parameters], list(batch.dys))
    outputs = {f"y{index}": y for index, y in enumerate(ys)} | {"dx": dx}
    names = (f"d{master}{index}" for index in range(len(ys)) for master in "ab")
    return outputs | dict(zip(names, gradients, strict=False))


def _products(x: Tensor, *, dense: Sequence[Tensor]) -> list[Tensor]:
    return [x @ weight.T for weight in dense]


@torch.no_grad()
def _plain_training(dense: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
    """Run only the library's GEMMs of forward and dX, without autograd and adapter."""
    outputs = {f"y{index}": y for index, y in enumerate(_products(batch.x, dense=dense))}
    dx = batch.dys[0] @ dense[0]
    for dy, weight in zip(batch.dys[1:], dense[1:], strict=True):
        dx.addmm_(dy, weight)
    return outputs | {"dx": dx}


def _fused_alone(each: Problem) -> Candidate:
    """Return the fused kernel with given x A^T, for the bound on the quantized weight's bandwidth."""
    linear = each.weights.linears[0]
    adapter = cast(Adapter, linear.adapter)
    with torch.no_grad():
        x = each.batch.x.detach()
        up = (adapter.b * SCALE).to(x.dtype)
        xa = x @ adapter.a.to(x.dtype).T
    return Candidate(
        name=FUSED_ALONE,
        task=FORWARD,
        run=lambda: {"y0": fused.fused_linear(x, linear.weight, xa=xa, b=up)},
        expected=_outputs(each.adapted),
        floor=(NF4.num_bytes(each.group.shapes[0]), 0.0),
    )


def _outputs(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in expected.items() if name.startswith("y")}


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
    """Run PEFT's sequence without autocast: x is cast to fp32, and the adapter's products run in fp32."""
    return [_peft(x, linear, autocast=False) for linear in linears]


def peft_autocast(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run PEFT's sequence under autocast to bf16, as transformers' Trainer with bf16=True."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return [_peft(x, linear, autocast=True) for linear in linears]


def _peft(x: Tensor, linear: Linear, *, autocast: bool) -> Tensor:
    adapter = cast(Adapter, linear.adapter)
    result = cast(Tensor, _FourBitBase.apply(x, linear.weight.shape, *linear.weight.parts)).clone()
    adapter_input = x if autocast else x.to(adapter.a.dtype)
    output = torch.nn.functional.linear(torch.nn.functional.linear(adapter_input, adapter.a), adapter.b) * _scale(
        linear
    )
    return result + (output if autocast else output.to(result.dtype))


class _Unsloth(torch.autograd.Function):
    """LoRA_W, and LoRA_QKV's pattern for several: backward recomputes X A^T, and dY B twice per linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Linear, ...], *masters: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for linear, a, b in zip(linears, masters[::2], masters[1::2], strict=True):
            y = x @ linear.weight.dense(x.dtype).T
            y.addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=_scale(linear))
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
            down, up, scale = a.to(dy.dtype), b.to(dy.dtype), _scale(linear)
            da, db = torch.empty_like(down.T), torch.empty_like(up.T)
            da.addmm_(x.T, dy @ up, alpha=scale, beta=0)
            db.addmm_(down @ x.T, dy, alpha=scale, beta=0)
            gradients += [da.T, db.T]
            weight = linear.weight.dense(dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(dy @ up, down, alpha=scale)
        return (dx, None, *gradients)


def unsloth(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run Unsloth's sequence."""
    masters = [master for linear in linears for master in cast(Adapter, linear.adapter)[:2]]
    return list(cast(tuple[Tensor, ...], _Unsloth.apply(x, linears, *masters)))


def _scale(linear: Linear) -> float:
    scale = cast(Adapter, linear.adapter).scale
    assert isinstance(scale, float)
    return scale
