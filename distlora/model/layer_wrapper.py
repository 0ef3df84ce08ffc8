"""Wrap each decoder layer: the unit of sharding, activation checkpointing and micro-batching (extension point 1).

The family's model code calls the wrapper instead of its decoder layer. It splits the batch into `num_micro` slices and
runs the layer on each while its weights are gathered: with FSDP2 around the wrapper, a step gathers each layer once
however many micro-batches it accumulates.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from distlora.model.adapters import BlockContext, Rows
from distlora.system.host_memory import bytes_of, take_chunk, take_places
from distlora_kernels import elementwise, scratch

_CACHES = ("cache", "past_key_values")
"""Names by which transformers passes a layer the keys and values of earlier tokens, one object for all rows."""


class Reference:
    """Second pass of a forward's rows through the initial model, without gradient: DPO's reference.

    Each layer runs both passes while it is gathered, and hands its output on here. Backward keeps nothing of it, and
    one layer's output is alive at a time.
    """

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        """(B,) int64: slot of each row's adapter in this pass, -1 for none; None: the layer's initial adapter."""
        self.hidden: Tensor | None = None
        """(B, T, H) input of the next layer; None before the first, which reads the rows' own input."""

    def take(self) -> Tensor | None:
        """Return the states and forget them, so that they are freed with their user."""
        taken, self.hidden = self.hidden, None
        return taken


class Block(nn.Module):
    """Decoder layer that runs its batch in slices, with optional activation checkpointing."""

    def __init__(self, inner: nn.Module, context: BlockContext) -> None:
        super().__init__()
        self.inner = inner
        self.context = context
        """Context of the layer's linears; holds the slice that is running."""
        self.rows = Rows()
        """All rows of the batch."""
        self.balance: Tensor | None = None
        """(B, 2, experts) fp32 router statistics of the last forward; the reader clears it."""
        self.reference: Reference | None = None
        """Shared by the layers of a forward that also runs its rows through the initial model."""
        self.started: dict[nn.Parameter, Tensor] = {}
        """Initial values of the adapters' parameters, if they were not zero and a reference needs them."""
        self.num_micro = 1
        """Number of slices; must divide the batch."""
        self.checkpointing = False
        """Keep only the slices' inputs and recompute the rest in backward."""
        self.host_inputs: HostInputs | None = None
        """Host memory for those inputs; None: they stay on the device."""
        self.remakes = False
        """Without activation checkpointing: store how to recompute outputs of compiled norms and gated products, not
        the outputs."""
        self.keep_dequantized = False
        """True to keep dequantized weights from recomputation (activation checkpointing) until the slice's backward is
        done."""

    def __getattr__(self, name: str) -> Any:
        # Some families' models read plain attributes of their layers (attention_type).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Run the layer on hidden_states (B, T, H). Kwargs with dim 0 = B are sliced too, with dim 0 = 1 shared."""
        output, balance = self._run_slices(hidden_states, self.rows, kwargs)
        if balance is not None:
            output, self.balance = _Together.apply(output, balance)
        if self.reference is not None:
            before = hidden_states if self.reference.hidden is None else self.reference.hidden
            with torch.no_grad(), self._as_started():
                self.reference.hidden, _ = self._run_slices(before, Rows(self.reference.rows), kwargs)
        return output

    @contextlib.contextmanager
    def _as_started(self) -> Iterator[None]:
        """Use the adapters' initial values within this context. Autograd's saved Parameters stay in place."""
        now = {parameter: parameter.data for parameter in self.started}
        try:
            for parameter, start in self.started.items():
                parameter.data = start
            yield
        finally:
            for parameter, value in now.items():
                parameter.data = value

    def forget_rows(self) -> None:
        """Clear the rows of the last forward."""
        self.rows = self.context.rows = Rows()
        self.reference = None

    def _run_slices(self, hidden_states: Tensor, rows: Rows, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return (B, T, H), and the routers' statistics if requested."""
        batch = hidden_states.shape[0]
        if batch % self.num_micro:
            raise ValueError(f"a batch of {batch} rows cannot be run in {self.num_micro} equal slices")
        size = batch // self.num_micro
        # One call: its backward joins the slices' gradients once. That of an index makes one as large as all slices for
        # each of them, and sums them.
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

    def _run(self, hidden_states: Tensor, rows: Rows, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        def layer(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            # In recomputation too, when another slice's rows may be set.
            self.context.rows = rows
            try:
                output = self.inner(hidden, **kwargs)
            finally:  # Recomputation leaves by an exception, and the router's statistics would keep its graph alive.
                balance = self.context.take_balance()
            return output[0] if isinstance(output, tuple) else output, balance

        if self.checkpointing and torch.is_grad_enabled():
            # No layer draws from torch's generators, so their state need not be kept.
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
    """Identity on (output, balance) in one graph node, so that backward starts when both gradients are there.

    FSDP2 gathers the layer again at the output's gradient, and must do so before the balance's gradient needs its
    weights. Without this node the order would depend on autograd's scheduling.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return output.view_as(output), balance.view_as(balance)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_balance: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad_output, grad_balance


def _keeping(device: torch.device) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return scratch.keeping("forward", device), scratch.keeping("recomputation", device)


def _slice(name: str, value: Any, part: slice, batch: int) -> Any:
    """Return the rows `part` of a layer's keyword argument. Refuses one that may hide a batch dimension."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if name in _CACHES and part == slice(0, batch):  # Generation runs the batch whole: a cache cannot be sliced.
        return value
    if isinstance(value, tuple):
        return tuple(_slice(name, item, part, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] in (1, batch):
        return value[part] if value.shape[0] == batch else value
    described = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"the block wrapper cannot slice the layer argument {name!r} ({described}) for {batch} rows")


class HostInputs:
    """Offloaded inputs of the decoder layers of one model, and their host memory.

    A layer's input moves to the host while the layer runs, and comes back while the layer after it is recomputed. The
    newest stays until there is a newer one, because backward begins with it. On CUDA, copies run on a separate stream
    in the order of the calls. The compute stream waits for a copy by an event, before an offloaded input's tensor is
    freed and before a returned input is read; the host waits for nothing (README.md, Offload).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Stream of the copies; None on the CPU, which copies at once."""
        self._free: dict[int, list[Tensor]] = {}
        """Free places by size in bytes: (bytes,) uint8 of host memory."""
        self.newest: weakref.ref[_Kept] | None = None
        self.taken_bytes = 0
        """Host memory in bytes, in use or not."""

    def reserve(self, num_inputs: int, nbytes: int) -> None:
        """Reserve memory for `num_inputs` inputs of `nbytes` bytes, before the first step needs it."""
        sizes = [nbytes] * num_inputs
        self._free.setdefault(nbytes, []).extend(take_places(sizes, pinned=self._side is not None))
        self.taken_bytes += bytes_of(sizes)

    def keeping(self) -> saved_tensors_hooks:
        """Offload the input that a call of torch's checkpoint saves within this context.

        Tensors that the checkpointed function saves are not affected: the checkpoint's hooks are the inner ones.
        """
        return saved_tensors_hooks(self._keep, self._fetch)

    def _keep(self, tensor: Tensor) -> _Kept | Tensor:
        # torch 2.11 saves an empty tensor beside the input.
        return _Kept(self, self.take(tensor.nbytes), tensor) if tensor.numel() > 0 else tensor.detach()

    def _fetch(self, kept: _Kept | Tensor) -> Tensor:
        return kept.fetch() if isinstance(kept, _Kept) else kept

    def take(self, nbytes: int) -> Tensor:
        """Return a place on the host, (nbytes or more,) uint8, to be given back. Allocates if none is free."""
        fitting = [size for size, free in self._free.items() if size >= nbytes and free]
        if fitting:
            return self._free[min(fitting)].pop()
        self.taken_bytes += nbytes
        return take_chunk(nbytes, pinned=self._side is not None)

    def give_back(self, place: Tensor) -> None:
        """Free a place for the next `take`."""
        # A copy out of it may still be queued; the next copy into it is queued behind that.
        self._free.setdefault(place.nbytes, []).append(place)

    @property
    def num_free(self) -> int:
        """Number of free places."""
        return sum(map(len, self._free.values()))

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy between host and device, after everything queued on the device so far.

        Pass the result to `wait` before one of the two tensors is used for something else.
        """
        if self._side is None:
            to.copy_(source)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Make everything queued on the device from now on wait for that copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class _Kept:
    """One input. Its place is freed when nothing refers to it any more: after backward, or without one."""

    def __init__(self, store: HostInputs, place: Tensor, tensor: Tensor) -> None:
        self._store, self._place = store, place
        self._host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._here: Tensor | None = None
        """Tensor on the device, while a copy uses it or backward needs it first."""
        self._copied: torch.cuda.Event | None = None
        """Event of the last copy, in either direction."""
        self._was_fetched = False
        self._before, store.newest = store.newest, weakref.ref(self)
        if self._before is not None and (before := self._before()) is not None:
            before.leave()
        self._here = tensor.detach()
        self._copied = store.copy(self._host, self._here)

    def leave(self) -> None:
        """Free the tensor on the device."""
        if self._here is not None:
            self._store.wait(self._copied)
            self._here = None

    def bring(self) -> Tensor:
        """Return the tensor on the device, which a copy may still be filling."""
        if self._here is None:
            self._here = torch.empty_like(self._host, device=self._store.device)
            self._copied = self._store.copy(self._here, self._host)
        return self._here

    def fetch(self) -> Tensor:
        """Return the input for a recomputation, and start the copy of the input before it, which is needed next."""
        here = self.bring()
        self._store.wait(self._copied)
        self._here, self._was_fetched = None, True
        before = None if self._before is None else self._before()
        if before is not None and not before._was_fetched:
            before.bring()
        return here

    def __del__(self) -> None:
        self.leave()
        self._store.give_back(self._place)
