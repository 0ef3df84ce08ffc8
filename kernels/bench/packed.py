"""A training step of a decoder block by several trials at once: their rows in one batch, each with its own adapters,
beside one trial's step and the same trials one after the other.

Each trial has a micro-batch of its own; the frozen weights are everybody's, dequantized once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.operands import Adapter, Linear, RowChoice

from . import block, costs
from .block import BlockShape, Projections, Style
from .problem import SCALE, Weights, make_weights, normal
from .rates import Rates, Step
from .table import Candidate, Place, Row, judge

SECTION = "A training step of one block by trials packed together (`x plain`: times one trial's)"
ALONE = "one trial"
TASK = "step"


def rows(
    shape: BlockShape,
    batches: Sequence[tuple[int, int]],
    rank: int,
    counts: Sequence[int],
    device: torch.device,
    rates: Rates,
) -> Iterator[Row]:
    """`batches` are (sequences, tokens) of each trial, `counts` how many trials there are."""
    trials = [[make_weights(group.shapes, rank, device, seed=seed) for seed, group in enumerate(shape.groups)]]
    generator = torch.Generator(device).manual_seed(7)
    while len(trials) < max(counts):
        trials.append([_with_other_adapters(group, generator) for group in trials[0]])
    for sequences, tokens in batches:
        size = (sequences, tokens, shape.hidden)
        inputs = [(normal(size, device, generator), normal(size, device, generator)) for _ in trials]
        for count in counts:
            label = f"H={shape.hidden} F={shape.intermediate} {count} x ({sequences}x{tokens})"
            place = Place(section=SECTION, shape=label, num_rows=count * sequences * tokens, device=device, rates=rates)
            yield from judge(place, _candidates(shape, trials[:count], inputs[:count], rank), baseline=ALONE)


def _with_other_adapters(weights: Weights, generator: torch.Generator) -> Weights:
    linears = []
    for linear in weights.linears:
        adapter = cast(Adapter, linear.adapter)
        # Masters that are bf16 numbers, as large as the first trial's.
        a, b = (
            normal(tuple(t.shape), t.device, generator).mul_(t.detach().std()).float().requires_grad_()
            for t in adapter[:2]
        )
        linears.append(linear._replace(adapter=Adapter(a, b, SCALE)))
    return Weights(tuple(linears), weights.dense)


def _candidates(
    shape: BlockShape, trials: list[list[Weights]], inputs: list[tuple[Tensor, Tensor]], rank: int
) -> Iterator[Candidate]:
    expected = [
        block.expected(shape, weights, x.requires_grad_(), dy, adapted=True)
        for weights, (x, dy) in zip(trials, inputs, strict=True)
    ]
    alone = [
        partial(block.step, shape, _alone(weights), x, dy, checkpointed=False)
        for weights, (x, dy) in zip(trials, inputs, strict=True)
    ]
    count, one = len(trials), tuple(block.steps(shape, block.OURS, inputs[0][0], rank, checkpointed=False))
    yield Candidate(name=ALONE, task=TASK, run=alone[0], expected=expected[0], steps=one, slack=block.SLACK)
    together = {}
    for name in expected[0]:
        # Outputs and dX of all rows; each trial's own dA and dB.
        if name in ("y", "dx"):
            together[name] = torch.cat([own[name] for own in expected])
        else:
            together |= {f"{name} of trial {trial}": own[name] for trial, own in enumerate(expected)}
    yield Candidate(
        name="packed",
        task=TASK,
        run=partial(_packed_step, shape, _together(trials, inputs), inputs, count),
        expected=together,
        steps=tuple(_packed_steps(shape, inputs[0][0], rank, count)),
        slack=block.SLACK,
    )
    yield Candidate(
        name="one after the other",
        task=TASK,
        run=partial(_one_after_the_other, alone),
        expected=expected[0],
        steps=one * count,
        slack=block.SLACK,
    )


def _one_after_the_other(trials: Sequence[Callable[[], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """What the first gives; the others are dropped as a run would use them up."""
    first, *others = trials
    outputs = first()
    for other in others:
        other()
    return outputs


def _alone(weights: list[Weights]) -> Style:
    projections = tuple(partial(lora_linears, linears=group.linears) for group in weights)
    return Style(ALONE, cast(Projections, projections), [master for group in weights for master in group.masters])


def _together(trials: list[list[Weights]], inputs: list[tuple[Tensor, Tensor]]) -> Style:
    """All trials' adapters side by side, of which the rows choose, as distlora's adapted linears have them."""
    sequences = inputs[0][0].shape[0]
    chosen = torch.arange(len(trials), device=inputs[0][0].device).repeat_interleave(sequences)
    projections = []
    for of_trials in zip(*trials, strict=True):
        projections.append(partial(_project, of_trials=[weights.linears for weights in of_trials], chosen=chosen))
    masters = [master for weights in trials for group in weights for master in group.masters]
    return Style("packed", cast(Projections, tuple(projections)), masters)


def _project(x: Tensor, *, of_trials: Sequence[Sequence[Linear]], chosen: Tensor) -> Sequence[Tensor]:
    linears = []
    for same in zip(*of_trials, strict=True):
        adapters = [cast(Adapter, linear.adapter) for linear in same]
        choice = RowChoice(chosen, (SCALE,) * len(same), tuple(adapter.a.shape[0] for adapter in adapters))
        stacked = Adapter(torch.cat([own.a for own in adapters]), torch.cat([own.b for own in adapters], dim=1), choice)
        linears.append(same[0]._replace(adapter=stacked))
    return lora_linears(x, linears)


def _packed_step(shape: BlockShape, style: Style, inputs: list[tuple[Tensor, Tensor]], count: int) -> dict[str, Tensor]:
    x = torch.cat([x.detach() for x, _ in inputs]).requires_grad_()
    outputs = block.step(shape, style, x, torch.cat([dy for _, dy in inputs]), checkpointed=False)
    found = {name: outputs[name] for name in ("y", "dx")}
    each = (len(outputs) - 2) // 2 // count
    for index in range(each * count):
        trial, own = divmod(index, each)
        found |= {f"d{m}{own} of trial {trial}": outputs[f"d{m}{index}"] for m in "ab"}
    return found


def _packed_steps(shape: BlockShape, x: Tensor, rank: int, count: int) -> Iterator[Step]:
    sequences, tokens, hidden = x.shape
    for group in shape.groups:
        yield from costs.ours_packed(group, sequences * tokens, rank, count, backward=True)
    yield from block.attention_steps(count * sequences, tokens, hidden, checkpointed=False)
