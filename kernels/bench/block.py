"""Compare one training step of a decoder layer with seven adapted linears, of one trial and of several trials together.

Attention is SDPA, causal, with grouped queries; RMSNorm and SwiGLU are plain torch, the same for all. There is no
rotary embedding: it would cost all the same. With several trials, their rows are in one batch, each with its adapters;
the frozen weights are shared and dequantized once for all.

Letters: B sequences, T tokens, H hidden size, F intermediate size, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distlora_kernels.lora_linear import lora_linears
from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import Adapter, Linear, RowChoice
from distlora_kernels.scratch import keeping

from . import costs, peers
from .costs import Rates, Step
from .problem import SCALE, Group, Weights, make_weights, normal
from .table import Candidate, Place, Row, judge

SECTION = "A training step of one decoder layer"
PLAIN, OURS, OURS_KEPT = "bf16 layer, no adapter", "ours", "ours, weights kept from recomputation"
ATTENTION_EFFICIENCY = 0.5
SLACK = 4.0
"""Rounding noise of seven linears and an attention: 1.1 epsilons at 1,024 tokens on the CPU, for all candidates; errors
are tens of epsilons."""

Project = Callable[[Tensor], Sequence[Tensor]]
"""A function from x (M, I) to every y (M, O) of one group."""
Projections = tuple[Project, Project, Project, Project]
"""Functions of qkv, o, gate and up, down."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes of a decoder layer, Llama-3 8B's by default: heads of 128, four queries per key."""

    hidden: int = 4096
    intermediate: int = 14336

    @property
    def head_dim(self) -> int:
        """D."""
        return min(128, self.hidden // 4)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linears by input."""
        hidden, keys = self.hidden, self.hidden // 4
        return (
            Group("qkv", ((hidden, hidden), (keys, hidden), (keys, hidden))),
            Group("o", ((hidden, hidden),)),
            Group("gate-up", ((self.intermediate, hidden), (self.intermediate, hidden))),
            Group("down", ((hidden, self.intermediate),)),
        )


def rows(
    shape: BlockShape, batches: Sequence[tuple[int, int]], rank: int, device: torch.device, rates: Rates
) -> Iterator[Row]:
    """Yield the rows; `batches` are (sequences, tokens)."""
    weights = [make_weights(group.shapes, rank, device, seed=seed) for seed, group in enumerate(shape.groups)]
    styles = _styles(weights, device)
    for batch, tokens in batches:
        generator = torch.Generator(device).manual_seed(99)
        x = normal((batch, tokens, shape.hidden), device, generator).requires_grad_()
        dy = normal((batch, tokens, shape.hidden), device, generator)
        label = f"H={shape.hidden} F={shape.intermediate} {batch}x{tokens}"
        place = Place(section=SECTION, shape=label, num_rows=batch * tokens, device=device, rates=rates)
        yield from judge(place, _candidates(shape, weights, styles, x, dy, rank), baseline=PLAIN)


@dataclass(frozen=True, slots=True)
class Style:
    """One way to run the linears."""

    name: str
    projections: Projections
    parameters: list[Tensor]
    contexts: Callable[[], tuple[Any, Any]] | None = None
    """Contexts of forward and recomputation; such a style runs only under activation checkpointing."""


def _styles(weights: list[Weights], device: torch.device) -> list[Style]:
    masters = [master for group in weights for master in group.masters]

    def each(sequence: Callable[..., Sequence[Tensor]]) -> Projections:
        return cast(Projections, tuple(partial(sequence, linears=group.linears) for group in weights))

    plain = cast(Projections, tuple(partial(_dense, dense=group.dense) for group in weights))
    styles = [
        Style(PLAIN, plain, []),
        Style(OURS, each(lora_linears), masters),
        Style(
            OURS_KEPT,
            each(lora_linears),
            masters,
            lambda: (keeping("forward", device), keeping("recomputation", device)),
        ),
        Style("PEFT sequence, fp32 adapter", each(peers.peft), masters),
        Style("PEFT sequence, autocast", each(peers.peft_autocast), masters),
        Style("Unsloth sequence", each(peers.unsloth), masters),
    ]
    if peers.has_peft():
        modules = [peers.peft_linears(group) for group in weights]
        parameters = [parameter for group in modules for parameter in group.parameters]
        base = "bitsandbytes" if has_bitsandbytes() else "our dequantization"
        styles.append(Style(f"PEFT itself over {base}, fp32 adapter", cast(Projections, tuple(modules)), parameters))
    return styles


def _candidates(
    shape: BlockShape, weights: list[Weights], styles: list[Style], x: Tensor, dy: Tensor, rank: int
) -> Iterator[Candidate]:
    right = {adapted: expected(shape, weights, x, dy, adapted=adapted) for adapted in (True, False)}
    for checkpointed in (False, True):
        for style in styles:
            if style.contexts is not None and not checkpointed:
                continue
            yield Candidate(
                name=style.name,
                task=task_name(checkpointed),
                run=partial(step, shape, style, x, dy, checkpointed=checkpointed),
                expected=right[bool(style.parameters)],
                steps=tuple(steps(shape, style.name, x, rank, checkpointed=checkpointed)),
                slack=SLACK,
            )


def task_name(checkpointed: bool) -> str:
    """Return the task's name in the table."""
    return "step, activation checkpointing" if checkpointed else "step"


def step(shape: BlockShape, style: Style, x: Tensor, dy: Tensor, *, checkpointed: bool) -> dict[str, Tensor]:
    """Run forward and backward. Returns y, dx, and da0, db0... of all linears."""
    forward = partial(_block, shape, style.projections)
    if checkpointed:
        contexts = style.contexts or (lambda: (contextlib.nullcontext(), contextlib.nullcontext()))
        y = checkpoint(forward, x, use_reentrant=False, context_fn=contexts)
    else:
        y = forward(x)
    return _named(y, torch.autograd.grad(y, [x, *style.parameters], dy))


def _named(y: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    dx, *masters = gradients
    outputs = {"y": y.flatten(0, 1), "dx": dx.flatten(0, 1)}
    for index, (da, db) in enumerate(zip(masters[::2], masters[1::2], strict=True)):
        outputs |= {f"da{index}": da, f"db{index}": db}
    return outputs


def _block(shape: BlockShape, projections: Projections, x: Tensor) -> Tensor:
    """Run the decoder layer on x (B, T, H)."""
    project_qkv, project_o, project_gate_up, project_down = projections
    heads = [part.unflatten(0, x.shape[:2]) for part in project_qkv(_rms_norm(x).flatten(0, 1))]
    q, k, v = (part.unflatten(2, (-1, shape.head_dim)).transpose(1, 2) for part in heads)
    if x.dtype == torch.float32:
        # With grouped keys fp32 attention would fall back to a T x T matrix in memory.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    x = x + project_o(attended.transpose(1, 2).flatten(2).flatten(0, 1))[0].view(x.shape)
    gate, up = project_gate_up(_rms_norm(x).flatten(0, 1))
    return x + project_down(torch.nn.functional.silu(gate) * up)[0].view(x.shape)


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


def _dense(x: Tensor, *, dense: Sequence[Tensor]) -> list[Tensor]:
    return [x @ weight.T for weight in dense]


def _reference(x: Tensor, *, weights: Weights, adapted: bool) -> list[Tensor]:
    """Return y = x W^T + s (x A^T) B^T in fp32."""
    ys = []
    for dense, linear in zip(weights.dense, weights.linears, strict=True):
        y = x @ dense.float().T
        if adapted:
            adapter = cast(Adapter, linear.adapter)
            y = y + SCALE * (x @ adapter.a.T) @ adapter.b.T
        ys.append(y)
    return ys


def expected(shape: BlockShape, weights: list[Weights], x: Tensor, dy: Tensor, *, adapted: bool) -> dict[str, Tensor]:
    """Return the expected outputs of a step, computed in fp32."""
    projections = tuple(partial(_reference, weights=group, adapted=adapted) for group in weights)
    masters = [master for group in weights for master in group.masters] if adapted else []
    wide = x.detach().float().requires_grad_()
    y = _block(shape, cast(Projections, projections), wide)
    return _named(y.detach(), torch.autograd.grad(y, [wide, *masters], dy.float()))


def steps(shape: BlockShape, name: str, x: Tensor, rank: int, *, checkpointed: bool) -> Iterator[Step]:
    """Count the launches of the linears and the attention."""
    batch, tokens, hidden = x.shape
    for group in shape.groups:
        for backward in (True, False)[: 1 + checkpointed]:
            yield from _linear_steps(name, group, batch * tokens, rank, backward=backward)
    yield from attention_steps(batch, tokens, hidden, checkpointed=checkpointed)


def attention_steps(batch: int, tokens: int, hidden: int, *, checkpointed: bool) -> Iterator[Step]:
    """Count the launches of the attention."""
    attention = 2.0 * batch * tokens**2 * hidden
    # Backward is five products to forward's two.
    for flops in (attention, 2.5 * attention, attention)[: 2 + checkpointed]:
        yield Step(0.0, flops, ATTENTION_EFFICIENCY)


def _linear_steps(name: str, group: Group, m: int, rank: int, *, backward: bool) -> Iterator[Step]:
    if name == PLAIN:
        return costs.plain(group, m, backward=backward)
    if name in (OURS, OURS_KEPT):
        return costs.ours_scratch(group, m, rank, backward=backward, kept=name == OURS_KEPT)
    if name.startswith("PEFT"):
        return costs.peft(group, m, rank, backward=backward, autocast="autocast" in name)
    return costs.unsloth(group, m, rank, backward=backward)


MULTI_TRIAL = "A training step of one decoder layer by several trials together (`x plain`: over one trial)"
ALONE = "one trial"


def multi_trial_rows(
    shape: BlockShape,
    batches: Sequence[tuple[int, int]],
    rank: int,
    counts: Sequence[int],
    device: torch.device,
    rates: Rates,
) -> Iterator[Row]:
    """Yield the rows; `batches` are (sequences, tokens) per trial, `counts` the numbers of trials."""
    trials = [[make_weights(group.shapes, rank, device, seed=seed) for seed, group in enumerate(shape.groups)]]
    generator = torch.Generator(device).manual_seed(7)
    while len(trials) < max(counts):
        trials.append([_with_other_adapters(group, generator) for group in trials[0]])
    for sequences, tokens in batches:
        size = (sequences, tokens, shape.hidden)
        inputs = [(normal(size, device, generator), normal(size, device, generator)) for _ in trials]
        for count in counts:
            label = f"H={shape.hidden} F={shape.intermediate} {count} x ({sequences}x{tokens})"
            place = Place(
                section=MULTI_TRIAL, shape=label, num_rows=count * sequences * tokens, device=device, rates=rates
            )
            yield from judge(
                place, _multi_trial_candidates(shape, trials[:count], inputs[:count], rank), baseline=ALONE
            )


def _with_other_adapters(weights: Weights, generator: torch.Generator) -> Weights:
    linears = []
    for linear in weights.linears:
        adapter = cast(Adapter, linear.adapter)
        # fp32 masters that are bf16 numbers, as large as the first trial's.
        a, b = (
            normal(tuple(t.shape), t.device, generator).mul_(t.detach().std()).float().requires_grad_()
            for t in adapter[:2]
        )
        linears.append(linear._replace(adapter=Adapter(a, b, SCALE)))
    return Weights(tuple(linears), weights.dense)


def _multi_trial_candidates(
    shape: BlockShape, trials: list[list[Weights]], inputs: list[tuple[Tensor, Tensor]], rank: int
) -> Iterator[Candidate]:
    right = [
        expected(shape, weights, x.requires_grad_(), dy, adapted=True)
        for weights, (x, dy) in zip(trials, inputs, strict=True)
    ]
    alone = [
        partial(step, shape, _alone(weights), x, dy, checkpointed=False)
        for weights, (x, dy) in zip(trials, inputs, strict=True)
    ]
    count, one = len(trials), tuple(steps(shape, OURS, inputs[0][0], rank, checkpointed=False))
    yield Candidate(name=ALONE, task=task_name(False), run=alone[0], expected=right[0], steps=one, slack=SLACK)
    together = {}
    for name in right[0]:
        # Outputs and dX of all rows; dA and dB of each trial.
        if name in ("y", "dx"):
            together[name] = torch.cat([outputs[name] for outputs in right])
        else:
            together |= {f"{name} of trial {trial}": outputs[name] for trial, outputs in enumerate(right)}
    yield Candidate(
        name="together",
        task=task_name(False),
        run=partial(_multi_trial_step, shape, _together(trials, inputs), inputs, count),
        expected=together,
        steps=tuple(_multi_trial_steps(shape, inputs[0][0], rank, count)),
        slack=SLACK,
    )
    yield Candidate(
        name="one after the other",
        task=task_name(False),
        run=partial(_one_after_the_other, alone),
        expected=right[0],
        steps=one * count,
        slack=SLACK,
    )


def _one_after_the_other(trials: Sequence[Callable[[], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the first trial's outputs; the others are dropped."""
    first, *others = trials
    outputs = first()
    for other in others:
        other()
    return outputs


def _alone(weights: list[Weights]) -> Style:
    projections = tuple(partial(lora_linears, linears=group.linears) for group in weights)
    return Style(ALONE, cast(Projections, projections), [master for group in weights for master in group.masters])


def _together(trials: list[list[Weights]], inputs: list[tuple[Tensor, Tensor]]) -> Style:
    """Return all trials' adapters side by side, with each row's choice."""
    sequences = inputs[0][0].shape[0]
    chosen = torch.arange(len(trials), device=inputs[0][0].device).repeat_interleave(sequences)
    projections = []
    for same_group in zip(*trials, strict=True):
        projections.append(partial(_project, trials=[weights.linears for weights in same_group], chosen=chosen))
    masters = [master for weights in trials for group in weights for master in group.masters]
    return Style("together", cast(Projections, tuple(projections)), masters)


def _project(x: Tensor, *, trials: Sequence[Sequence[Linear]], chosen: Tensor) -> Sequence[Tensor]:
    linears = []
    for same in zip(*trials, strict=True):
        adapters = [cast(Adapter, linear.adapter) for linear in same]
        choice = RowChoice(chosen, (SCALE,) * len(same), tuple(adapter.a.shape[0] for adapter in adapters))
        stacked = Adapter(
            torch.cat([each.a for each in adapters]), torch.cat([each.b for each in adapters], dim=1), choice
        )
        linears.append(same[0]._replace(adapter=stacked))
    return lora_linears(x, linears)


def _multi_trial_step(
    shape: BlockShape, style: Style, inputs: list[tuple[Tensor, Tensor]], count: int
) -> dict[str, Tensor]:
    x = torch.cat([x.detach() for x, _ in inputs]).requires_grad_()
    outputs = step(shape, style, x, torch.cat([dy for _, dy in inputs]), checkpointed=False)
    by_trial = {name: outputs[name] for name in ("y", "dx")}
    each = (len(outputs) - 2) // 2 // count
    for index in range(each * count):
        trial, place = divmod(index, each)
        by_trial |= {f"d{m}{place} of trial {trial}": outputs[f"d{m}{index}"] for m in "ab"}
    return by_trial


def _multi_trial_steps(shape: BlockShape, x: Tensor, rank: int, count: int) -> Iterator[Step]:
    sequences, tokens, hidden = x.shape
    for group in shape.groups:
        yield from costs.ours_multi_trial(group, sequences * tokens, rank, count, backward=True)
    yield from attention_steps(count * sequences, tokens, hidden, checkpointed=False)
