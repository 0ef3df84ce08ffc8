"""Wrap each decoder layer: the unit of sharding, activation checkpointing and micro-batching (extension point 1).

The family's model code calls the wrapper instead of its decoder layer. It splits the batch into `num_micro` slices and
runs the layer on each while its weights are gathered: with FSDP2 around the wrapper, a step gathers each layer once
however many micro-batches it accumulates.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from distlora.model.adapters import BlockContext, Rows
from distlora.model.by_document import ByDocument, Wrapper, describe, join, map_leaves
from distlora.model.frozen_linear import FrozenTensor
from distlora.system.host_memory import bytes_of, take_chunk, take_places
from distlora_kernels import elementwise

_CACHES = ("cache", "past_key_values", "layer_past")
"""Names by which transformers passes a layer the keys and values of earlier tokens, one object for all rows."""


class Reference:
    """Second pass of a forward's rows through the initial model, without gradient: DPO's reference.

    Each layer runs both passes while it is gathered, and hands its output on here. Backward keeps nothing of it, and
    one layer's output is alive at a time.
    """

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        """(B,) int64 of -1: no row uses an adapter; None: all use the layer's initial one."""
        self.hidden: Tensor | None = None
        """(B, T, H) input of the next layer; None before the first, which reads the rows' own input."""
        self.is_image: Tensor | None = None
        """(B, T) bool: the tokens whose states the decoder adds features of images to, between its first layers."""
        self.features: Sequence[Tensor] = ()
        """Those features, (tokens, H) for each of the layers that are still to run."""

    def hand_on(self, states: Tensor) -> None:
        """Keep the output (B, T, H) of a layer, with the features that the decoder adds to it."""
        if self.features:
            assert self.is_image is not None
            features, *self.features = self.features
            states = states.clone()  # The same operations as transformers', so that both passes round alike.
            states[self.is_image] = states[self.is_image] + features.to(states.dtype)
        self.hidden = states

    def take(self) -> Tensor | None:
        """Return the states and forget them, so that they are freed with their user."""
        taken, self.hidden = self.hidden, None
        return taken


class Block(Wrapper):
    """Decoder layer that runs its batch in slices, with optional activation checkpointing."""

    def __init__(
        self, inner: nn.Module, context: BlockContext, batch_dims: Mapping[str, int | None] | None = None
    ) -> None:
        super().__init__(inner)
        self.batch_dims = batch_dims or {}
        """Batch dimensions of the arguments that differ from the default (`batch_dims`); None: no batch dimension.

        The size there may be a multiple of the batch (batch x heads). Default: dim 0, shared if its size is 1.
        """
        self._names = argument_names(inner)
        self._hidden_dim = self.batch_dims.get(self._names[0]) or 0
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
        self.dense_dtype: torch.dtype | None = None
        """The dtype of copies of the quantized weights that the next forward makes, for the whole run; None: none. If
        the layer is sharded, it stays gathered."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on hidden_states (B, T, H), its first argument; other tensors are sliced by `batch_dims`.

        A tuple that it returns has the hidden states first, and dim 0 = B in the others. A UserDict, by which layers
        hand tensors to later layers, becomes one for each slice.
        """
        if self.dense_dtype is not None:
            for weight in self.modules():
                if isinstance(weight, FrozenTensor) and weight.quantized:
                    weight.dense_copy = weight.frozen_weight.dense(self.dense_dtype)
            self.dense_dtype = None
        hidden_states, *others = args or (kwargs.pop(self._names[0]),)
        if others:
            kwargs |= zip(self._names[1 : len(args)], others, strict=True)
        output, balance = self._run_slices(hidden_states, self.rows, kwargs)
        more = output[1:] if isinstance(output, tuple) else None
        if balance is not None:
            hidden, self.balance = _Together.apply(output if more is None else output[0], balance)
            output = hidden if more is None else (hidden, *more)
        if self.reference is not None:
            if any(item is not None for item in more or ()):
                raise TypeError("a layer that hands more than hidden states to the next has no reference pass")
            before = hidden_states if self.reference.hidden is None else self.reference.hidden
            rows = Rows(self.reference.rows, packed=self.rows.packed)
            with torch.no_grad(), self._as_started():
                states, _ = self._run_slices(before, rows, kwargs, reference=True)
                self.reference.hand_on(states if more is None else states[0])
        return output

    @contextlib.contextmanager
    def _as_started(self) -> Iterator[None]:
        """Use the adapters' initial values within this context. Autograd's saved Parameters stay in place."""
        assert self.reference is not None
        self.context.uses_start, self.context.uses_base = True, self.reference.rows is not None
        try:
            with computing_with(self.started):
                yield
        finally:
            self.context.uses_start = self.context.uses_base = False

    def forget_rows(self) -> None:
        """Clear the rows of the last forward."""
        self.rows = self.context.rows = Rows()
        self.reference = None

    def _run_slices(
        self, hidden_states: Tensor, rows: Rows, kwargs: dict[str, Any], *, reference: bool = False
    ) -> tuple[Any, Tensor | None]:
        """Return the layer's output for all rows, and the routers' statistics if requested."""
        dim = self._hidden_dim
        batch = hidden_states.shape[dim]
        if batch % self.num_micro:
            raise ValueError(f"a batch of {batch} rows cannot be run in {self.num_micro} equal slices")
        size = batch // self.num_micro
        # One call: its backward joins the slices' gradients once. That of an index makes one as large as all slices for
        # each of them, and sums them.
        inputs = hidden_states.split(size, dim) if self.num_micro > 1 else (hidden_states,)
        outputs, balances = [], []
        for index, hidden in enumerate(inputs):
            span = slice(index * size, (index + 1) * size)
            sliced = {name: self._slice(name, value, span, batch, reference) for name, value in kwargs.items()}
            output, balance = self._run(hidden, rows.part(span), sliced)
            outputs.append(output)
            balances += [] if balance is None else [balance]
        output = outputs[0]
        if len(outputs) > 1 and isinstance(output, tuple):
            hiddens, more = [output[0] for output in outputs], [output[1:] for output in outputs]
            output = (torch.cat(hiddens, dim), *join(more, [(size,)] * len(more), dim=0))
        elif len(outputs) > 1:
            output = torch.cat(outputs, dim)
        return output, torch.cat(balances) if balances else None

    def _slice(self, name: str, value: Any, span: slice, batch: int, reference: bool) -> Any:
        """Return the rows `span` of an argument. Refuses one that may hide a batch dimension."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return self._cut(name, span, batch, value)
        if type(value) is tuple and all(isinstance(item, Tensor) for item in value):
            return tuple([self._cut(name, span, batch, item) for item in value])
        cut = functools.partial(self._cut, name, span, batch)
        if isinstance(value, UserDict):
            return _HandedOn(value, (span.start, span.stop, reference), cut)
        return map_leaves(cut, value)

    def _cut(self, name: str, span: slice, batch: int, value: Any) -> Any:
        num_rows = span.stop - span.start
        if isinstance(value, Tensor):
            if name not in self.batch_dims:
                if value.dim() > 0 and value.shape[0] in (1, batch):
                    return value[span] if num_rows < batch == value.shape[0] else value
            elif (dim := self.batch_dims[name]) is None:
                return value
            elif dim < value.dim() and value.shape[dim] % batch == 0:
                per_row = value.shape[dim] // batch
                return value.narrow(dim, span.start * per_row, num_rows * per_row)
        elif name in _CACHES and num_rows == batch:  # Generation runs the batch whole: a cache cannot be sliced.
            return value
        described = f"the layer argument {name!r} ({describe(value)})"
        raise TypeError(f"the block wrapper cannot slice {described} for {batch} rows")

    def _run(self, hidden_states: Tensor, rows: Rows, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        handed_on = {name: value for name, value in kwargs.items() if type(value) is _HandedOn}
        runs = itertools.count()

        def layer(hidden: Tensor) -> tuple[Any, Tensor | None]:
            # In recomputation too, when another slice's rows may be set.
            self.context.rows = rows
            self.context.recomputes = next(runs) > 0
            given = kwargs | {name: value.as_before() for name, value in handed_on.items()} if handed_on else kwargs
            try:
                output = self.inner(hidden, **given)
            finally:  # Recomputation leaves by an exception, and the router's statistics would keep its graph alive.
                self.context.recomputes = False
                balance = self.context.take_balance()
            for name, value in handed_on.items():
                value.hand_on(given[name])
            return output, balance

        if self.checkpointing and torch.is_grad_enabled():
            # No layer draws from torch's generators, so their state need not be kept.
            with contextlib.nullcontext() if self.host_inputs is None else self.host_inputs.keeping():
                return checkpoint(layer, hidden_states, use_reentrant=False, preserve_rng_state=False)
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


class _HandedOn:
    """Mapping by which layers hand tensors to later layers (keys and values that they share), for one slice.

    Each layer gets its own, with the entries of earlier layers, and the same ones in recomputation. What it adds in its
    first run goes to later layers through the decoder's mapping, which lives as long as the decoder's forward.
    """

    def __init__(self, mapping: UserDict[Any, Any], key: tuple[Any, ...], cut: Callable[[Any], Any]) -> None:
        slices = mapping.setdefault(_HandedOn, {})  # An entry that no layer has.
        self._kind = type(mapping)
        self._entries: dict[Any, Any] | None = slices.setdefault(key, {})
        before = {entry: map_leaves(cut, value) for entry, value in mapping.items() if entry is not _HandedOn}
        self._before = before | self._entries

    def as_before(self) -> UserDict[Any, Any]:
        """Return the mapping as the layer finds it."""
        mapping = self._kind()
        mapping.update(self._before)
        return mapping

    def hand_on(self, mapping: UserDict[Any, Any]) -> None:
        """Store what the layer left in the mapping, unless this is a recomputation."""
        if self._entries is not None:
            self._entries.update(mapping)
            self._entries = None  # Backward must not keep what it does not read.


def batch_dims(calls: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, int | None]:
    """Return Block.batch_dims of a layer: the arguments that the default would slice wrongly or refuse.

    `calls`: (rows, arguments by name) of the same call for several numbers of rows, at one length; `argument_names` has
    the names of those by position. Raises TypeError for an argument with several batch dimensions, or with tensors that
    differ in theirs.
    """
    rows = [num_rows for num_rows, _ in calls]
    assert len(set(rows)) > 1, "calls for two numbers of rows are needed"
    batch_dims: dict[str, int | None] = {}
    for name in calls[0][1]:
        leaves: list[list[Any]] = [[] for _ in calls]
        for (_, arguments), known in zip(calls, leaves, strict=True):
            map_leaves(known.append, arguments[name])
        dims: list[int | None] = []
        by_default = True
        for same in zip(*leaves, strict=True):
            shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else (1,) for leaf in same]
            ratios = [
                {size / num for size, num in zip(sizes, rows, strict=True)} for sizes in zip(*shapes, strict=True)
            ]
            moving = [dim for dim, sizes in enumerate(ratios) if len(sizes) == 1 and sizes != {0}]
            if len(moving) > 1:
                raise TypeError(f"the layer argument {name!r} of shape {shapes[0]} has batch dimensions {moving}")
            dims += moving or [None]
            firsts = [(num,) if moving == [0] else (1,) for num in rows]
            by_default &= moving in ([], [0]) and [shape[:1] for shape in shapes] == firsts
        if not by_default and len(set(dims)) > 1:
            raise TypeError(f"tensors of the layer argument {name!r} differ in their batch dimensions {dims}")
        if not by_default:
            batch_dims[name] = dims[0]
    return batch_dims


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that a layer takes by position."""
    while isinstance(layer, ByDocument):
        layer = layer.inner
    parameters = inspect.signature(layer.forward).parameters.values()
    return tuple(
        parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


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
        self.newest: weakref.ref[_Offloaded] | None = None
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

    def _keep(self, tensor: Tensor) -> _Offloaded | Tensor:
        # torch 2.11 saves an empty tensor beside the input.
        return _Offloaded(self, self.take(tensor.nbytes), tensor) if tensor.numel() > 0 else tensor.detach()

    def _fetch(self, saved: _Offloaded | Tensor) -> Tensor:
        return saved.fetch() if isinstance(saved, _Offloaded) else saved

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


class _Offloaded:
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


@contextlib.contextmanager
def computing_with(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Use these values of parameters within this context."""
    now = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in now.items():
            parameter.data = value
