"""Inputs of checkpointed blocks in host memory: from a block's forward to its recomputation in backward.

What a checkpoint keeps is its input. Here that goes to the host while the block runs, and comes back while the block
after it is recomputed. Of all inputs the device then holds two: the one in use, and the next one on its way. The newest
stays on the device until there is a newer one: backward begins with it.

On CUDA copies run on a stream of their own, in both directions, in the order in which they are asked for. The stream of
the blocks waits for a copy by an event, in two places: before an input that has left is forgotten, so that its memory
is used again in the order of that stream (with `record_stream` a host that runs ahead would find none of it free and
take more), and before one that has come back is read. The host waits for nothing, and its memory, pinned, is used again
from step to step. On the CPU the same copies go to other memory of the same machine, at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distlora.system.host_memory import bytes_of, take_chunk, take_places


class HostInputs:
    """The inputs that the blocks of one model keep, and the host memory that they are kept in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Where copies run; None on the CPU, where they are done at once."""
        self._free: dict[int, list[Tensor]] = {}
        """Places that hold nothing, by their bytes: (bytes,) uint8 of host memory."""
        self._newest: weakref.ref[_Kept] | None = None
        self.taken_bytes = 0
        """Of host memory, whether it is in use or not."""

    def reserve(self, num_inputs: int, nbytes: int) -> None:
        """Take memory for so many inputs of so many bytes, before the first step needs it."""
        sizes = [nbytes] * num_inputs
        self._free.setdefault(nbytes, []).extend(take_places(sizes, pinned=self._side is not None))
        self.taken_bytes += bytes_of(sizes)

    def keeping(self) -> saved_tensors_hooks:
        """Around a call of torch's checkpoint: the input that this saves is kept on the host. What the function saves
        is the checkpoint's own business, whose hooks are the inner ones."""
        return saved_tensors_hooks(self._keep, self._fetch)

    def _keep(self, tensor: Tensor) -> _Kept | Tensor:
        # torch 2.11 saves an empty tensor beside the input.
        return _Kept(self, self.take(tensor.nbytes), tensor) if tensor.numel() > 0 else tensor.detach()

    def _fetch(self, kept: _Kept | Tensor) -> Tensor:
        return kept.fetch() if isinstance(kept, _Kept) else kept

    def follow(self, kept: _Kept) -> _Kept | None:
        """`kept` is the newest from now on. Returns the one before it, if that is still kept."""
        before = None if self._newest is None else self._newest()
        self._newest = weakref.ref(kept)
        return before

    def take(self, nbytes: int) -> Tensor:
        """A place on the host, (nbytes or more,) uint8, to be given back. Takes more memory where none is reserved."""
        fitting = [size for size, free in self._free.items() if size >= nbytes and free]
        if fitting:
            return self._free[min(fitting)].pop()
        self.taken_bytes += nbytes
        return take_chunk(nbytes, pinned=self._side is not None)

    def give_back(self, place: Tensor) -> None:
        # A copy out of it may still be queued; the one that fills it again is queued behind that.
        self._free.setdefault(place.nbytes, []).append(place)

    @property
    def num_free(self) -> int:
        """Places that hold nothing."""
        return sum(map(len, self._free.values()))

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy between host and device, behind what the device has been given to do so far. `wait` for what this
        returns before one of the two is used for something else."""
        if self._side is None:
            to.copy_(source)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """What the device is given from now on comes after that copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class _Kept:
    """One input, which is given back when nothing refers to this any more: after backward, or where there is none."""

    def __init__(self, store: HostInputs, place: Tensor, tensor: Tensor) -> None:
        self._store, self._place = store, place
        self._host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._here: Tensor | None = None
        """On the device: where a copy reads or writes it, or backward will ask for it first."""
        self._copied: torch.cuda.Event | None = None
        """The last copy of it, either way."""
        self._was_fetched = False
        before = store.follow(self)
        self._before = None if before is None else weakref.ref(before)
        if before is not None:
            before.leave()
        self._here = tensor.detach()
        self._copied = store.copy(self._host, self._here)

    def leave(self) -> None:
        """Forget the tensor on the device."""
        if self._here is not None:
            self._store.wait(self._copied)
            self._here = None

    def bring(self) -> Tensor:
        """The tensor on the device, which a copy may still be filling."""
        if self._here is None:
            self._here = torch.empty_like(self._host, device=self._store.device)
            self._copied = self._store.copy(self._here, self._host)
        return self._here

    def fetch(self) -> Tensor:
        """The input, for a recomputation; the one that was kept before it, which is asked for next, sets out."""
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
