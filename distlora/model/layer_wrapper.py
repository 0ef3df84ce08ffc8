"""Seam 1: every decoder block sits in one wrapper, which is the unit of sharding, of checkpointing and of
micro-batching.

The wrapper is called by the family's own model code in place of its decoder layer. It cuts the batch into `num_micro`
slices and runs the layer on each while the block's weights are gathered: with FSDP2 around the wrapper, a step gathers
each block once however many micro-batches it accumulates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from distlora.model.activation_offload import HostInputs
from distlora.model.adapters import BlockContext, StepRows
from distlora_kernels import elementwise, scratch

_CACHES = ("cache", "past_key_values")
"""Names under which transformers hands a layer the keys and values of earlier tokens, one object for all rows."""


class Reference:
    """The rows of a forward a second time, through the model as it started and without gradient: DPO's reference.

    Each block runs both while it is gathered and hands its output on here. Nothing of it is kept for backward, and of
    the blocks' outputs one at a time is alive.
    """

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        """(B,) int64: which adapter each row uses here, -1 for none; None: that of the block as it started."""
        self.hidden: Tensor | None = None
        """(B, T, H): what the next block reads; None before the first, which reads what the rows themselves do."""

    def take(self) -> Tensor | None:
        """The states, which are then freed with whoever took them, though the blocks know this object still."""
        taken, self.hidden = self.hidden, None
        return taken


class _Rows(NamedTuple):
    """What a block knows of the rows that it runs beside their hidden states; BlockContext says what each means."""

    adapters: Tensor | None
    places: StepRows | None
    balanced: Tensor | None

    def part(self, part: slice) -> _Rows:
        return _Rows(
            None if self.adapters is None else self.adapters[part],
            None if self.places is None else self.places.part(part),
            None if self.balanced is None else self.balanced[part],
        )


class Block(nn.Module):
    """A decoder layer with its batch run in slices, each checkpointed if asked."""

    def __init__(self, inner: nn.Module, context: BlockContext) -> None:
        super().__init__()
        self.inner = inner
        self.context = context
        """What the layer's linears read; holds the slice that is running."""
        self.adapter_rows: Tensor | None = None
        """(B,) slot of each row's adapter, -1 for none; None: all rows use the only one."""
        self.step_rows: StepRows | None = None
        """The rows' places in training, (B,); None: outside of training, where nothing is dropped."""
        self.balanced: Tensor | None = None
        """(B, T): the positions over which the router is to be balanced; None: outside of training, without routers."""
        self.balance: Tensor | None = None
        """(B, 2, experts) fp32: what the last forward's router says to that; whoever reads it takes it away."""
        self.reference: Reference | None = None
        """Shared by the blocks of a forward that runs its rows through the model as it started too."""
        self.started: dict[nn.Parameter, Tensor] = {}
        """What the adapters' parameters were at the start, where that was more than nothing and a reference needs it.
        """
        self.num_micro = 1
        """Slices of the batch; must divide it."""
        self.checkpointing = False
        """Keep only the slices' inputs and recompute the rest in backward."""
        self.host_inputs: HostInputs | None = None
        """Where checkpointing keeps those inputs; None: on the device."""
        self.remakes = False
        """Without checkpointing: keep how outputs of compiled norms and gated products are made again, in their place.
        """
        self.keep_dequantized = False
        """Keep what recomputation dequantizes until its slice's backward is done, with checkpointing."""

    def __getattr__(self, name: str) -> Any:
        # Some families' models read plain attributes off their layers (attention_type).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states (B, T, H) -> (B, T, H). A kwarg with dim 0 = B is sliced too; one with dim 0 = 1 is shared."""
        rows = _Rows(self.adapter_rows, self.step_rows, self.balanced)
        output, balance = self._run_slices(hidden_states, rows, kwargs)
        if balance is not None:
            output, self.balance = _Together.apply(output, balance)
        if self.reference is not None:
            before = hidden_states if self.reference.hidden is None else self.reference.hidden
            rows = _Rows(self.reference.rows, places=None, balanced=None)
            with torch.no_grad(), self._as_started():
                self.reference.hidden, _ = self._run_slices(before, rows, kwargs)
        return output

    @contextlib.contextmanager
    def _as_started(self) -> Iterator[None]:
        """Exchange the adapters' values for those of the start; what autograd has saved are the Parameters, unmoved."""
        now = {parameter: parameter.data for parameter in self.started}
        try:
            for parameter, start in self.started.items():
                parameter.data = start
            yield
        finally:
            for parameter, value in now.items():
                parameter.data = value

    def forget_rows(self) -> None:
        """Let go of what the last forward's rows were."""
        self.adapter_rows = self.step_rows = self.balanced = self.reference = None
        context = self.context
        context.adapter_rows = context.step_rows = context.balanced = None

    def _run_slices(self, hidden_states: Tensor, rows: _Rows, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(B, T, H), and what the routers say where they are asked."""
        batch = hidden_states.shape[0]
        if batch % self.num_micro:
            raise ValueError(f"a batch of {batch} rows cannot be run in {self.num_micro} equal slices")
        size = batch // self.num_micro
        # In one call: its backward joins the slices' gradients once. That of an index makes one as large as all slices
        # for each of them, and adds it up.
        inputs = hidden_states.split(size) if self.num_micro > 1 else (hidden_states,)
        outputs, balances = [], []
        for index, hidden in enumerate(inputs):
            part = slice(index * size, (index + 1) * size)
            sliced = {name: _slice(name, value, part, batch) for name, value in kwargs.items()}
            output, balance = self._run(hidden, rows.part(part), sliced)
            outputs.append(output)
            balances += [] if balance is None else [balance]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output, torch.cat(balances) if balances else None

    def _run(self, hidden_states: Tensor, rows: _Rows, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        def layer(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            # In recomputation too, when another slice's rows may be set.
            context = self.context
            context.adapter_rows, context.step_rows, context.balanced = rows
            try:
                output = self.inner(hidden, **kwargs)
            finally:  # Recomputation leaves by an exception, and what the router left would keep its graph alive.
                balance = context.take_balance()
            return output[0] if isinstance(output, tuple) else output, balance

        if self.checkpointing and torch.is_grad_enabled():
            # Nothing in a block draws from torch's generators, so their state need not be kept.
            context = functools.partial(_keeping, hidden_states.device) if self.keep_dequantized else noop_context_fn
            with contextlib.nullcontext() if self.host_inputs is None else self.host_inputs.keeping():
                return checkpoint(
                    layer, hidden_states, use_reentrant=False, preserve_rng_state=False, context_fn=context
                )
        if self.remakes and torch.is_grad_enabled():
            with elementwise.recomputing():
                return layer(hidden_states)
        return layer(hidden_states)


class _Together(torch.autograd.Function):
    """(output, balance) as they are, in one node of the graph: no backward of the block starts before both gradients
    are there. FSDP2 gathers the block again at the output's, and must do so before the balance's needs its weights;
    without this node that would be by the order in which autograd happens to run nodes.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return output.view_as(output), balance.view_as(balance)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_balance: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad_output, grad_balance


def _keeping(device: torch.device) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a checkpoint puts around its forward and its recomputation."""
    return scratch.keeping("forward", device), scratch.keeping("recomputation", device)


def _slice(name: str, value: Any, part: slice, batch: int) -> Any:
    """The rows `part` of a layer's keyword argument; refuses what may hide a batch dimension."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if name in _CACHES and part == slice(0, batch):  # Generation runs the batch whole: a cache cannot be cut.
        return value
    if isinstance(value, tuple):
        return tuple(_slice(name, item, part, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] in (1, batch):
        return value[part] if value.shape[0] == batch else value
    described = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"the block wrapper does not know how to slice the layer argument {name!r} ({described}) for {batch} rows"
    )
