"""Compare one training step of a decoder layer with seven adapted linears.

Attention is SDPA, causal, with grouped queries; RMSNorm and SwiGLU are plain torch, the same for all. There is no
rotary embedding: it would cost all the same.

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
from distlora_kernels.operands import Adapter
from distlora_kernels.scratch import keeping

from . import peers
from .linear import PEFT, PEFT_AUTOCAST, UNSLOTH, named_gradients, products
from .problem import SCALE, Group, Weights, make_weights, normal
from .table import Candidate, Place, Rates, Row, judge

SECTION = "A training step of one decoder layer"
PLAIN = "bf16 layer, no adapter"
SLACK = 4.0
"""Rounding noise of seven linears and an attention: 1.1 epsilons at 1,024 tokens on the CPU, for all candidates; errors
are tens of epsilons."""

Projections = tuple[Callable[[Tensor], Sequence[Tensor]], ...]
"""Functions of qkv, o, gate and up, down: from x (M, I) to every y (M, O) of one group."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes of a decoder layer, Llama-3 8B's by default: heads of 128, four queries per key."""

    hidden: int = 4096
    intermediate: int = 14336

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
    shape: BlockShape, batches: Sequence[tuple[int, int]], rank: int, device: torch.device, rates: Rates | None
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
        yield from judge(place, _candidates(weights, styles, x, dy), baseline=PLAIN)


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
        return tuple(partial(sequence, linears=group.linears) for group in weights)

    def kept() -> tuple[Any, Any]:
        return keeping("forward", device), keeping("recomputation", device)

    return [
        Style(PLAIN, tuple(partial(products, dense=group.dense) for group in weights), []),
        Style("ours", each(lora_linears), masters),
        Style("ours, weights kept from recomputation", each(lora_linears), masters, kept),
        Style(PEFT, each(peers.peft), masters),
        Style(PEFT_AUTOCAST, each(peers.peft_autocast), masters),
        Style(UNSLOTH, each(peers.unsloth), masters),
    ]


def _candidates(weights: list[Weights], styles: list[Style], x: Tensor, dy: Tensor) -> Iterator[Candidate]:
    right = {adapted: _expected(weights, x, dy, adapted=adapted) for adapted in (True, False)}
    for checkpointed in (False, True):
        for style in styles:
            if style.contexts is not None and not checkpointed:
                continue
            yield Candidate(
                name=style.name,
                task="step, activation checkpointing" if checkpointed else "step",
                run=partial(_step, style, x, dy, checkpointed=checkpointed),
                expected=right[bool(style.parameters)],
                slack=SLACK,
            )


def _step(style: Style, x: Tensor, dy: Tensor, *, checkpointed: bool) -> dict[str, Tensor]:
    """Run forward and backward. Returns y, dx, and da0, db0... of all linears."""
    forward = partial(_block, style.projections)
    if checkpointed:
        contexts = style.contexts or (lambda: (contextlib.nullcontext(), contextlib.nullcontext()))
        y = checkpoint(forward, x, use_reentrant=False, context_fn=contexts)
    else:
        y = forward(x)
    return _named(y, torch.autograd.grad(y, [x, *style.parameters], dy))


def _named(y: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    dx, *masters = gradients
    return {"y": y.flatten(0, 1), "dx": dx.flatten(0, 1)} | named_gradients(masters)


def _block(projections: Projections, x: Tensor) -> Tensor:
    """Run the decoder layer on x (B, T, H)."""
    project_qkv, project_o, project_gate_up, project_down = projections
    head_dim = min(128, x.shape[2] // 4)
    heads = [part.unflatten(0, x.shape[:2]) for part in project_qkv(_rms_norm(x).flatten(0, 1))]
    q, k, v = (part.unflatten(2, (-1, head_dim)).transpose(1, 2) for part in heads)
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


def _expected(weights: list[Weights], x: Tensor, dy: Tensor, *, adapted: bool) -> dict[str, Tensor]:
    """Return the expected outputs of a step, computed in fp32."""
    masters = [master for group in weights for master in group.masters] if adapted else []
    wide = x.detach().float().requires_grad_()
    y = _block(tuple(partial(_reference, weights=group, adapted=adapted) for group in weights), wide)
    return _named(y.detach(), torch.autograd.grad(y, [wide, *masters], dy.float()))
