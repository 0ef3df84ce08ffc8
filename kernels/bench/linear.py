"""Compare adapted linears, forward and training: bf16 GEMMs, our variants, and the peers' sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import Adapter

from . import costs, peers
from .costs import Rates, Step
from .problem import SCALE, Batch, Group, Weights, expected_outputs, make_batch, make_weights
from .table import FORWARD, TRAINING, Candidate, Place, Row, judge

SECTION = "Adapted linears"
PLAIN, SCRATCH, FUSED, FUSED_ALONE = "plain bf16 GEMM", "ours, scratch", "ours, fused", "ours, fused GEMM alone"
PEFT, PEFT_AUTOCAST, UNSLOTH = "PEFT sequence, fp32 adapter", "PEFT sequence, autocast", "Unsloth sequence"
MOST_FUSED_ROWS = 512
"""Most rows of the fused variant: every tile of rows decodes the weight again."""

Forward = Callable[[Tensor], Sequence[Tensor]]


def run_forced(variant: fused.Variant, run: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Run with a forced variant, backward included."""
    with fused.force_variant(variant):
        return run()


@dataclass(frozen=True, slots=True)
class Problem:
    """One group at one M, forward only or with backward."""

    group: Group
    weights: Weights
    batch: Batch
    rank: int
    backward: bool
    base: dict[str, Tensor]
    """Expected outputs without the adapter."""
    adapted: dict[str, Tensor]
    """Expected outputs with the adapter."""

    @property
    def num_rows(self) -> int:
        """M."""
        return self.batch.x.shape[0]

    def candidate(
        self,
        name: str,
        forward: Forward,
        parameters: Sequence[Tensor],
        steps: Iterable[Step],
        *,
        quantized: bool = True,
    ) -> Candidate:
        """Return the candidate of `forward`; `parameters` are its adapters' masters, none for the base alone."""
        expected = self.adapted if parameters else self.base
        return Candidate(
            name=name,
            task=TRAINING if self.backward else FORWARD,
            run=partial(train if self.backward else infer, forward, self.batch, parameters),
            expected=expected if self.backward else _outputs(expected),
            steps=tuple(steps),
            floor=(
                costs.floor_bytes(self.group, self.num_rows, quantized=quantized, backward=self.backward),
                costs.gemm_flops(self.group, self.num_rows, backward=self.backward),
            ),
        )


def rows(
    groups: Sequence[Group], counts: Sequence[int], rank: int, device: torch.device, rates: Rates
) -> Iterator[Row]:
    """Yield the rows of every group and M."""
    for group in groups:
        weights = make_weights(group.shapes, rank, device)
        others = _installed(weights)
        for count in counts:
            place = Place(section=SECTION, shape=group.label, num_rows=count, device=device, rates=rates)
            batch = make_batch(group.shapes, count, device)
            base = expected_outputs(weights, batch, adapted=False)
            adapted = expected_outputs(weights, batch, adapted=True)
            problems = [Problem(group, weights, batch, rank, backward, base, adapted) for backward in (False, True)]
            judged = [candidate for problem in problems for candidate in candidates(problem, others)]
            yield from judge(place, judged, baseline=PLAIN)


def _installed(weights: Weights) -> dict[str, peers.Modules]:
    modules = {}
    if has_bitsandbytes():
        modules["bitsandbytes Linear4bit, no adapter"] = peers.bitsandbytes_linears(weights)
    if peers.has_peft():
        base = "bitsandbytes" if has_bitsandbytes() else "our dequantization"
        modules[f"PEFT itself over {base}, fp32 adapter"] = peers.peft_linears(weights)
    return modules


def candidates(problem: Problem, others: dict[str, peers.Modules]) -> Iterator[Candidate]:
    """Yield every candidate of a problem."""
    group, count, rank, backward = problem.group, problem.num_rows, problem.rank, problem.backward
    linears, masters = problem.weights.linears, problem.weights.masters
    plain = problem.candidate(
        PLAIN,
        partial(_products, dense=problem.weights.dense),
        (),
        costs.plain(group, count, backward=backward),
        quantized=False,
    )
    # Backward is explicit: autograd would not let the products of dX accumulate.
    run = partial(_plain_training, problem.weights.dense, problem.batch)
    yield dataclasses.replace(plain, run=run) if backward else plain
    adapted = partial(problem.candidate, forward=partial(lora_linears, linears=linears), parameters=masters)
    ours = adapted(SCRATCH, steps=costs.ours_scratch(group, count, rank, backward=backward))
    yield dataclasses.replace(ours, run=partial(run_forced, "scratch", ours.run))
    if count <= MOST_FUSED_ROWS and all(fused.supports(shape) for shape in group.shapes):
        ours = adapted(FUSED, steps=costs.ours_fused(group, count, rank, backward=backward))
        yield dataclasses.replace(ours, run=partial(run_forced, "fused", ours.run))
        if len(group.shapes) == 1 and not backward:
            yield _fused_alone(problem)
    for name, autocast, sequence in ((PEFT, False, peers.peft), (PEFT_AUTOCAST, True, peers.peft_autocast)):
        steps = costs.peft(group, count, rank, backward=backward, autocast=autocast)
        yield problem.candidate(name, partial(sequence, linears=linears), masters, steps)
    steps = costs.unsloth(group, count, rank, backward=backward)
    yield problem.candidate(UNSLOTH, partial(peers.unsloth, linears=linears), masters, steps)
    for name, modules in others.items():
        if modules.parameters:
            steps = costs.peft(group, count, rank, backward=backward, autocast=False)
        else:
            steps = costs.bitsandbytes(group, count, backward=backward)
        yield problem.candidate(name, modules, modules.parameters, steps)


def infer(forward: Forward, batch: Batch, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return y0, y1... without gradient; `parameters` are ignored."""
    with torch.no_grad():
        return {f"y{index}": y for index, y in enumerate(forward(batch.x))}


def train(forward: Forward, batch: Batch, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return y0..., dx, and da0, db0... of each linear's a and b."""
    ys = forward(batch.x)
    dx, *gradients = torch.autograd.grad(list(ys), [batch.x, *parameters], list(batch.dys))
    outputs = {f"y{index}": y for index, y in enumerate(ys)} | {"dx": dx}
    for index, (da, db) in enumerate(zip(gradients[::2], gradients[1::2], strict=True)):
        outputs |= {f"da{index}": da, f"db{index}": db}
    return outputs


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


def _fused_alone(problem: Problem) -> Candidate:
    """Return the fused kernel with given x A^T, for the bound on the quantized weight's bandwidth."""
    linear, shape = problem.weights.linears[0], problem.group.shapes[0]
    adapter = cast(Adapter, linear.adapter)
    with torch.no_grad():
        x = problem.batch.x.detach()
        up = (adapter.b * SCALE).to(x.dtype)
        xa = x @ adapter.a.to(x.dtype).T
    return Candidate(
        name=FUSED_ALONE,
        task=FORWARD,
        run=lambda: {"y0": fused.fused_linear(x, linear.weight, xa=xa, b=up)},
        expected=_outputs(problem.adapted),
        steps=(costs.fused(*shape, problem.num_rows),),
        floor=(costs.quantized_bytes(*shape), 0.0),
    )


def _outputs(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in expected.items() if name.startswith("y")}
