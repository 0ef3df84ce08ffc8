"""One training step of a decoder block, forward and backward, with seven adapted linears: ours beside the peers.

Attention is SDPA, causal, with grouped queries; RMSNorm and SwiGLU are plain torch, the same for all. No rotary
embedding: it would cost all the same.

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
from distlora_kernels.operands import Adapter
from distlora_kernels.scratch import keeping

from . import costs, installed, peers
from .problem import SCALE, Weights, make_weights, normal
from .rates import Rates, Step
from .shapes import Group
from .table import Candidate, Place, Row, judge

SECTION = "A training step of one block"
PLAIN, OURS, OURS_KEPT = "bf16 block, no adapter", "ours", "ours, weights kept from recomputation"
ATTENTION_EFFICIENCY = 0.5
SLACK = 4.0
"""Rounding noise of seven linears and an attention in a row: 1.1 epsilons at 1,024 tokens on the CPU, for all of the
candidates; what is wrong is wrong by tens."""

Project = Callable[[Tensor], Sequence[Tensor]]
"""x (M, I) -> every y (M, O) of one group."""
Projections = tuple[Project, Project, Project, Project]
"""qkv, o, gate and up, down."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Llama-3 8B's by default: heads of 128, four queries to a key."""

    hidden: int = 4096
    intermediate: int = 14336

    @property
    def head_dim(self) -> int:
        return min(128, self.hidden // 4)

    @property
    def groups(self) -> tuple[Group, ...]:
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
    """`batches` are (sequences, tokens)."""
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
    """How the linears are run."""

    name: str
    projections: Projections
    parameters: list[Tensor]
    contexts: Callable[[], tuple[Any, Any]] | None = None
    """The checkpoint's contexts of forward and recomputation; the style is only run under a checkpoint then."""


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
    if installed.has_peft():
        modules = [installed.peft_linears(group) for group in weights]
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
    return "step, block checkpoint" if checkpointed else "step"


def step(shape: BlockShape, style: Style, x: Tensor, dy: Tensor, *, checkpointed: bool) -> dict[str, Tensor]:
    """Forward and backward: y, dx, and da0, db0... of all linears."""
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
    """x (B, T, H) -> (B, T, H) in x's dtype."""
    project_qkv, project_o, project_gate_up, project_down = projections
    heads = [part.unflatten(0, x.shape[:2]) for part in project_qkv(_rms_norm(x).flatten(0, 1))]
    q, k, v = (part.unflatten(2, (-1, shape.head_dim)).transpose(1, 2) for part in heads)
    if x.dtype == torch.float32:
        # The reference: with grouped keys fp32 attention would fall back to a T x T matrix in memory.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    seen = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    x = x + project_o(seen.transpose(1, 2).flatten(2).flatten(0, 1))[0].view(x.shape)
    gate, up = project_gate_up(_rms_norm(x).flatten(0, 1))
    return x + project_down(torch.nn.functional.silu(gate) * up)[0].view(x.shape)


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


def _dense(x: Tensor, *, dense: Sequence[Tensor]) -> list[Tensor]:
    return [x @ weight.T for weight in dense]


def _reference(x: Tensor, *, weights: Weights, adapted: bool) -> list[Tensor]:
    """y = x W^T + s (x A^T) B^T in fp32."""
    ys = []
    for dense, linear in zip(weights.dense, weights.linears, strict=True):
        y = x @ dense.float().T
        if adapted:
            adapter = cast(Adapter, linear.adapter)
            y = y + SCALE * (x @ adapter.a.T) @ adapter.b.T
        ys.append(y)
    return ys


def expected(shape: BlockShape, weights: list[Weights], x: Tensor, dy: Tensor, *, adapted: bool) -> dict[str, Tensor]:
    projections = tuple(partial(_reference, weights=group, adapted=adapted) for group in weights)
    masters = [master for group in weights for master in group.masters] if adapted else []
    wide = x.detach().float().requires_grad_()
    y = _block(shape, cast(Projections, projections), wide)
    return _named(y.detach(), torch.autograd.grad(y, [wide, *masters], dy.float()))


def steps(shape: BlockShape, name: str, x: Tensor, rank: int, *, checkpointed: bool) -> Iterator[Step]:
    """The linears and the attention alone."""
    batch, tokens, hidden = x.shape
    for group in shape.groups:
        for backward in (True, False)[: 1 + checkpointed]:
            yield from _linear_steps(name, group, batch * tokens, rank, backward=backward)
    yield from attention_steps(batch, tokens, hidden, checkpointed=checkpointed)


def attention_steps(batch: int, tokens: int, hidden: int, *, checkpointed: bool) -> Iterator[Step]:
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
