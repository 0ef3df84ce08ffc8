"""Offload the inputs of decoder layers to host memory, from a layer's forward to its recomputation in backward.

Activation checkpointing keeps a layer's input. Here it moves to the host while the layer runs, and comes back while the
layer after it is recomputed. The device holds two inputs: the one in use and the next one in transfer. The newest stays
on the device until there is a newer one, because backward begins with it.

On CUDA, copies run on a separate stream, in both directions and in the order of the calls. The compute stream waits for
a copy by an event: before the tensor of an offloaded input is freed (with `record_stream`, a host that runs ahead would
find no free memory and allocate more), and before a returned input is read. The host waits for nothing, and its pinned
memory is reused from step to step. On the CPU the same copies are made at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distlora.system.host_memory import bytes_of, take_chunk, take_places


class HostInputs:
    """Offloaded inputs of the decoder layers of one model, and their host memory."""

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
