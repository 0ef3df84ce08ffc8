"""Compare adapted linears, forward and training: bf16 GEMMs, our variants, and the peers' sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.operands import Adapter

from . import peers, problem
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

    def candidate(
        self, name: str, forward: Forward, parameters: Sequence[Tensor], *, quantized: bool = True
    ) -> Candidate:
        """Return the candidate of `forward`; `parameters` are its adapters' masters, none for the base alone."""
        expected = self.adapted if parameters else self.base
        return Candidate(
            name=name,
            task=TRAINING if self.backward else FORWARD,
            run=partial(train if self.backward else infer, forward, self.batch, parameters),
            expected=expected if self.backward else _outputs(expected),
            floor=problem.floor(self.group, self.num_rows, quantized=quantized, backward=self.backward),
        )


def rows(
    groups: Sequence[Group], counts: Sequence[int], rank: int, device: torch.device, rates: Rates | None
) -> Iterator[Row]:
    """Yield the rows of every group and M."""
    for group in groups:
        weights = make_weights(group.shapes, rank, device)
        for count in counts:
            place = Place(section=SECTION, shape=group.label, num_rows=count, device=device, rates=rates)
            batch = make_batch(group.shapes, count, device)
            base = expected_outputs(weights, batch, adapted=False)
            adapted = expected_outputs(weights, batch, adapted=True)
            problems = [Problem(group, weights, batch, backward, base, adapted) for backward in (False, True)]
            judged = [candidate for each in problems for candidate in candidates(each)]
            yield from judge(place, judged, baseline=PLAIN)


def candidates(each: Problem) -> Iterator[Candidate]:
    """Yield every candidate of a problem."""
    linears, masters, dense = each.weights.linears, each.weights.masters, each.weights.dense
    plain = each.candidate(PLAIN, partial(products, dense=dense), (), quantized=False)
    # Backward is explicit: autograd would not let the products of dX accumulate.
    run = partial(_plain_training, dense, each.batch)
    yield dataclasses.replace(plain, run=run) if each.backward else plain
    fits = each.num_rows <= MOST_FUSED_ROWS and all(fused.supports(shape) for shape in each.group.shapes)
    for name, variant in ((SCRATCH, "scratch"), (FUSED, "fused"))[: 1 + fits]:
        ours = each.candidate(name, partial(lora_linears, linears=linears), masters)
        yield dataclasses.replace(ours, run=partial(_run_forced, cast(fused.Variant, variant), ours.run))
    if fits and len(each.group.shapes) == 1 and not each.backward:
        yield _fused_alone(each)
    for name, sequence in ((PEFT, peers.peft), (PEFT_AUTOCAST, peers.peft_autocast), (UNSLOTH, peers.unsloth)):
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
    return outputs | named_gradients(gradients)


def named_gradients(gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return da0, db0, da1, db1... of the gradients in this order."""
    return {f"{'db' if index % 2 else 'da'}{index // 2}": gradient for index, gradient in enumerate(gradients)}


def products(x: Tensor, *, dense: Sequence[Tensor]) -> list[Tensor]:
    """Return x W^T of each weight."""
    return [x @ weight.T for weight in dense]


@torch.no_grad()
def _plain_training(dense: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
    """Run only the library's GEMMs of forward and dX, without autograd and adapter."""
    outputs = {f"y{index}": y for index, y in enumerate(products(batch.x, dense=dense))}
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
        floor=(problem.quantized_bytes(*each.group.shapes[0]), 0.0),
    )


def _outputs(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in expected.items() if name.startswith("y")}
