"""Recompute the MLP half of a decoder layer, with its norms, in backward: whole or in tiles of tokens.

An MLP and its norms see one token at a time, so any tiles of a row give the row's result. With tiles the largest
tensors of an MLP (gate, up, their product, 8 bytes per inner column and token) have a tile's size.

A family's code calls norm, MLP, norm in order and stays unchanged: `MLP` replaces the MLP and runs all three, and the
norms around it pass their input on. So the half's input is all that is kept of it. A layer without these settings keeps
its modules (README.md, Long sequences).

Letters: B rows of the batch, T tokens of a row, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distlora.architecture.spec import Architecture
from distlora.model.adapters import BlockContext
from distlora.model.by_document import Wrapper
from distlora.model.layer_wrapper import Block
from distlora_kernels.lora_linear import save, saved_tensors


class HandsOn(nn.Module):
    """Replacement of a norm beside the MLP, which runs it instead."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the input unchanged."""
        return hidden_states


class MLP(Wrapper):
    """MLP of a decoder layer between its norms: hidden_states (B, T, H) -> the output of the last of them.

    With gradients, backward recomputes it from hidden_states, whole without a `tile`.
    """

    def __init__(
        self, inner: nn.Module, context: BlockContext, norms: Sequence[nn.Module | None], *, tile: int | None
    ) -> None:
        super().__init__(inner)
        self.context = context
        # In a tuple, which hides them from nn.Module: the layer owns them, under their names.
        self._norms = tuple(norms)
        self.tile = tile
        """Tokens of each row that run at once; None: all of them."""

    def forward(self, hidden_states: Tensor) -> Any:
        """Return the output for (B, T, H), in tiles of tokens where a tile is set."""
        tile = self.tile
        if tile is None or tile >= hidden_states.shape[1]:
            # Without gradients, and for generation's few tokens, as without a wrapper.
            return self._recomputed(hidden_states) if torch.is_grad_enabled() else self._run(hidden_states)
        modules = (module for module in (self.inner, *self._norms) if module is not None)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden_states.requires_grad):
            with torch.no_grad():
                return in_tiles(self._run_tile, hidden_states, tile)
        # Saved before the tiles run: a recomputation of the layer runs none.
        keeper = save((hidden_states,), hidden_states.device)
        return _Tiles.apply(keeper, hidden_states, self._with_rows(self._run_tile), tile, *parameters)

    def _run(self, hidden_states: Tensor) -> Any:
        before, after = self._norms
        output = self.inner(hidden_states if before is None else before(hidden_states))
        return output if after is None else after(output)

    def _run_tile(self, hidden_states: Tensor, first: int) -> Tensor:
        self.context.first_token = first
        self.context.recomputes = torch.is_grad_enabled()  # Forward runs tiles without, backward with gradients.
        try:
            output: Tensor = self._run(hidden_states)
        finally:
            self.context.first_token, self.context.recomputes = 0, False
        return output

    def _with_rows(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `run` bound to the present rows, for backward too, when another slice's rows may be set."""
        rows = self.context.rows

        def with_rows(*arguments: Any) -> Any:
            self.context.rows = rows
            return run(*arguments)

        return with_rows

    def _recomputed(self, hidden_states: Tensor) -> Any:
        """Recompute as a checkpoint does, so that the graph, and every sum in it, equals that of a run without one."""
        run, runs = self._with_rows(self._run), itertools.count()

        def half(hidden: Tensor) -> tuple[Any, Tensor | None]:
            self.context.recomputes = next(runs) > 0
            try:
                output = run(hidden)
            finally:  # Recomputation leaves by an exception. Clear its router's statistics.
                self.context.recomputes = False
                balance = self.context.take_balance()
            return output, balance

        # No layer draws from torch's generators, so their state need not be kept.
        output, balance = checkpoint(half, hidden_states, use_reentrant=False, preserve_rng_state=False)
        if balance is not None:
            self.context.leave_balance(balance)
        return output


def place_mlps(blocks: Sequence[Block], architecture: Architecture, *, tile: int | None) -> None:
    """Put an `MLP` in each layer, after other replacements of its modules (fused_modules.py).

    Tiles are for dense MLPs, and layers need such a half; `distlora.architecture.config_checks` refuses others.
    """
    for index, block in enumerate(blocks):
        layer, half = block.inner, architecture.layer(index).mlp
        assert half is not None, f"layer {index} has no MLP that runs by itself"
        path, *names = half
        norms = [None if name is None else layer.get_submodule(name) for name in names]
        layer.set_submodule(path, MLP(layer.get_submodule(path), block.context, norms, tile=tile))
        for name, norm in zip(names, norms, strict=True):
            if name is not None and norm is not None:
                layer.set_submodule(name, HandsOn(norm))


def parts_of(length: int, tile: int) -> Iterator[slice]:
    """Return the tiles of `length` tokens in order. The last has the remainder."""
    return (slice(start, min(start + tile, length)) for start in range(0, length, tile))


def in_tiles(run: Callable[[Tensor, int], Tensor], hidden_states: Tensor, tile: int) -> Tensor:
    """Concatenate run(tokens (B, tile, H), first) of each tile: (B, T, H)."""
    output = torch.empty_like(hidden_states)
    for span in parts_of(hidden_states.shape[1], tile):
        output[:, span] = run(hidden_states[:, span], span.start)
    return output


class _Tiles(torch.autograd.Function):
    """run(tokens, first) for each tile of hidden (B, T, H).

    Backward runs each tile again and differentiates it at once.

    `parameters` are the trained parameters that run's result depends on: their gradients are summed in fp32, in tile
    order, and given to autograd once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keeper: Tensor,
        hidden: Tensor,
        run: Callable[[Tensor, int], Tensor],
        tile: int,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.run, ctx.tile, ctx.parameters = run, tile, parameters
        return in_tiles(run, hidden, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = saved_tensors(ctx)
        assert hidden is not None
        needs_hidden, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        wanted = [parameter for parameter, need in zip(ctx.parameters, needs, strict=True) if need]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        totals: list[Tensor] = []
        for span in parts_of(hidden.shape[1], ctx.tile):
            tokens = hidden[:, span].detach().requires_grad_(needs_hidden)
            with torch.enable_grad():
                output = ctx.run(tokens, span.start)
            leaves = [tokens, *wanted] if needs_hidden else wanted
            gradients = list(torch.autograd.grad(output, leaves, gradient[:, span]))
            if hidden_gradient is not None:
                hidden_gradient[:, span] = gradients.pop(0)
            totals = (
                gradients
                if not totals
                else [total.add_(gradient) for total, gradient in zip(totals, gradients, strict=True)]
            )
        remaining = iter(totals)
        return (None, hidden_gradient, None, None, *(next(remaining) if need else None for need in needs))
